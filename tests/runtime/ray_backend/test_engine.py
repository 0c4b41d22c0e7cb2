"""The Ray engine: isolation between workers. Lost ones are in tests/faults."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from torch.utils.data import Dataset, Subset

from distributed_eg import ClusterConfig
from tests.helpers import INLINE, hashes, task_images, tiny_strategy

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
