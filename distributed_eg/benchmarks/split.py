"""Datasets of images cut into tasks: which classes each has, under which ids, changed in which way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, zip_longest

import numpy as np
import numpy.typing as npt
from avalanche.benchmarks import CLScenario
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from torch.utils.data import Subset
from torchvision import transforms

from distributed_eg.benchmarks import catalog
from distributed_eg.benchmarks.benchmark import Benchmark, image_transform, images_per_class, labelled, lazy_stream
from distributed_eg.benchmarks.changes import Changed, Rotated, changes_of
from distributed_eg.benchmarks.image_set import ImagePart, ImageSet
from distributed_eg.benchmarks.names import Change
from distributed_eg.benchmarks.request import Request
from distributed_eg.errors import InputError


@dataclass(frozen=True)
class TaskView:
    """What one task is of a dataset."""

    images: ImageSet
    classes: tuple[int, ...]
    """Of the dataset's, from 0."""
    ids: tuple[int, ...]
    """Class id in the sequence of each."""
    change: Changed | None
    is_pair: bool
    """Whether other tasks have its classes, too."""

    @property
    def which(self) -> str:
        """Its classes, by their numbers."""
        first, last = self.classes[0], self.classes[-1]
        return f"{first}-{last}" if self.classes == tuple(range(first, last + 1)) else ",".join(map(str, self.classes))

    @property
    def name(self) -> str:
        """The dataset and its classes, where they are not all of them."""
        is_whole = len(self.classes) == len(self.images.class_names)
        changed = "" if self.change is None else f" {self.change}"
        return self.images.name + ("" if is_whole else f" {self.which}") + changed

    @property
    def class_names(self) -> dict[int, str]:
        """By class id; no two tasks of a dataset share one, for saved images lie in folders called by them."""
        notes = [self.which] * self.is_pair + [str(self.change)] * (self.change is not None)
        told = f" ({', '.join(notes)})" if notes else ""
        return {i: self.images.class_names[c] + told for i, c in zip(self.ids, self.classes, strict=True)}


def split(
    name: str,
    sets: Sequence[ImageSet],
    classes_per_task: Sequence[int],
    change: Change | None,
    request: Request,
    *,
    in_turns: bool,
) -> Benchmark:
    """The tasks of one dataset after the other, or of all in turns. The ids of a dataset's classes, in its own order,
    follow those of the dataset before it.

    All tasks of a dataset view one object; its pixels are not copied, and images are resized, made RGB and normalised
    when they are read. A task's own view of it is made when it is asked for.

    Raises:
        InputError: there are too few images.
    """
    by_set = _views(sets, classes_per_task, change, request.seed, request.order_seed)
    turns = zip_longest(*by_set) if in_turns else by_set
    views = [view for turn in turns for view in turn if view is not None]
    transform = image_transform(request.image_size)
    streams = []
    for number, (part_name, per_task) in enumerate(
        [("train", request.train_per_task), ("test", request.test_per_task)]
    ):
        option = f"{part_name}_per_task"
        counts: Sequence[int | None] = [None] * len(views)
        if per_task is not None:
            counts = images_per_class(option, per_task, [len(view.classes) for view in views])
        parts = [view.images.train if number == 0 else view.images.test for view in views]
        _refuse_too_few(views, parts, counts, option)
        makers = [
            partial(_dataset, part, view, count, transform, [request.seed, number, task])
            for task, (view, part, count) in enumerate(zip(views, parts, counts, strict=True))
        ]
        streams.append(lazy_stream(part_name, makers, range(len(views))))
    return Benchmark(
        name=name,
        scenario=CLScenario(streams),
        task_names=tuple(view.name for view in views),
        domains=tuple(view.images.name for view in views),
        shape=(3, request.image_size, request.image_size),
        class_names=dict(sorted(chain.from_iterable(view.class_names.items() for view in views))),
        transform=transform,
        labels=tuple(range(len(views))),
    )


def _views(
    sets: Sequence[ImageSet], classes_per_task: Sequence[int], change: Change | None, seed: int, order_seed: int | None
) -> list[list[TaskView]]:
    """Those of each dataset."""
    first = 0
    by_set: list[list[TaskView]] = []
    for number, (images, per_task) in enumerate(zip(sets, classes_per_task, strict=True)):
        num_classes = len(images.class_names)
        order = list(range(num_classes))
        if order_seed is not None:
            order = np.random.default_rng([order_seed, number]).permutation(num_classes).tolist()
        is_pairs = change is not None and change.kind == "pairs"
        groups = list(combinations(order, 2)) if is_pairs else _groups(order, per_task)
        by_set.append([])
        for changed in changes_of(change, seed):
            for group in groups:
                # Each pair has ids of its own, for no two tasks share one.
                ids = range(first, first + 2) if is_pairs else [first + c for c in group]
                by_set[-1].append(TaskView(images, group, tuple(ids), changed, is_pairs))
                first += 2 if is_pairs else 0
            first += 0 if is_pairs else num_classes
    return by_set


def _groups(order: Sequence[int], per_task: int) -> list[tuple[int, ...]]:
    """The classes of each task, in this order; one that would be left alone joins those before it."""
    count = catalog.num_tasks(len(order), per_task)
    firsts = [task * per_task for task in range(count)]
    return [tuple(order[a:b]) for a, b in zip(firsts, [*firsts[1:], len(order)], strict=True)]


def _refuse_too_few(
    views: Sequence[TaskView], parts: Sequence[ImagePart], counts: Sequence[int | None], option: str
) -> None:
    has = {id(part): np.bincount(part.classes) for part in parts}
    for view, part, count in zip(views, parts, counts, strict=True):
        for c in view.classes:
            if count is not None and count > has[id(part)][c]:
                raise InputError(
                    f"{option} asks for {count} images of class {c + view.images.first_target} of {view.images.name}, "
                    f"which has {has[id(part)][c]}: lower it."
                )


def _dataset(
    part: ImagePart, view: TaskView, count: int | None, transform: transforms.Compose, draw: Sequence[int]
) -> ClassificationDataset:
    """The samples of a view; `count` of each class (None: all), drawn by the seeds `draw`."""
    rng = np.random.default_rng(draw)
    chosen = [rng.permutation(np.flatnonzero(part.classes == c))[:count] for c in view.classes]
    drawn: npt.NDArray[np.int64] = np.sort(np.concatenate(chosen))
    ids = dict(zip(view.classes, view.ids, strict=True))
    targets = [ids[c] for c in part.classes[drawn].tolist()]
    by_target = {c + view.images.first_target: i for c, i in ids.items()}
    steps = transform.transforms
    if view.change is not None:
        # An image is turned as it is in its file, and loses its order last: what is saved of it has been changed.
        steps = [view.change, *steps] if isinstance(view.change, Rotated) else [*steps, view.change]
    renamed = None if all(target == i for target, i in by_target.items()) else by_target.__getitem__
    rows = part.rows[drawn].tolist()
    return labelled(Subset(part.leaf, rows), targets, transforms.Compose(steps), renamed)
