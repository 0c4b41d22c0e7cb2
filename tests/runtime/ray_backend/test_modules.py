"""Modules of a user's own on Ray: those that the driver's script finds are found here, and others are named."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset

from distributed_eg import ClusterConfig, ExpertGate
from distributed_eg.errors import InputError
from tests.helpers import SHAPE, task_images, tiny_strategy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

CODE = """
from avalanche.core import SupervisedPlugin
from torch import nn
from torch.utils.data import TensorDataset

class Images(TensorDataset):
    pass

class Net(nn.Sequential):
    pass

class Plugin(SupervisedPlugin):
    pass

def net():
    return Net(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 7))
"""


def train(module: ModuleType) -> int:
    """One task with what the module defines; how many were trained."""
    images, targets = task_images(0, 30, 1)
    leaf = module.Images(images, targets)
    leaf.targets = targets.tolist()
    benchmark = task_incremental_benchmark(benchmark_from_datasets(train=[as_classification_dataset(leaf)]))
    model = ExpertGate(SHAPE, arch=module.net(), autoencoder="linear")
    settings = {"model": model, "plugins": [module.Plugin()], "train_epochs": 1}
    with tiny_strategy(ClusterConfig(num_workers=1), **settings) as strategy:
        strategy.train(benchmark.train_stream)
        return strategy.registry.num_rows


def test_modules_that_the_script_finds_are_found_by_workers_and_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by ``sys.path.insert`` with a relative folder; the other one is known to the driver alone, and no worker can
    be made: that is said once."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "found_in_lib.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["lib", *sys.path])
    found = importlib.import_module("found_in_lib")
    assert train(found) == 1

    spec = importlib.util.spec_from_loader("here_only", None)
    assert spec is not None
    here_only = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "here_only", here_only)
    exec(CODE, vars(here_only))
    with pytest.raises(InputError, match=r"^The backbone cannot be made .*No module named 'here_only'.*on all nodes"):
        train(here_only)
