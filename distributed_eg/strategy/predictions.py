"""Predictions that people read: which class of which task an image shows, how sure that is, and what else it may be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TypeAlias

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from distributed_eg.errors import InputError
from distributed_eg.method.gate import ABSENT_LOG_PROBABILITY
from distributed_eg.method.image_transform import ImageReader
from distributed_eg.store.decoding import decode
from distributed_eg.store.registry import Registry
from distributed_eg.types import NOBODY, ImageTransform, TaskId

Images: TypeAlias = "Tensor | Image | str | os.PathLike[str] | Iterable[Tensor | Image | str | os.PathLike[str]]"
"""A batch of tensors or one, as ``ExpertGate.forward`` takes them; images of Pillow's; files; several of them."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a run says of an image. Names are None where nobody said them."""

    class_id: int | None
    """None where nobody answers; without a task an output of the root network."""
    class_name: str | None
    confidence: float
    """Probability of the class, by the experts that answered."""
    task: TaskId | None
    """Where the gate sent the image; None where it is strange to all tasks, and not theirs to answer for."""
    task_confidence: float
    """The gate's, over all tasks."""
    second_class_id: int | None
    """What it is next most probably; None where the experts that answered know no other class."""
    second_class_name: str | None
    second_confidence: float | None


@dataclass(frozen=True, slots=True)
class TaskNotes:
    """What is told of a task's images beside their pixels."""

    classes: tuple[int, ...]
    class_names: tuple[str | None, ...]
    transform: ImageTransform | None

    @property
    def names(self) -> dict[int, str | None]:
        """By class id."""
        return dict(zip(self.classes, self.class_names, strict=True))


def notes_of(registry: Registry) -> dict[TaskId, TaskNotes]:
    """The notes of the newest version of each task that the gate knows, by the number that users see."""
    arrivals = {task: registry.arrivals[manifest.task] for task, manifest in registry.active.items()}
    return {
        task: TaskNotes(tuple(record.names), tuple(record.names.values()), record.transform)
        for task, record in arrivals.items()
    }


def notes_as_tensor(notes: Mapping[TaskId, TaskNotes]) -> Tensor:
    """Notes as (n,) bytes, for a state dict."""
    text = json.dumps([[task, asdict(of_task)] for task, of_task in notes.items()])
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def notes_from_tensor(tensor: Tensor) -> dict[TaskId, TaskNotes]:
    """What ``notes_as_tensor`` was given.

    Raises:
        InputError: the bytes are others.
    """
    try:
        return {task: decode(TaskNotes, value, "notes") for task, value in json.loads(bytes(tensor.tolist()))}
    except (ValueError, TypeError) as error:
        raise InputError(f"What the state dict tells of its tasks is damaged: {error}.") from error


def reader_for(
    notes: Mapping[TaskId, TaskNotes], given: ImageTransform | None, shape: tuple[int, int, int]
) -> ImageReader:
    """What makes images of any size what the network takes: by the transform given, else by the one of all tasks.

    Raises:
        InputError: none is given, and a task has none, or tasks have several.
    """
    if given is not None:
        return ImageReader(given, shape)
    by_task = {task: of_task.transform for task, of_task in notes.items()}
    first, *others = by_task.items()
    unlike = [task for task, transform in others if transform != first[1]]
    if first[1] is None or unlike:
        reason = (
            f"tasks {first[0]} and {unlike[0]} were trained with unlike ones" if unlike else "the run does not tell it"
        )
        raise InputError(
            f"What images go through before the network must be said, for {reason}: give transform=, of torchvision's "
            "transforms, as in training (on the command line --resize, --mean and --std), or tensors that went through "
            "it."
        )
    return ImageReader(first[1], shape)


def batches_of(images: Images, batch_size: int, open_reader: Callable[[], ImageReader]) -> Iterator[Tensor]:
    """Batches (n, channels, height, width) of what a user gave, in its order; ``open_reader`` is called for a reader
    where there are images that are no tensors yet.

    Raises:
        InputError: something is no image.
    """
    if isinstance(images, Tensor):
        yield from _floating(images[None] if images.ndim == 3 else images).split(batch_size)
        return
    if isinstance(images, Image | str | os.PathLike):
        images = [images]
    if not isinstance(images, Iterable):
        raise InputError(f"images are of type {type(images).__name__}; give tensors, Pillow's images, or files.")
    reader, rest = None, iter(images)
    while batch := list(islice(rest, batch_size)):
        tensors = []
        for image in batch:
            if not isinstance(image, Tensor):
                reader = reader or open_reader()
                image = _read(reader, image)
            tensors.append(_floating(image))
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            raise InputError(f"The images have several shapes: {', '.join(map(str, shapes))}.")
        yield torch.stack(tensors)


def _floating(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise InputError(
            f"Tensors of {tensor.dtype} have not been through the transform: give what it makes of them, or images of "
            "Pillow's (torchvision's to_pil_image)."
        )
    return tensor


def _read(reader: ImageReader, image: object) -> Tensor:
    if isinstance(image, str | os.PathLike):
        return reader.open(image)
    if not isinstance(image, Image):
        raise InputError(f"An image is of type {type(image).__name__}; give tensors, Pillow's images, or files.")
    try:
        return reader(image)
    except InputError as error:
        raise InputError(f"An image cannot be used: {error}.") from error


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files as samples; the second value is 1 for those that cannot be read, which are black."""

    def __init__(self, paths: Sequence[str], reader: ImageReader) -> None:
        self._paths, self._reader = paths, reader

    def __len__(self) -> int:
        """Number of files."""
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image, and whether it is none."""
        try:
            return self._reader.open(self._paths[index]), 0
        except InputError:
            return torch.zeros(self._reader.shape), 1


def predictions(
    tasks: Tensor, confidences: Tensor, classes: Tensor, log_probabilities: Tensor, notes: Mapping[TaskId, TaskNotes]
) -> list[Prediction]:
    """What the gate and the experts said, for people.

    Args:
        tasks: (n,) where the gate sent each image.
        confidences: (n,) how sure it was.
        classes: (c,) dataset class ids in ascending order.
        log_probabilities: (n, c) of them.
        notes: of every task that may have answered.
    """
    found = []
    names = {task: of_task.names for task, of_task in notes.items()}
    anywhere = {c: name for of_task in names.values() for c, name in of_task.items()}
    for task, confidence, row in zip(tasks.tolist(), confidences.tolist(), log_probabilities.cpu(), strict=True):
        if task == NOBODY and not bool((row > ABSENT_LOG_PROBABILITY).any()):
            found.append(Prediction(None, None, 0.0, None, confidence, None, None, None))
            continue
        own = names.get(task, {})
        known = (row > ABSENT_LOG_PROBABILITY) | torch.isin(classes, torch.tensor(list(own)))
        best = int(row.argmax())
        others = row.masked_fill(~known, -torch.inf)
        others[best] = -torch.inf
        second = int(others.argmax()) if bool(others.isfinite().any()) else None
        choices = []
        for place in (best, second):
            c = None if place is None else int(classes[place])
            name = None if c is None or task == NOBODY else own.get(c, anywhere.get(c))
            choices.append((c, name, None if place is None else float(row[place].exp())))
        (first_id, first_name, first_confidence), rest = choices
        assert first_id is not None
        assert first_confidence is not None
        sent = None if task == NOBODY else task
        found.append(Prediction(first_id, first_name, first_confidence, sent, confidence, *rest))
    return found
