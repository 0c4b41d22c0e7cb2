"""What users' code raises fails its task alone, once, under its own name, and is never taken for a fault of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation import PluginMetric
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from distributed_eg import ClusterConfig, ExpertGateStrategy
from distributed_eg.errors import DamagedFileError, HookError, InputError, RunInUseError, StorageError, WorkerLostError
from tests.helpers import task_images, tiny_strategy

# Ray's workers cannot import a test module: its classes travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Silent(Exception):
    """Its text cannot be had, and nobody can pickle it."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)
        self.held = lambda: None

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Abort(BaseException):
    """No Exception."""


RAISED: list[Callable[[], BaseException]] = [
    lambda: KeyError("key"),
    lambda: FileNotFoundError("no such image"),
    lambda: ConnectionError("a server is gone"),
    lambda: MemoryError("none left"),
    lambda: RuntimeError("CUDA out of memory. Tried to allocate"),
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: StorageError("mine"),
    lambda: DamagedFileError("mine"),
    lambda: RunInUseError("mine"),
    lambda: WorkerLostError("mine"),
    lambda: InputError("mine"),
    lambda: StopIteration("mine"),
    lambda: SystemExit(3),
    lambda: Silent(1, 2),
    lambda: Abort("mine"),
    lambda: NotImplementedError(),
]
NAMES = {type(make()).__name__: make for make in RAISED}
raised = pytest.mark.parametrize("make", NAMES.values(), ids=NAMES.keys())
SEEN = {name: make for name, make in NAMES.items() if name != "StopIteration"}
"""What a loop over a loader does not take for its end."""


class Faulty:
    """Raises at its ``at``-th call in a process, and notes each time that a stage of a worker had it do so."""

    def __init__(self, make: Callable[[], BaseException], notes: Path, at: int = 1) -> None:
        self.make, self.notes, self.at, self.calls = make, notes, at, 0

    def __call__(self, value: Any = None) -> Any:
        self.calls += 1
        if self.calls < self.at:
            return value
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_code.co_name not in ("extract", "train_expert"):
            frame = frame.f_back
        with self.notes.open("a") as file:
            file.write("" if frame.f_back is None else "x")
        raise self.make()


class Broken(TensorDataset):
    """Row 17 is at fault."""

    faulty: Callable[[], Any]

    def __getitem__(self, index: int) -> Any:
        return self.faulty() if index == 17 else super().__getitem__(index)


def experience(cls: type[TensorDataset] = TensorDataset, train_transform: Any = None, **attributes: Any) -> Any:
    """One experience over a dataset of that class."""
    images, targets = task_images(0, 40, 1)
    leaf = cls(images, targets)
    leaf.__dict__ |= {"targets": targets.tolist(), **attributes}
    groups = {"train": (train_transform, None), "eval": (None, None)}
    return benchmark_from_datasets(train=[as_classification_dataset(leaf, transform_groups=groups)]).train_stream[0]


def fails_once(strategy: ExpertGateStrategy, one: Any, faulty: Faulty, where: str) -> None:
    """Training raises an error that names what was raised and where, after one attempt."""
    with pytest.raises(HookError) as caught:
        strategy.train(one)
    first = str(caught.value).splitlines()[0]
    assert "task 0 (label 0)" in first
    assert where in first
    assert f"{type(faulty.make()).__name__}:" in first
    assert faulty.notes.read_text() == "x"
    assert strategy.registry.num_rows == 0


class Hook(SupervisedPlugin):
    """Raises if the strategy says so."""

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """The hook that raises."""
        strategy.asked("plugin")


class Measure(PluginMetric[float]):
    """Raises if the strategy says so."""

    def reset(self) -> None:
        """Nothing to reset."""

    def result(self) -> float:
        """Nothing to tell."""
        return 0.0

    def after_training_iteration(self, strategy: Any) -> None:
        """The callback that raises."""
        strategy.asked("metric")

    def __str__(self) -> str:
        return "Measure"


class Asked(ExpertGateStrategy):
    """Raises in the place that it is told."""

    place = ""
    faulty: Faulty

    def asked(self, place: str) -> None:
        """Raise, if this is the place."""
        if place == self.place:
            self.faulty()

    def optimizer_step(self) -> None:
        """A step that may raise."""
        self.asked("optimizer")
        super().optimizer_step()

    def criterion(self) -> Tensor:
        """A criterion that may raise."""
        self.asked("criterion")
        return super().criterion()


@pytest.fixture(scope="module")
def strategy() -> Iterator[Asked]:
    """One strategy, which no error changes."""
    evaluator = EvaluationPlugin(Measure(), loggers=[])
    with tiny_strategy(train_epochs=1, cls=Asked, plugins=[Hook()], evaluator=evaluator) as made:
        yield made  # type: ignore[misc]
        made.place = ""  # type: ignore[attr-defined]
        made.train(experience())
        assert made.registry.num_rows == 1


@raised
def test_in_a_dataset(make: Callable[[], BaseException], strategy: Asked, tmp_path: Path) -> None:
    faulty = Faulty(make, tmp_path / "notes")
    fails_once(strategy, experience(Broken, faulty=faulty), faulty, "item 17 of Broken")


@pytest.mark.parametrize("make", SEEN.values(), ids=SEEN.keys())
def test_in_a_transform_in_training(make: Callable[[], BaseException], strategy: Asked, tmp_path: Path) -> None:
    faulty = Faulty(make, tmp_path / "notes", at=20)
    fails_once(strategy, experience(train_transform=faulty), faulty, "of TensorDataset")


@pytest.mark.parametrize("labels", [False, True])
def test_stop_iteration_in_a_transform_in_training(labels: bool, strategy: Asked, tmp_path: Path) -> None:
    """Python takes it for the end of the data: the expert would be trained on some of them."""
    faulty = Faulty(lambda: StopIteration("mine"), tmp_path / "notes", at=20)
    one = experience(train_transform=faulty)
    one = task_incremental_benchmark(benchmark_from_datasets(train=[one.dataset])).train_stream[0] if labels else one
    with pytest.raises(HookError, match=r"ended after 1 of 3 batches.*StopIteration"):
        strategy.train(one)


@raised
def test_in_a_collate_function(make: Callable[[], BaseException], strategy: Asked, tmp_path: Path) -> None:
    faulty = Faulty(make, tmp_path / "notes")

    def collate(items: Any) -> Any:
        return default_collate(faulty(items))

    fails_once(strategy, experience(collate_fn=collate), faulty, "in the collate function")


PLACES = {
    "plugin": "the plugin Hook in before_forward",
    "metric": "the metric Measure in after_training_iteration",
    "optimizer": "the optimizer's step",
    "criterion": "the criterion CrossEntropyLoss()",
}


@raised
@pytest.mark.parametrize(("place", "where"), PLACES.items(), ids=PLACES.keys())
def test_in_the_loop(
    make: Callable[[], BaseException], place: str, where: str, strategy: Asked, tmp_path: Path
) -> None:
    strategy.place, strategy.faulty = place, Faulty(make, tmp_path / "notes")
    fails_once(strategy, experience(), strategy.faulty, where)


def test_in_evaluation(tmp_path: Path) -> None:
    faulty = Faulty(lambda: StorageError("mine"), tmp_path / "notes")
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(experience())
        with pytest.raises(HookError, match=r"item 17 of Broken: StorageError: mine"):
            strategy.eval(experience(Broken, faulty=faulty))


def test_ctrl_c_is_no_error_of_a_task(strategy: Asked, tmp_path: Path) -> None:
    strategy.place, strategy.faulty = "plugin", Faulty(KeyboardInterrupt, tmp_path / "notes")
    with pytest.raises(KeyboardInterrupt):
        strategy.train(experience())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_under_ray(tmp_path: Path) -> None:
    """What would end a worker's process, or cannot leave it, is one more error of a task."""
    with tiny_strategy(ClusterConfig(num_workers=1, gpus_per_worker=0.5), train_epochs=1, cls=Asked) as strategy:
        for name in ("SystemExit", "Silent", "Abort", "StorageError"):
            faulty = Faulty(NAMES[name], tmp_path / name)
            strategy.place, strategy.faulty = "optimizer", faulty
            fails_once(strategy, experience(), faulty, PLACES["optimizer"])
