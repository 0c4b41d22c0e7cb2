"""The Ray engine: isolation between workers, a killed worker, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from torch.utils.data import Dataset, Subset

from distributed_eg import ClusterConfig
from tests.helpers import DOMAINS, INLINE, SETTINGS, hashes, outcome, task_images, tiny_benchmark, tiny_strategy

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


class DiesOnce(SupervisedPlugin):
    """Kills its worker process in the middle of task 1's training, the first time."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """The hook that kills."""
        if strategy.experience.task_label == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), 9)


def test_a_worker_that_is_killed_is_replaced_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    benchmark = tiny_benchmark(DOMAINS)
    with tiny_strategy(INLINE, **SETTINGS) as strategy:
        strategy.train(benchmark.train_stream)
        expected = outcome(strategy, {})
    marker = tmp_path / "died"
    with tiny_strategy(ClusterConfig(num_workers=2), plugins=[DiesOnce(marker)], **SETTINGS) as strategy:
        strategy.train(benchmark.train_stream)
        assert marker.exists()
        assert outcome(strategy, {}) == expected


_SCRIPT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
os.environ.pop("RAY_ADDRESS", None)
import cloudpickle, psutil
from tests import helpers
cloudpickle.register_pickle_by_value(helpers)
from distributed_eg import ClusterConfig

strategy = helpers.tiny_strategy(ClusterConfig(num_workers=1, scratch=sys.argv[2]))
strategy.train(helpers.tiny_benchmark((0, 1)).train_stream)
children = psutil.Process().children(recursive=True)
pids = [child.pid for child in children]
strategy.close()
psutil.wait_procs(children, timeout=20)
print(json.dumps({
    "before": len(pids),
    "after": [c.name() for c in psutil.Process().children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE],
    "rows": strategy.registry.num_rows,
    "scratch": os.listdir(sys.argv[2]),
}))
"""


def test_close_ends_the_ray_that_was_started_and_leaves_nothing(tmp_path: Path) -> None:
    """A driver of its own, without a cluster: Ray starts for it and is gone after close()."""
    repository = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(repository), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["before"] > 0
    assert answer == {"before": answer["before"], "after": [], "rows": 2, "scratch": []}
