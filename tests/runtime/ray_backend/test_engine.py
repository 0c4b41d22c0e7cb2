"""The Ray engine: isolation between workers. Lost ones are in tests/faults."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import pytest
import ray
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from torch.utils.data import Dataset, Subset

from distributed_eg import ClusterConfig
from distributed_eg.errors import InputError
from distributed_eg.runtime.ray_backend.actors import _LEFT_ALONE, _assigned_device
from distributed_eg.runtime.ray_backend.engine import RayEngine, _Worker
from distributed_eg.schedule.events import WorkerJoined
from tests.helpers import INLINE, hashes, task_images, tiny_benchmark, tiny_strategy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class InPlace(Dataset[Any]):
    """Its transform works in place on the stored images, as ``Normalize(inplace=True)`` does: every read changes it."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self.images = images
        self.targets = targets.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index].mul_(0.9), self.targets[index]


def test_an_in_place_transform_on_one_worker_changes_nothing_on_another() -> None:
    """Four tasks view one leaf; whoever reads first, wherever, every stage sees the original pixels."""
    images, targets = task_images(0, 240, 1, num_classes=4)

    def benchmark(leaf: InPlace) -> Any:
        parts = []
        for task in range(4):
            view = Subset(leaf, list(range(task, 240, 4)))
            view.targets = [leaf.targets[i] for i in view.indices]  # type: ignore[attr-defined]
            parts.append(as_classification_dataset(view))
        return task_incremental_benchmark(benchmark_from_datasets(train=parts))

    results = []
    for cluster in (INLINE, ClusterConfig(num_workers=2)):
        leaf = InPlace(images.clone(), targets)
        with tiny_strategy(cluster, validation_fraction=0.2) as strategy:
            strategy.train(benchmark(leaf).train_stream)
            results.append(hashes(strategy))
        assert torch.equal(leaf.images, images)
    assert results[0] == results[1]


def test_a_worker_on_another_kind_of_processor_gets_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By made-up reports: bytes of a T4 among those of an H100 would be wrong without a word."""
    told = {0: "NVIDIA H100 (9.0)", 1: "Tesla T4 (7.5)", 2: "NVIDIA H100 (9.0)"}
    engine = RayEngine(ClusterConfig(num_workers=3), "", "made-up", 1)
    monkeypatch.setattr(ray, "get", lambda number: (f"node {number}", 1, told[number]))
    reports = []
    for number in told:
        worker = _Worker(f"worker-{number}", None, number, 0.0)
        engine._starting[worker.name] = worker
        reports += engine._started(worker)
    joined = [WorkerJoined(f"worker-{number}", f"node {number}", told[number]) for number in (0, 2)]
    assert reports == engine.workers() == joined
    assert engine.num_workers() == 3, "its place is taken, so that no other one comes up there"
    assert "worker-1 computes on another kind of processor (Tesla T4 (7.5))" in caplog.text


def test_where_ray_was_told_to_hide_no_gpu_a_worker_takes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all workers of a node would compute on its first card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [1])
    monkeypatch.delenv(_LEFT_ALONE, raising=False)
    assert _assigned_device(None) == "cuda:0"
    monkeypatch.setenv(_LEFT_ALONE, "1")
    assert _assigned_device(None) == "cuda:1"


def test_a_gpu_that_torch_does_not_see_is_refused_where_it_was_asked_for() -> None:
    """Ray has two here, by declaration: without ``device=`` workers say that they compute on the CPU, and do."""
    stream = tiny_benchmark((0,)).train_stream
    with tiny_strategy(ClusterConfig(num_workers=1, gpus_per_worker=0.5)) as strategy:
        strategy.train(stream)
    with tiny_strategy(ClusterConfig(num_workers=1), device="cuda") as strategy:
        with pytest.raises(InputError, match=r"device='cuda' was asked for, but torch .* finds no GPU on this node"):
            strategy.train(stream)
