"""A strategy that is copied, pickled or checkpointed: a reference to its run, with which it goes on."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import dill
import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint

from distributed_eg import ClusterConfig, ExpertGateStrategy
from distributed_eg.errors import RunInUseError, StorageError
from tests.helpers import SETTINGS, content, hashes, tiny_benchmark, tiny_strategy

BENCHMARK = tiny_benchmark((0, 1, 0))


def opened(storage: Path | None, **settings: Any) -> ExpertGateStrategy:
    """A strategy before training."""
    return tiny_strategy(**{"cluster": ClusterConfig(engine="inline", storage=storage), **SETTINGS, **settings})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three tasks leave in one process."""
    storage = tmp_path_factory.mktemp("undisturbed") / "run"
    with opened(storage) as strategy:
        strategy.train(BENCHMARK.train_stream)
    return storage


@pytest.mark.parametrize("num_before", [0, 1, 3])
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_the_copy_goes_on_to_the_same_bytes(way: str, num_before: int, undisturbed: Path, tmp_path: Path) -> None:
    storage = tmp_path / "run"
    with opened(storage) as strategy:
        for experience in BENCHMARK.train_stream[:num_before]:
            strategy.train(experience)
        kept = pickle.dumps(strategy)
        other = pickle.loads(kept) if way == "pickle" else copy.deepcopy(strategy)
        if num_before:
            assert hashes(other) == hashes(strategy)
            assert other.run_dir == strategy.run_dir
            images = torch.stack([BENCHMARK.test_stream[0].dataset[i][0] for i in range(5)])
            assert torch.equal(other.model(images), strategy.model(images))
    size_of_expert = sum(tensor.nbytes for tensor in strategy.model.expert.state_dict().values())
    assert len(kept) < 3 * size_of_expert + 200_000  # and no experts in it
    with other:
        for experience in BENCHMARK.train_stream[num_before:]:
            other.train(experience)
        assert "EndToEnd_Acc_Exp/eval_phase/test_stream/Task001/Exp001" in other.eval(BENCHMARK.test_stream)
    assert content(storage) == content(undisturbed)


class Copying:
    """An observer that pickles the strategy in mid-training; its own pickle is empty."""

    def __init__(self) -> None:
        self.strategy: ExpertGateStrategy | None = None
        self.copies: list[bytes] = []

    def __call__(self, progress: object) -> None:
        self.copies.append(pickle.dumps(self.strategy))

    def __reduce__(self) -> Any:
        return Copying, ()


def test_a_copy_from_inside_training(undisturbed: Path, tmp_path: Path) -> None:
    observer = Copying()
    with opened(tmp_path / "run", observer=observer) as strategy:
        observer.strategy = strategy
        strategy.train(BENCHMARK.train_stream[:2])
    other = pickle.loads(observer.copies[len(observer.copies) // 2])
    other._driver.observer = None
    with other:
        other.train(BENCHMARK.train_stream[2])
    assert content(tmp_path / "run") == content(undisturbed)


def test_two_that_train_at_once_are_one_too_many(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as strategy:
        strategy.train(BENCHMARK.train_stream[0])
        other = copy.deepcopy(strategy)
        with pytest.raises(RunInUseError):
            other.train(BENCHMARK.train_stream[1])
    other.train(BENCHMARK.train_stream[1])
    other.close()
    assert len(hashes(other)) == 2


def test_avalanche_s_own_checkpoints(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its documented loop, in processes that end after each experience."""
    # By itself dill writes torch's optimizer classes out in full, which fails by some of what they refer to, whoever's
    # strategy it is.
    monkeypatch.setitem(dill.settings, "byref", True)
    storage, file = tmp_path / "run", tmp_path / "checkpoint.pkl"
    for k, experience in enumerate(BENCHMARK.train_stream):
        strategy, first = maybe_load_checkpoint(opened(storage), file)
        assert first == k
        with strategy:
            strategy.train(experience)
            save_checkpoint(strategy, file)
    assert content(storage) == content(undisturbed)


def test_a_run_without_a_storage_predicts_from_memory_and_trains_no_further(tmp_path: Path) -> None:
    strategy = opened(None)
    strategy.train(BENCHMARK.train_stream[0])
    images = torch.stack([BENCHMARK.test_stream[0].dataset[i][0] for i in range(5)])
    expected, kept, folder = strategy.model(images), pickle.dumps(strategy), Path(str(strategy.run_dir))
    strategy.close()
    del strategy
    for file in sorted(folder.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    other = pickle.loads(kept)
    assert torch.equal(other.model(images), expected)
    with pytest.raises(StorageError, match="is gone, to which this strategy"):
        other.train(BENCHMARK.train_stream[1])


def test_a_run_that_is_gone_is_said_when_it_is_unpickled(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as strategy:
        strategy.train(BENCHMARK.train_stream[0])
        kept = pickle.dumps(strategy)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(StorageError, match="is gone, to which this strategy"):
        pickle.loads(kept)
    assert not (tmp_path / "run").exists()
