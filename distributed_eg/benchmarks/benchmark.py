"""What every benchmark is made of: the value that is handed out, its images' transform, its sizes; and parts of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import add
from typing import Any, TypeAlias

from avalanche.benchmarks import CLExperience, CLScenario, CLStream, benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.scenarios import DatasetExperience, EagerCLStream
from avalanche.benchmarks.utils import ConstantSequence, DataAttribute, TaskLabels
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import v2

from distributed_eg import given
from distributed_eg.errors import InputError

IMAGENET_MEAN: tuple[float, float, float] = (0.485, 0.456, 0.406)  # red, green, blue; pixels in [0, 1]
IMAGENET_STD: tuple[float, float, float] = (0.229, 0.224, 0.225)


Scenario: TypeAlias = CLScenario[CLStream[CLExperience]]


@dataclass(frozen=True)
class Benchmark:
    """A sequence of classification tasks; experience k of each stream has the k-th label."""

    name: str
    scenario: Scenario
    """Has `train_stream` and `test_stream`."""
    task_names: tuple[str, ...]
    domains: tuple[str, ...]
    """The domain of each task: tasks of one domain look alike."""
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    class_names: Mapping[int, str | None]
    """By class id; no two tasks share one. None where only the datasets may know it."""
    transform: Callable[..., object] | None
    """Makes of an image file what the streams hold; None where only the datasets may know it."""
    labels: tuple[int, ...]
    """Task label of each task."""

    @property
    def num_classes(self) -> int:
        """Over all tasks."""
        return len(self.class_names)


_HIGHEST_ID = 2**31 - 1
"""Of labels and class ids."""


def part_of(benchmark: Benchmark, tasks: Sequence[int] | None, first_label: int, first_class: int) -> Benchmark:
    """The tasks at these positions, None: all, with labels and class ids that start higher: what follows another
    benchmark in one run.

    Raises:
        InputError: there is no task at such a position, or one is named twice.
    """
    all_tasks = range(len(benchmark.labels))
    chosen = list(all_tasks) if tasks is None else [given.whole(task, "tasks", least=0) for task in tasks]
    if not chosen or len(set(chosen)) < len(chosen) or max(chosen) not in all_tasks:
        raise InputError(f"tasks is {chosen}; {benchmark.name} has the tasks 0 to {all_tasks[-1]}, each once.")
    first_label = given.whole(first_label, "first_label")
    first_class = given.whole(first_class, "first_class", least=0)
    if max(abs(first_label), first_class) > _HIGHEST_ID:
        raise InputError(f"first_label is {first_label}, first_class {first_class}; {_HIGHEST_ID} is the highest.")
    if (chosen, first_label, first_class) == (list(all_tasks), 0, 0):
        return benchmark
    labels = [benchmark.labels[task] + first_label for task in chosen]
    classes = set(benchmark.class_names)
    if len(chosen) < len(all_tasks):
        test = benchmark.scenario.streams["test"]
        classes = {int(c) for task in chosen for c in test[task].dataset.targets.uniques}
    streams: list[CLStream[CLExperience]] = []
    for name, stream in benchmark.scenario.streams.items():
        experiences = zip(chosen, labels, strict=True)
        makers = [partial(_moved, stream[task], label, first_class) for task, label in experiences]
        streams.append(lazy_stream(name, makers, labels))
    return replace(
        benchmark,
        scenario=CLScenario(streams),
        task_names=tuple(benchmark.task_names[task] for task in chosen),
        domains=tuple(benchmark.domains[task] for task in chosen),
        class_names={c + first_class: benchmark.class_names[c] for c in sorted(classes)},
        labels=tuple(labels),
    )


def chained(name: str, parts: Sequence[Benchmark]) -> Benchmark:
    """One sequence of all tasks; the labels and class ids of each part follow those of the part before it. All have
    images of one shape."""
    moved: list[Benchmark] = []
    first_label = first_class = 0
    for part in parts:
        moved.append(part_of(part, None, first_label, first_class))
        first_label += len(part.labels)
        first_class += 1 + max(part.class_names)
    streams = []
    for split in ("train", "test"):
        experiences = [experience for part in moved for experience in part.scenario.streams[split]]
        makers = [partial(_dataset_of, experience) for experience in experiences]
        streams.append(lazy_stream(split, makers, range(first_label)))
    return Benchmark(
        name=name,
        scenario=CLScenario(streams),
        task_names=tuple(task for part in moved for task in part.task_names),
        domains=tuple(domain for part in moved for domain in part.domains),
        shape=parts[0].shape,
        class_names={c: class_name for part in moved for c, class_name in part.class_names.items()},
        transform=image_transform(parts[0].shape[1]),
        labels=tuple(range(first_label)),
    )


class LazyExperience(DatasetExperience[ClassificationDataset]):
    """An experience that makes its dataset whenever it is asked for it, and keeps none: of a long sequence only the
    tasks that are at work take memory."""

    def __init__(self, make: Callable[[], ClassificationDataset], label: int) -> None:
        super().__init__(dataset=make)  # type: ignore[arg-type]  # what makes it stands in its place
        self.task_label = label
        self.task_labels = [label]

    @property
    def dataset(self) -> ClassificationDataset:
        """Made anew."""
        return self._dataset()  # type: ignore[operator, no-any-return]


def lazy_stream(
    name: str, makers: Sequence[Callable[[], ClassificationDataset]], labels: Sequence[int]
) -> CLStream[CLExperience]:
    """The stream whose experience k holds, under the k-th task label, the dataset that `makers[k]` makes: one with
    targets, and without task labels or with that one."""
    pairs = zip(makers, labels, strict=True)
    return EagerCLStream(name, [LazyExperience(partial(_under, make, label), label) for make, label in pairs])


def _under(make: Callable[[], ClassificationDataset], label: int) -> ClassificationDataset:
    dataset = make()
    if getattr(dataset, "targets_task_labels", None) is not None:
        return dataset
    labels = TaskLabels(ConstantSequence(label, len(dataset)))
    return dataset.update_data_attribute(name="targets_task_labels", new_value=labels)


def _dataset_of(experience: CLExperience) -> ClassificationDataset:
    return experience.dataset  # type: ignore[no-any-return]


def _moved(experience: CLExperience, label: int, first_class: int) -> ClassificationDataset:
    """The same samples under another task label, with class ids that start higher."""
    dataset = experience.dataset
    targets = [int(target) + first_class for target in dataset.targets]
    raised = TransformGroups({split: (None, partial(add, first_class)) for split in ("train", "eval")})
    # Made anew: Avalanche's update_data_attribute leaves the attribute of the old name as it was.
    attributes = [DataAttribute(targets, "targets"), TaskLabels(ConstantSequence(label, len(targets)))]
    return ClassificationDataset([dataset], transform_groups=raised, data_attributes=attributes)


def image_transform(size: int) -> transforms.Compose:
    """Makes any Pillow image a normalised tensor, float32, 3 x `size` x `size`."""
    normalize = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    return transforms.Compose([transforms.Resize((size, size)), v2.RGB(), transforms.ToTensor(), normalize])


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
