"""What is told of a task's images beside their pixels: their classes' names, and what they go through before the
network; by the user, or found in the dataset."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.flat_data import FlatData
from avalanche.benchmarks.utils.transforms import MultiParamTransform
from torch.utils.data import ConcatDataset, Subset

from distributed_eg import given
from distributed_eg.errors import InputError
from distributed_eg.method.image_transform import ImageReader, given_transform, mode_of, transform_as_data
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.runtime.worker.causes import ends_process
from distributed_eg.strategy.tasks.data_identity import rows_of
from distributed_eg.types import ImageTransform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Told:
    """What a user says of all tasks' images; what is missing is looked for in each task's dataset."""

    shape: tuple[int, int, int]
    class_names: Mapping[int, str]
    transform: ImageTransform | None

    @staticmethod
    def given(shape: tuple[int, int, int], class_names: object, transform: object) -> Told:
        """Names by class id, or in the order of class ids; torchvision's transforms, for evaluation.

        Raises:
            InputError: either is something else, or such a transform does not give images of ``shape``.
        """
        if isinstance(class_names, Mapping):
            pairs = list(class_names.items())
        elif isinstance(class_names, Sequence) and not isinstance(class_names, str):
            pairs = list(enumerate(class_names))
        elif class_names is None:
            pairs = []
        else:
            raise InputError(f"class_names is {given.shown(class_names)}; it must be names by class id.")
        names = {given.whole(c, "a key of class_names", 0): given.text(n, "a name in class_names") for c, n in pairs}
        return Told(shape, names, given_transform(transform, shape))

    def names_of(self, dataset: Any, classes: Collection[int]) -> tuple[str | None, ...]:
        """The name of each class of a dataset, in the order of ``classes``; None where nobody says it."""
        found = {} if all(c in self.class_names for c in classes) else _names_in(dataset)
        return tuple(self.class_names.get(c, found.get(c)) for c in classes)

    def transform_of(self, dataset: Any, what: str) -> ImageTransform | None:
        """What the images of a dataset go through, which ``what`` names in the log where it cannot be known.

        Reads a few of them, and not all through their transforms: hand in a private copy.
        """
        if self.transform is not None:
            return self.transform
        try:
            return _transform_in(dataset, self.shape)
        except InputError as error:
            logger.info("%s does not tell what its images go through (%s): predict will ask for it.", what, error)
            return None


def _names_in(dataset: Any) -> dict[int, str]:
    """Names by class id, as torchvision's datasets have them: ``classes`` in the order of their own targets."""
    leaves: dict[int, tuple[int, Any]] = {}
    which, rows = rows_of(dataset, leaves)
    targets = np.asarray(list(dataset.targets))
    found: dict[int, set[str]] = {}
    for number, leaf in leaves.values():
        names, own = getattr(leaf, "classes", None), np.asarray(getattr(leaf, "targets", ()))
        if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
            continue
        mine = which == number
        if own.ndim == 1 and len(own) == len(leaf) and own.dtype.kind in "iu" and own.min() >= 0:
            for target, index in np.unique(np.stack([targets[mine], own[rows[mine]]]), axis=1).T.tolist():
                found.setdefault(target, set()).update(names[index : index + 1])
    # Several names for one class id: its targets are made from others in another way.
    return {target: names.pop() for target, names in found.items() if len(names) == 1}


def _transform_in(dataset: Any, shape: tuple[int, int, int]) -> ImageTransform:
    """What images go through from a leaf of the dataset to its samples; a sample of each leaf tells that it is that.

    Raises:
        InputError: it cannot be known, as data.
    """
    leaves: dict[int, tuple[int, Any]] = {}
    which, rows = rows_of(dataset, leaves)
    pipelines = list(_pipelines(dataset, ()))
    found: set[str] = set()
    with reproducible(seed=0, threads=1):
        for number, leaf in leaves.values():
            for sample in np.flatnonzero(which == number)[:1].tolist():
                raw = _raw(leaf, int(rows[sample]))
                for transforms in [transforms for other, transforms in pipelines if other is leaf]:
                    transform = transform_as_data(transforms, mode_of(raw))
                    found.add(repr(transform))
                if not torch.equal(ImageReader(transform, shape)(raw), _first(dataset, sample)):
                    raise InputError("it does more than its transforms say")
    if len(found) != 1:
        raise InputError("its parts go through several")
    return transform


def _pipelines(dataset: Any, after: tuple[object, ...]) -> Iterator[tuple[Any, tuple[object, ...]]]:
    """Each way from a leaf to the dataset's samples: the leaf, and the transforms for evaluation."""
    if isinstance(dataset, AvalancheDataset):
        yield from _pipelines(dataset._flat_data, after)
    elif isinstance(dataset, Subset):
        yield from _pipelines(dataset.dataset, after)
    elif isinstance(dataset, ConcatDataset | FlatData):
        names = ("_frozen_transform_groups", "_transform_groups")
        groups = [getattr(dataset, name, None) for name in names]
        own = [group.transform_groups["eval"] for group in groups if group is not None]
        own = [part.flat_transforms(0) if isinstance(part, MultiParamTransform) else part for part in own]
        for child in dataset.datasets if isinstance(dataset, ConcatDataset) else dataset._datasets:
            yield from _pipelines(child, (*own, *after))
    else:
        yield dataset, (getattr(dataset, "transform", None), *after)


def _raw(leaf: Any, row: int) -> Any:
    """An image of a leaf before its transform."""
    transform = getattr(leaf, "transform", None)
    if transform is None:
        return _first(leaf, row)
    leaf.transform = None
    try:
        return _first(leaf, row)
    finally:
        leaf.transform = transform


def _first(dataset: Any, row: int) -> Any:
    try:
        return dataset[row][0]
    except BaseException as error:
        if ends_process(error):
            raise
        raise InputError(f"a sample cannot be read: {type(error).__name__}: {error}") from error
