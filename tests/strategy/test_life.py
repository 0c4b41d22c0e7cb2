"""One task's life: retired and restored, updated with new data; its files until they are swept."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.config import Resume
from distributed_eg.errors import InputError, StorageError
from distributed_eg.store import records
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.verification import collect, unnamed, verify
from tests.helpers import SETTINGS, content, hashes, tiny_benchmark, tiny_net, tiny_strategy
from tests.inside import registry_of
from tests.strategy.test_repeats import STEPS, stream


def opened(storage: Path, resume: Resume = "append", **settings: Any) -> ExpertGateStrategy:
    """A strategy of a process of its own."""
    cluster = ClusterConfig(engine="inline", storage=str(storage), resume=resume)
    return tiny_strategy(**{"cluster": cluster, **SETTINGS, **settings})


def images_of(domain: int) -> torch.Tensor:
    """Test images of a domain."""
    dataset = tiny_benchmark((domain,)).test_stream[0].dataset
    return torch.stack([dataset[i][0] for i in range(12)])


def test_the_gate_forgets_a_task_and_knows_it_again(tmp_path: Path) -> None:
    benchmark = tiny_benchmark((0, 1, 2))
    with opened(tmp_path / "run") as strategy:
        strategy.train(benchmark.train_stream)
        before = strategy.model(images_of(1))
        assert set(strategy.model.gate(images_of(1)).tasks.tolist()) == {1}
        strategy.retire(1)
        for _ in range(2):  # in this process and, without training, in the next one
            assert 1 not in strategy.model.gate(images_of(1)).tasks.tolist()
            metrics = strategy.eval(benchmark.test_stream)
            assert metrics["EndToEnd_Acc_Exp/eval_phase/test_stream/Task001/Exp001"] == 0
            assert metrics["EndToEnd_Acc_Exp/eval_phase/test_stream/Task002/Exp002"] > 0.9
            strategy.close()
            strategy = opened(tmp_path / "run")
            strategy.eval(benchmark.test_stream)
        loaded = ExpertGate.load(tmp_path / "run", arch=tiny_net())
        assert 1 not in loaded.gate(images_of(1)).tasks.tolist()
        strategy.restore(1)
        assert torch.equal(strategy.model(images_of(1)), before)
        strategy.close()
    assert verify(Storage(str(tmp_path / "run"))).damages == ()


def test_tasks_that_come_meanwhile_do_not_know_it(tmp_path: Path) -> None:
    """And the same stream with the same changes, brought again, leaves everything as it is."""
    experiences = list(tiny_benchmark((0, 1, 0, 0)).train_stream)
    for _ in range(2):
        with opened(tmp_path / "run", resume=True) as strategy:
            strategy.train(experiences[:2])
            strategy.retire(0)
            strategy.train(experiences[2:3])
            strategy.restore(0)
            strategy.train(experiences[3:])
            rows = strategy.relatedness.to_pylist()
            left = content(tmp_path / "run")
            assert [row["candidate"] for row in rows if row["task"] == 2] == [1]
            assert [row["candidate"] for row in rows if row["task"] == 3] == [0, 1, 2]
    assert content(tmp_path / "run") == left


def test_a_task_that_is_damaged_is_made_again_as_it_was(tmp_path: Path) -> None:
    """What it had to choose from does not depend on what was retired since."""
    experiences = list(tiny_benchmark((0, 1, 0)).train_stream)
    with opened(tmp_path / "run") as strategy:
        strategy.train(experiences)
        strategy.retire(0)
    before = content(tmp_path / "run")
    for name in ("autoencoder", "relatedness", "manifest"):
        (tmp_path / f"run/tasks/00002/{name}.json").unlink()
    with opened(tmp_path / "run", resume=True) as strategy:
        strategy.train(experiences)
    assert content(tmp_path / "run") == before


def test_sweeping_removes_its_weights_for_good(tmp_path: Path) -> None:
    """Children keep their experts, and nothing misses what is gone."""
    benchmark = tiny_benchmark((0, 0, 1))
    with opened(tmp_path / "run") as strategy:
        strategy.train(benchmark.train_stream)
        assert registry_of(strategy).manifests[1].parent == 0
        strategy.retire(0)
    storage = Storage(str(tmp_path / "run"))
    weights = {str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run/tasks/00000").glob("*.safetensors")}
    assert weights == set(unnamed(storage)) == set(collect(storage, dry_run=True)) == set(collect(storage))
    assert len(weights) == 3  # autoencoder, what was held out, expert
    assert verify(storage).damages == ()
    assert collect(storage) == {}
    with opened(tmp_path / "run") as strategy:
        assert strategy.eval(benchmark.test_stream)["Expert_Acc_Exp/eval_phase/test_stream/Task001/Exp001"] > 0.5
        with pytest.raises(InputError, match=r"cannot be restored: .* removed its weights"):
            strategy.restore(0)
        strategy.train(tiny_benchmark((0, 0, 1, 2)).train_stream[3])
    with opened(tmp_path / "run", resume=True) as strategy:
        strategy.train(tiny_benchmark((0, 0, 1, 2)).train_stream)  # kept, and not made again
    assert verify(storage).damages == ()
    assert not list((tmp_path / "run/tasks/00000").glob("*.safetensors"))


def test_an_update_is_the_next_version(tmp_path: Path) -> None:
    """As a label that comes again in the stream is."""
    experiences = list(stream(*STEPS).train_stream)
    cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "one"))
    with tiny_strategy(cluster=cluster, **SETTINGS) as strategy:
        strategy.train(experiences)
    with opened(tmp_path / "two") as strategy:
        strategy.train(experiences[:2])
    with opened(tmp_path / "two") as strategy:
        strategy.update(experiences[2])
        assert registry_of(strategy).newest[0].versions == (0, 2)
        strategy.train(experiences[3])
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    experiences = list(tiny_benchmark((0, 1, 2)).train_stream)
    with opened(tmp_path / "run") as strategy:
        with pytest.raises(StorageError, match="no run at"):
            strategy.retire(0)
        strategy.train(experiences[:2])
        before = content(tmp_path / "run")
        for change in (strategy.retire, strategy.restore):
            with pytest.raises(
                InputError, match=re.escape("No finished task has the label 7; those that are finished have 0, 1.")
            ):
                change(7)
        with pytest.raises(InputError, match="label is 'cats'"):
            strategy.retire("cats")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="No finished task has the label 2"):
            strategy.update(experiences[2])
        assert content(tmp_path / "run") == before
        strategy.retire(0)
        strategy.retire(0)
        for bring in (strategy.update, strategy.train):
            with pytest.raises(InputError, match=re.escape("strategy.restore(0) comes before")):
                bring(experiences[0])
        strategy.retire(1)
        with pytest.raises(StorageError, match=r"Every finished task .* is retired"):
            strategy.eval(experiences[0])
        with pytest.raises(InputError, match="Every task is retired"):
            strategy.model(images_of(0))
        strategy.restore(0)
        strategy.restore(0)
        assert len(hashes(strategy)) == 2
    with pytest.raises(InputError, match="closed"):
        strategy.retire(0)


def test_without_a_storage_it_works_too() -> None:
    with tiny_strategy() as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
        strategy.retire(0)
        assert set(strategy.model.gate(images_of(0)).tasks.tolist()) == {1}


class Killed(BaseException):
    """Ends a call where it stands."""


def life(storage: Path) -> list[Any]:
    """The calls of a run's life after its first two tasks, each in a process of its own, in their order."""
    stream_of = list(tiny_benchmark((0, 1, 2, 0)).train_stream)
    more = tiny_benchmark((0, 1), train=40).train_stream[1]

    def call(use: Any) -> Any:
        def of_process() -> None:
            with opened(storage) as strategy:
                use(strategy)

        return of_process

    return [
        call(lambda strategy: strategy.train(stream_of[2])),
        call(lambda strategy: strategy.retire(2)),
        call(lambda strategy: strategy.update(more)),
        call(lambda strategy: strategy.train(stream_of[3])),
        call(lambda strategy: strategy.restore(2)),
    ]


def begun(storage: Path) -> None:
    """A run of two tasks."""
    with opened(storage) as strategy:
        strategy.train(tiny_benchmark((0, 1, 2, 0)).train_stream[:2])


def live(storage: Path, number: int) -> None:
    """One call of a run's life."""
    life(storage)[number]()


def test_ended_at_every_seal_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an append, a retire, an update: before a record is sealed and after it."""
    begun(tmp_path / "undisturbed")
    for call in life(tmp_path / "undisturbed"):
        call()
    begun(tmp_path / "run")
    seal, countdown, points = records.seal, [-1], 0

    def sealing(storage: Storage, record: records.Record) -> Artifact:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed
        sealed = seal(storage, record)
        if isinstance(
            record, records.StreamRecord
        ):  # with this the call has ended, and to give it again is another one
            return sealed
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed
        return sealed

    monkeypatch.setattr(records, "seal", sealing)
    for number, call in enumerate(life(tmp_path / "run")):
        shutil.copytree(tmp_path / "run", tmp_path / "before")
        call()
        for point in range(1, 100):
            shutil.copytree(tmp_path / "before", tmp_path / "tried")
            tried = life(tmp_path / "tried")[number]
            countdown[0] = point
            is_killed = _is_killed(tried)
            countdown[0] = -1
            if is_killed:
                points += 1
                assert verify(Storage(str(tmp_path / "tried"))).damages == (), (number, point)
                tried()
            assert content(tmp_path / "tried") == content(tmp_path / "run"), (number, point)
            shutil.rmtree(tmp_path / "tried")
            if not is_killed:
                break
        shutil.rmtree(tmp_path / "before")
    assert points > 20
    assert content(tmp_path / "run") == content(tmp_path / "undisturbed")


def _is_killed(call: Any) -> bool:
    try:
        call()
    except Killed:
        return True
    return False
