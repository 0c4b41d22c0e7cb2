"""``transfer="best"``: both ways are trained, the better on the held-out part is kept, and the table says which."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from distributed_eg import ClusterConfig
from distributed_eg.errors import DivergedError, InputError, TaskFailedError
from distributed_eg.runtime.worker import stages
from tests.helpers import SETTINGS, content, hashes, tiny_benchmark, tiny_strategy
from tests.inside import manifests_of
from tests.strategy.test_repeats import STEPS, stream

BENCHMARK = tiny_benchmark((0, 1, 0, 2), train=80)


def trained(storage: Path | None = None, engine: Any = "inline", *, resume: bool = False, **settings: Any) -> Any:
    cluster = ClusterConfig(engine=engine, storage=None if storage is None else str(storage), resume=resume)
    strategy = tiny_strategy(cluster, **{**SETTINGS, "transfer": "best", "validation_fraction": 0.3, **settings})
    strategy.train(BENCHMARK.train_stream)
    return strategy


@pytest.mark.parametrize("lwf_wins", [True, False])
def test_the_better_is_kept_and_is_what_it_would_be_alone(lwf_wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is second, and after it, the parent is the same as where only that way is gone."""
    told = iter([0.5, 0.75 if lwf_wins else 0.25] * 3)
    monkeypatch.setattr(stages, "_held_out_accuracy", lambda *_: next(told))
    with trained(rel_thresh=math.inf) as strategy:  # by the rule, all are fine-tuned
        best, manifests = hashes(strategy), manifests_of(strategy)
        rows = strategy.registry.to_pylist()
        names = {path.name for path in Path(strategy.run_dir or "").glob("tasks/*/expert-*")}
        related = [row["transfer"] for row in strategy.relatedness.to_pylist() if row["chosen"]]
    way = "lwf" if lwf_wins else "finetune"
    with trained(transfer="threshold", rel_thresh=-math.inf if lwf_wins else math.inf) as strategy:
        assert hashes(strategy) == best
    assert len(names) == 4, "the others are gone"
    assert [manifest.transfer for manifest in manifests.values()] == ["fresh", way, way, way]
    assert related == [way] * 3
    assert [row["lwf_accuracy"] for row in rows] == [None, *[0.75 if lwf_wins else 0.25] * 3]
    assert [row["finetune_accuracy"] for row in rows] == [None, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("rel_thresh", "way"), [(math.inf, "finetune"), (-math.inf, "lwf")])
def test_at_a_tie_the_rule_decides(rel_thresh: float, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_held_out_accuracy", lambda *_: 0.75)
    with trained(rel_thresh=rel_thresh) as strategy:
        assert strategy.registry["transfer"].to_pylist() == ["fresh", way, way, way]


def test_accuracies_are_those_on_the_held_out_part() -> None:
    with trained(train_epochs=10) as strategy:
        contests = [manifest.contest for manifest in manifests_of(strategy).values()]
    assert contests[0] is None
    for contest in contests[1:]:
        assert contest is not None
        for share in (contest.lwf, contest.finetune):
            assert share * 24 == pytest.approx(round(share * 24)), "24 images are held out"
            assert share > 0.9


def test_workers_and_a_run_that_is_gone_on_with_leave_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "whole").close()
    trained(tmp_path / "ray", "ray").close()
    whole = stages._train_expert
    calls: list[int] = []

    def stops(context: Any, request: Any, kind: Any) -> Any:
        calls.append(request.input.record.task)
        if len(calls) == 4:  # the second expert of a contest
            raise KeyboardInterrupt
        return whole(context, request, kind)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "_train_expert", stops)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "stopped")
    trained(tmp_path / "stopped", resume=True).close()
    expected = content(tmp_path / "whole")
    assert content(tmp_path / "ray") == expected
    assert content(tmp_path / "stopped") == expected


def test_where_one_way_diverges_the_other_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever the rule would take; only where both do the task fails."""
    whole = stages._train_expert
    diverging: set[str] = set()

    def train(context: Any, request: Any, kind: Any) -> Any:
        if request.choice.transfer in diverging:
            raise DivergedError("its loss is nan")
        return whole(context, request, kind)

    monkeypatch.setattr(stages, "_train_expert", train)
    for way, other in (("lwf", "finetune"), ("finetune", "lwf")):
        diverging.add(way)
        with trained() as strategy:
            rows = strategy.registry.to_pylist()[1:]
            best = hashes(strategy)
        assert [(row["transfer"], row[f"{way}_accuracy"]) for row in rows] == [(other, None)] * 3
        assert None not in [row[f"{other}_accuracy"] for row in rows]
        rule = -math.inf if other == "lwf" else math.inf
        with trained(transfer="threshold", rel_thresh=rule) as strategy:
            assert hashes(strategy) == best
        diverging.clear()
    diverging.update(("lwf", "finetune"))
    with pytest.raises(TaskFailedError, match="its loss is nan"):
        trained()


def test_the_images_that_decide_were_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    ask = stages.Reader

    def noted(data: Any, what: str, **options: Any) -> Any:
        read.append(len(data))
        return ask(data, what, **options)

    right = stages._held_out_accuracy

    def asked(*args: Any) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(stages, "Reader", noted)
            return right(*args)

    monkeypatch.setattr(stages, "_held_out_accuracy", asked)
    trained().close()
    assert read == [24] * 6, "three tenths of 80 images, for both experts of three tasks"


def test_a_task_that_continues_has_no_rival() -> None:
    with tiny_strategy(transfer="best") as strategy:
        strategy.train(stream(*STEPS).train_stream)
        contests = {manifest.transfer: manifest.contest for manifest in manifests_of(strategy).values()}
    assert contests.pop("fresh") is None
    assert contests.pop("continue") is None
    assert None not in contests.values()


def test_another_word_is_refused() -> None:
    with pytest.raises(InputError, match=r"transfer .*best"):
        tiny_strategy(transfer="better")
