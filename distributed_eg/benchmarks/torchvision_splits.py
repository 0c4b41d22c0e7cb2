"""Benchmarks of two classes a task over torchvision's datasets, read from a folder that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import add
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from torch.utils.data import Subset
from torchvision import datasets, transforms
from torchvision.transforms import v2

from distributed_eg.benchmarks import benchmark
from distributed_eg.benchmarks.benchmark import Benchmark, labelled
from distributed_eg.errors import InputError

CLASSES_PER_TASK = 2
CLASSES_PER_DATASET = 10

Leaf: TypeAlias = datasets.MNIST | datasets.CIFAR10
# Benchmark -> the torchvision datasets that its tasks come from, in turns.
SPLITS: dict[str, tuple[str, ...]] = {
    "split-mnist": ("MNIST",),
    "split-fashion-mnist": ("FashionMNIST",),
    "split-mnist+fashion": ("MNIST", "FashionMNIST"),
    "split-cifar10": ("CIFAR10",),
}


def torchvision_split(
    name: str,
    data: str | None,
    download: bool,
    size: int,
    train_per_task: int | Sequence[int] | None,
    test_per_task: int | Sequence[int] | None,
    seed: int,
) -> Benchmark:
    """Five tasks a dataset, classes in order: 0 and 1, 2 and 3, ...; two datasets take turns, ids of the second + 10.

    All tasks of a split view one torchvision dataset object; its pixels are not copied, and images are
    resized, made RGB and normalised when they are read.
    """
    sources = SPLITS[name]
    firsts = range(0, CLASSES_PER_DATASET, CLASSES_PER_TASK)
    tasks = [(source, first) for first in firsts for source in range(len(sources))]
    normalize = transforms.Normalize(benchmark.IMAGENET_MEAN, benchmark.IMAGENET_STD)
    transform = transforms.Compose([transforms.Resize((size, size)), v2.RGB(), transforms.ToTensor(), normalize])
    streams: list[list[ClassificationDataset]] = []
    for split, (option, per_task) in enumerate([("train_per_task", train_per_task), ("test_per_task", test_per_task)]):
        counts: Sequence[int | None] = [None] * len(tasks)
        if per_task is not None:
            counts = benchmark.images_per_class(option, per_task, [CLASSES_PER_TASK] * len(tasks))
        leaves = [_open(source, name, data, train=split == 0, download=download) for source in sources]
        labels = [np.asarray(leaf.targets) for leaf in leaves]
        streams.append([])
        for task, ((source, first), count) in enumerate(zip(tasks, counts, strict=True)):
            rng = np.random.default_rng([seed, split, task])
            chosen = _choose(labels[source], first, count, option, rng)
            streams[-1].append(_view(leaves[source], chosen, source * CLASSES_PER_DATASET, transform))
    return Benchmark(
        name=name,
        scenario=benchmark.task_incremental(*streams),
        task_names=tuple(f"{sources[source]} {first}-{first + CLASSES_PER_TASK - 1}" for source, first in tasks),
        domains=tuple(sources[source] for source, _ in tasks),
        shape=(3, size, size),
        class_names=dict(enumerate(name for leaf in leaves for name in leaf.classes)),
        transform=transform,
        labels=tuple(range(len(tasks))),
    )


def _open(source: str, name: str, data: str | None, *, train: bool, download: bool) -> Leaf:
    """The torchvision dataset called `source`, from the folder `data`."""
    where = "no folder was given" if data is None else f"{data} does not have it"
    if data is not None:
        try:
            leaf: Leaf = getattr(datasets, source)(data, train=train, download=download)
            return leaf
        except (RuntimeError, OSError) as error:
            if download:
                raise InputError(f"{name} could not download {source} into --data {data}: {error}") from error
    raise InputError(
        f"{name} needs torchvision's {source}, and {where}: pass --data DIR, and --download to fetch it into DIR "
        "(in Python: data= and download=True)."
    )


def _choose(
    labels: npt.NDArray[np.int64], first: int, count: int | None, option: str, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Sorted indices of `count` samples (None: all) of each class of the task that starts at class `first`."""
    chosen = []
    for label in range(first, first + CLASSES_PER_TASK):
        found = np.flatnonzero(labels == label)
        if count is not None and count > len(found):
            raise InputError(f"{option} asks for {count} images of class {label}, which has {len(found)}: lower it.")
        chosen.append(rng.permutation(found)[:count])
    return np.sort(np.concatenate(chosen))


def _view(
    leaf: Leaf, indices: npt.NDArray[np.int64], offset: int, transform: transforms.Compose
) -> ClassificationDataset:
    """The samples `indices` of `leaf`, with their class ids raised by `offset`."""
    targets = (np.asarray(leaf.targets)[indices] + offset).tolist()
    return labelled(Subset(leaf, indices.tolist()), targets, transform, partial(add, offset) if offset else None)
