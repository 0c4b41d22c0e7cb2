"""After something went wrong: nothing half-done is used, nothing is left in the way, and what was done is kept."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch.utils.data import Dataset

from distributed_eg import ClusterConfig, gate_metrics
from distributed_eg.errors import InputError
from distributed_eg.runtime.messages import AutoencoderRequest, Done, FeaturesRequest
from distributed_eg.store.records import AutoencoderRecord
from tests.helpers import SHAPE, hashes, tiny_benchmark, tiny_strategy
from tests.inside import engine_of, registry_of, task_input, worker_of


def test_a_closed_strategy_refuses_to_train_and_to_evaluate() -> None:
    benchmark = tiny_benchmark((0,))
    with tiny_strategy() as strategy:
        strategy.train(benchmark.train_stream)
    with pytest.raises(InputError, match="was closed"):
        strategy.eval(benchmark.test_stream)
    with pytest.raises(InputError, match="was closed"):
        strategy.train(benchmark.train_stream)
    assert strategy.registry.num_rows == 1


def test_a_reference_that_cannot_be_used_is_never_left_out_silently(tmp_path: Path) -> None:
    """The second call fails as the first did; with a good reference the same storage can be used."""
    cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"))
    benchmark = tiny_benchmark((0,))
    with tiny_strategy(cluster, reference=tmp_path / "missing.safetensors") as strategy:
        for _ in range(2):
            with pytest.raises(InputError, match="cannot be read"):
                strategy.train(benchmark.train_stream)
    reference = tiny_benchmark((5,)).train_stream[0].dataset
    with tiny_strategy(cluster, reference=reference) as strategy:
        strategy.train(benchmark.train_stream)
        assert strategy.relatedness["candidate"].to_pylist() == [None]


def test_refused_plugins_leave_the_storage_usable(tmp_path: Path) -> None:
    import threading

    from avalanche.core import SupervisedPlugin

    cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"))
    plugin = SupervisedPlugin()
    plugin.guard = threading.Lock()  # type: ignore[attr-defined]
    benchmark = tiny_benchmark((0,))
    with tiny_strategy(cluster, plugins=[plugin]) as strategy, pytest.raises(InputError, match="guard"):
        strategy.train(benchmark.train_stream)
    with tiny_strategy(cluster) as strategy:
        strategy.train(benchmark.train_stream)
        assert strategy.registry.num_rows == 1


def test_a_stream_that_raises_keeps_what_came_before(tmp_path: Path) -> None:
    """Metrics are replayed and tables exported for the tasks before the mistake."""
    benchmark = tiny_benchmark((0, 1))

    def stream() -> Iterator[Any]:
        yield from benchmark.train_stream
        raise OSError("the stream broke")

    evaluator = EvaluationPlugin(accuracy_metrics(epoch=True), loggers=[])
    cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"))
    with tiny_strategy(cluster, evaluator=evaluator) as strategy:
        with pytest.raises(OSError, match="the stream broke"):
            strategy.train(stream())
        assert strategy.registry.num_rows == 2
        assert "Top1_Acc_Epoch/train_phase/train_stream/Task001" in evaluator.get_last_metrics()
        assert (tmp_path / "run" / "tables" / "registry.parquet").is_file()
        strategy.eval(benchmark.test_stream)


def test_an_eval_that_raised_leaves_no_dataset_in_the_strategy() -> None:
    class Broken(Exception):
        """A user's mistake."""

    benchmark = tiny_benchmark((0, 1))
    with tiny_strategy() as strategy:
        strategy.train(benchmark.train_stream[0])

        def broken(*_: Any, **__: Any) -> None:
            raise Broken

        strategy.evaluator.before_eval_exp = broken  # type: ignore[attr-defined]
        with pytest.raises(Broken):
            strategy.eval(benchmark.test_stream)
        del strategy.evaluator.before_eval_exp  # type: ignore[attr-defined]
        assert strategy.experience is None
        assert strategy.adapted_dataset is None
        strategy.train(benchmark.train_stream[1])
        assert strategy.registry.num_rows == 2


@pytest.mark.parametrize("settings", [{"stream": False}, {"experience": False}, {}])
def test_own_metrics_are_complete_and_single_beside_any_of_the_users(settings: dict[str, bool]) -> None:
    evaluator = EvaluationPlugin(gate_metrics(**settings), loggers=[])
    benchmark = tiny_benchmark((0, 1))
    with tiny_strategy(evaluator=evaluator) as strategy:
        strategy.train(benchmark.train_stream)
        metrics = strategy.eval(benchmark.test_stream)
    for quantity in ("Gate_Acc", "Expert_Acc", "EndToEnd_Acc"):
        assert f"{quantity}_Stream/eval_phase/test_stream/Task001" in metrics
        assert f"{quantity}_Exp/eval_phase/test_stream/Task000/Exp000" in metrics
    assert all(len(positions) == 1 for positions, _ in evaluator.get_all_metrics().values())


class Jitters(Dataset[Any]):
    """Draws at random whenever it is read, by both of the generators that datasets use."""

    def __init__(self, domain: int) -> None:
        self.images = torch.rand((60, *SHAPE), generator=torch.Generator().manual_seed(domain))
        self.targets = [i % 2 for i in range(60)]

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index] + torch.rand(1) + random.random(), self.targets[index]


def jittering() -> Any:
    """A benchmark over datasets that draw at random."""
    parts = {name: [as_classification_dataset(Jitters(task)) for task in range(2)] for name in ("train", "test")}
    return task_incremental_benchmark(benchmark_from_datasets(**parts))


def test_features_of_a_random_dataset_are_extracted_again_bit_for_bit() -> None:
    """On another node an autoencoder's stage extracts them itself: the same file, the same autoencoder."""
    experience = jittering().train_stream[0]
    with tiny_strategy() as strategy:
        strategy.train(tiny_benchmark((5,)).train_stream)
        worker, statistics = worker_of(strategy), registry_of(strategy).statistics
        assert statistics is not None
        artifacts = []
        for key, extracted_before in (("here", True), ("there", False)):
            task = task_input(strategy, experience, 7, key=key)
            if extracted_before:
                assert isinstance(worker.run(FeaturesRequest(task, False)), Done)
            done = worker.run(AutoencoderRequest(task, statistics))
            assert isinstance(done, Done)
            assert isinstance(done.result, AutoencoderRecord)
            artifacts.append(done.result.artifact)
    assert artifacts[0] == artifacts[1]


def test_how_an_evaluation_is_cut_into_requests_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with one worker and with three: each batch of a random dataset draws the same."""
    benchmark = jittering()
    results = []
    with tiny_strategy(train_epochs=0) as strategy:
        strategy.train(benchmark.train_stream)
        engine = engine_of(strategy)
        workers = engine.workers()
        for count in (1, 3):
            monkeypatch.setattr(engine, "workers", lambda count=count: workers * count)
            results.append(strategy.eval(benchmark.test_stream[0]))
            monkeypatch.undo()
    assert results[0] == results[1]


def test_a_number_that_is_used_again_never_meets_old_features() -> None:
    """NaN in the validation part only: the training part's features were written, then the task failed."""
    good = tiny_benchmark((0,)).train_stream
    with tiny_strategy() as strategy:
        strategy.train(good)
        images = torch.rand((40, *SHAPE))
        bad = tiny_benchmark((1,), train=40)
        with tiny_strategy() as undisturbed:
            undisturbed.train([good[0], _relabelled(bad.train_stream[0])])
            expected = hashes(undisturbed)
        broken = _relabelled(_with_nan(images))
        with pytest.raises(InputError, match="NaN"):
            strategy.train(broken)
        strategy.train(_relabelled(bad.train_stream[0]))
        assert hashes(strategy) == expected


def _with_nan(images: torch.Tensor) -> Any:
    images[:, 0, 0, 0] = torch.nan
    from torch.utils.data import TensorDataset

    leaf = TensorDataset(images, torch.arange(len(images)) % 2)
    leaf.targets = (torch.arange(len(images)) % 2).tolist()  # type: ignore[attr-defined]
    return task_incremental_benchmark(benchmark_from_datasets(train=[as_classification_dataset(leaf)])).train_stream[0]


def _relabelled(experience: Any) -> Any:
    """The experience under the label 1."""
    experience.task_label = 1
    experience.task_labels = [1]
    return experience
