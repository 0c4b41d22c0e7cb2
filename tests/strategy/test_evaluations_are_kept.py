"""What a run keeps of its evaluations: the figures that the metrics gave, each under a number of its own."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from distributed_eg import ClusterConfig, ExpertGateStrategy, gate_metrics
from distributed_eg.errors import StorageError
from distributed_eg.store.evaluations import EvaluationRecord, read_all
from distributed_eg.store.storage import Storage
from distributed_eg.store.verification import collect, verify
from tests.helpers import SETTINGS, tiny_benchmark, tiny_strategy
from tests.store.old_runs import make


def kept(strategy: ExpertGateStrategy) -> list[EvaluationRecord]:
    found = read_all(Storage(strategy.run_dir or ""))
    assert found.errors == {}
    return [record for record in found.records.values() if isinstance(record, EvaluationRecord)]


def trained(storage: Path | None = None, **settings: Any) -> ExpertGateStrategy:
    cluster = ClusterConfig(engine="inline", storage=None if storage is None else str(storage))
    strategy = tiny_strategy(cluster, **SETTINGS, **settings)
    strategy.train(tiny_benchmark((0, 1, 0)).train_stream)
    return strategy


def test_each_evaluation_is_a_file_of_its_own_with_the_figures_of_the_metrics(tmp_path: Path) -> None:
    began = datetime.now(UTC) - timedelta(seconds=1)
    with trained(tmp_path / "run") as strategy:
        stream = tiny_benchmark((0, 1, 0)).test_stream
        metrics = strategy.eval(stream)
        strategy.eval(stream)
        first, second = kept(strategy)
    assert [path.name for path in sorted((tmp_path / "run/evaluations").iterdir())] == ["00000.json", "00001.json"]
    assert replace(second, number=0, finished=first.finished) == first
    assert began <= datetime.fromisoformat(first.finished) <= datetime.now(UTC)
    assert (first.seed, first.tasks) == (0, (0, 1, 2))
    for place, experience in enumerate(first.experiences):
        tail = f"_Exp/eval_phase/test_stream/Task{place:03d}/Exp{place:03d}"
        assert (experience.index, experience.stream, experience.labels) == (place, "test", (place,))
        assert experience.num_samples == 24
        assert experience.gate_accuracy == pytest.approx(metrics["Gate_Acc" + tail])
        assert experience.expert_accuracy == pytest.approx(metrics["Expert_Acc" + tail])
        assert experience.end_to_end_accuracy == pytest.approx(metrics["EndToEnd_Acc" + tail])
        assert experience.unknown_share is not None
        right = sum(route.num_samples for route in first.routes if route.right == route.chosen == place)
        assert right == round(24 * experience.gate_accuracy)
    assert sum(route.num_samples for route in first.routes) == 3 * 24
    assert verify(Storage(str(tmp_path / "run"))).damages == ()


def test_one_who_puts_the_metrics_into_the_evaluator_gets_the_same_record() -> None:
    from avalanche.training.plugins import EvaluationPlugin

    records = []
    for evaluator in (EvaluationPlugin(loggers=[]), EvaluationPlugin(*gate_metrics(), loggers=[])):
        with trained(evaluator=evaluator) as strategy:
            strategy.eval(tiny_benchmark((0, 1, 0)).test_stream)
            records.append(replace(kept(strategy)[0], finished=""))
    assert records[0] == records[1]


def test_samples_of_no_trained_task_and_answers_of_nobody() -> None:
    with trained(unknown="abstain", unknown_quantile=0.5) as strategy:
        strategy.eval(tiny_benchmark((0, 1, 0, 5)).test_stream[3])
        (record,) = kept(strategy)
    assert [experience.labels for experience in record.experiences] == [(3,)]
    assert {route.right for route in record.routes} == {-1}
    unanswered = sum(route.num_samples for route in record.routes if route.chosen == -1)
    assert record.experiences[0].unknown_share == unanswered / 24 > 0


def test_an_evaluation_that_is_cut_off_is_not_kept_and_the_next_one_is() -> None:
    with trained() as strategy:
        stream = tiny_benchmark((0, 1, 0)).test_stream
        plugins = list(strategy.plugins)
        unfit = [stream[0], object()]
        with pytest.raises(Exception, match=r"."):
            strategy.eval(unfit)
        assert kept(strategy) == []
        strategy.eval(stream)
        assert len(kept(strategy)) == 1
        assert strategy.plugins == plugins


def test_figures_come_back_where_the_run_cannot_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(storage: Storage, path: str, data: bytes) -> bool:
        raise StorageError(f"The storage {storage.shown!r} cannot be written at {path!r}: it is read-only.")

    with trained(tmp_path / "run") as strategy, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(Storage, "create", refuse)
        metrics = strategy.eval(tiny_benchmark((0, 1, 0)).test_stream)
        monkeypatch.undo()
        assert any(name.startswith("EndToEnd_Acc_Stream") for name in metrics)
        assert "does not keep this evaluation" in caplog.text
        assert "read-only" in caplog.text
        assert kept(strategy) == []


def test_a_driver_that_was_superseded_writes_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with trained(tmp_path / "run") as strategy:
        session = tmp_path / "run/sessions/00002.json"
        session.write_bytes((tmp_path / "run/sessions/00001.json").read_bytes())
        strategy.eval(tiny_benchmark((0, 1, 0)).test_stream)
        assert kept(strategy) == []
        assert "taken over" in caplog.text
        session.unlink()


def test_gc_leaves_evaluations_and_verify_finds_a_flipped_byte(tmp_path: Path) -> None:
    with trained(tmp_path / "run") as strategy:
        strategy.eval(tiny_benchmark((0, 1, 0)).test_stream)
    storage, file = Storage(str(tmp_path / "run")), tmp_path / "run/evaluations/00000.json"
    collect(storage)
    before = verify(storage)
    assert before.damages == ()
    assert "evaluations/00000.json" not in before.unchecked
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"num_samples": 24', b'"num_samples": 25', 1))
    (damage,) = verify(storage).damages
    assert damage.path == "evaluations/00000.json"
    assert "measure again" in damage.problem
    assert list(read_all(storage).errors) == [damage.path]
    # What is damaged keeps its number: nothing is overwritten.
    with tiny_strategy(ClusterConfig(engine="inline", storage=storage.uri, resume="append"), **SETTINGS) as strategy:
        strategy.eval(tiny_benchmark((0, 1, 0)).test_stream)
    assert (tmp_path / "run/evaluations/00001.json").is_file()


def test_a_run_of_an_earlier_version_keeps_evaluations_and_knows_no_strangers(tmp_path: Path) -> None:
    run = Path(shutil.copytree(Path(make.__file__).parent / "finished", tmp_path / "run"))
    with make.strategy_in(run) as strategy:
        strategy.eval(make.benchmark("finished").train_stream)
        (record,) = kept(strategy)
    assert [experience.stream for experience in record.experiences] == ["train"] * len(record.experiences)
    assert {experience.unknown_share for experience in record.experiences} == {None}
    assert verify(Storage(str(run))).damages == ()


def test_stages_say_when_they_began(tmp_path: Path) -> None:
    began_s = datetime.now(UTC).timestamp()
    with trained(tmp_path / "run") as strategy:
        timings = strategy._driver.registry.timings
    starts = [stage.started_s for task in sorted(timings) for stage in timings[task].stages]
    assert len(starts) == 12
    assert all(start is not None and began_s - 1 <= start <= datetime.now(UTC).timestamp() for start in starts)
