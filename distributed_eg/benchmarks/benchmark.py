"""What every benchmark is made of: the value that is handed out, its normalisation, and its sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from avalanche.benchmarks import CLExperience, CLScenario, CLStream, benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from torch.utils.data import Dataset

from distributed_eg import given
from distributed_eg.errors import InputError

IMAGENET_MEAN: tuple[float, float, float] = (0.485, 0.456, 0.406)  # red, green, blue; pixels in [0, 1]
IMAGENET_STD: tuple[float, float, float] = (0.229, 0.224, 0.225)


Scenario: TypeAlias = CLScenario[CLStream[CLExperience]]


@dataclass(frozen=True)
class Benchmark:
    """A sequence of classification tasks; experience k of each stream has task label k."""

    name: str
    scenario: Scenario
    """Has `train_stream` and `test_stream`."""
    task_names: tuple[str, ...]
    domains: tuple[str, ...]
    """The domain of each task: tasks of one domain look alike."""
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    num_classes: int
    """Class ids are 0 ... num_classes - 1 over all tasks; no two tasks share one."""


def task_incremental(train: Sequence[ClassificationDataset], test: Sequence[ClassificationDataset]) -> Scenario:
    """The scenario whose experience k holds `train[k]` and `test[k]` under task label k."""
    return task_incremental_benchmark(benchmark_from_datasets(train=train, test=test))


def labelled(
    dataset: Dataset[object],
    targets: Sequence[int],
    transform: Callable[..., object] | None = None,
    target_transform: Callable[..., object] | None = None,
) -> ClassificationDataset:
    """`dataset` as Avalanche's, with `targets` (dataset class ids); training and evaluation transform alike."""
    pair = (transform, target_transform)
    groups = None if pair == (None, None) else TransformGroups({"train": pair, "eval": pair})
    return ClassificationDataset(
        [dataset], transform_groups=groups, data_attributes=[DataAttribute(list(targets), "targets")]
    )


def images_per_class(option: str, per_task: int | Sequence[int], num_classes: Sequence[int]) -> list[int]:
    """How many images each class of task k gets, where task k has `num_classes[k]` classes.

    `option` names `per_task` in the error for a wrong one.
    """
    is_array = bool(getattr(per_task, "ndim", False))
    many: Any = per_task if is_array or isinstance(per_task, Sequence) else [per_task] * len(num_classes)
    sizes = [given.whole(size, option) for size in many]
    if len(sizes) != len(num_classes):
        raise InputError(f"{option} has {len(sizes)} numbers for {len(num_classes)} tasks: give one, or one a task.")
    for size, classes in zip(sizes, num_classes, strict=True):
        if size < classes:
            raise InputError(f"{option}={size} is too small for a task of {classes} classes: give one image a class.")
    return [size // classes for size, classes in zip(sizes, num_classes, strict=True)]
