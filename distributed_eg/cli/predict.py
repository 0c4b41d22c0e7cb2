"""``distributed-eg predict``: what a run says of image files."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import tyro

from distributed_eg import given
from distributed_eg.cli.options import WorkerOptions, folder_name, open_run, optional
from distributed_eg.config import Engine
from distributed_eg.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from distributed_eg.method.image_transform import ImageReader
    from distributed_eg.strategy.predictions import Prediction

    Answer: TypeAlias = Callable[[Sequence[str]], list[Prediction | str]]
    """Files to what they show, or why they cannot be read."""

_CHUNK = 8
"""Batches that each worker is given at a time."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(WorkerOptions):
    """Say for each image which class of which task it shows, how sure that is, and what else it may be."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory: a path, or any pyarrow.fs URI."""
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGES")]
    """Image files, folders of them, or - for a list of either on stdin, one a line."""
    engine: Engine = "inline"
    """inline (this process, which only reads the run) or ray (worker actors, which must see the files)."""
    batch_size: int = 32
    """Images a batch."""
    resize: Annotated[tuple[int, int] | None, optional("HEIGHT WIDTH")] = None
    """Height and width that images are resized to, where the run does not know what they go through; RUN and IMAGES
    come before them."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """With --resize: what is subtracted from each channel, of pixels in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """With --resize: what each channel is divided by then."""
    json: bool = False
    """Print a JSON object a line on stdout instead of a table; what people read goes to stderr."""
    csv: bool = False
    """Print comma-separated values on stdout instead of a table; what people read goes to stderr."""


def predict(options: Annotated[PredictOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> None:
    """Say for each image which class of which task it shows; exit code 1 where one cannot be read."""
    from distributed_eg.cli.display import Display
    from distributed_eg.strategy.predictions import Prediction

    given.whole(options.batch_size, "--batch-size", least=1)
    _check_preprocessing(options)
    if options.json and options.csv:
        raise InputError("--json and --csv exclude each other: leave one of them out.")
    files, others = _files_in(options.images)
    display = Display(to_stderr=options.json or options.csv)
    if others:
        display.say(f"{others} files in these folders are no images by their names, and left out.")
    columns = ["file", *(field.name for field in fields(Prediction))]
    table = csv.writer(sys.stdout, lineterminator="\n")
    if options.csv:
        table.writerow(columns)
    found: dict[str, Prediction] = {}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        answer, step, names = _opened(options, stack)
        for first in display.steps(range(0, len(files), step), len(files)):
            chunk = files[first : first + step]
            for file, said in zip(chunk, answer(chunk), strict=True):
                row = {"file": file, **({"error": said} if isinstance(said, str) else asdict(said))}
                if options.json:
                    print(json.dumps(row))
                if isinstance(said, str):
                    failed[file] = said
                    continue
                found[file] = said
                if options.csv:
                    table.writerow(row.values())
    if not (options.json or options.csv):
        display.predictions(found)
    display.shares(_shares(found, names))
    for reason in failed.values():
        print(f"distributed-eg: {reason}", file=sys.stderr)
    if failed:
        print(f"distributed-eg: {len(failed)} of {len(files)} images could not be read.", file=sys.stderr)
        sys.exit(1)


def _check_preprocessing(options: PredictOptions) -> None:
    """Refuse means and deviations that nothing reads, or that cannot be used."""
    means, deviations = options.mean, options.std
    if options.resize is None and (means, deviations) != (PredictOptions.mean, PredictOptions.std):
        raise InputError("--mean and --std are read with --resize only: give that, too, or leave them out.")
    if len(means) != len(deviations):
        raise InputError(f"--mean is {means} and --std {deviations}: give each a value for every channel.")
    for name, values, least in (("--mean", means, -math.inf), ("--std", deviations, 0)):
        if not all(least < value < math.inf for value in values):
            raise InputError(f"{name} is {values}; it must be finite numbers{', above 0' if least == 0 else ''}.")


def _files_in(images: Sequence[str]) -> tuple[list[str], int]:
    """The image files that were named, and how many others folders hold.

    Raises:
        InputError: there are none.
    """
    from PIL import Image

    Image.init()
    files, others = [], 0
    for name in _names(images):
        if not os.path.isdir(name):
            files.append(name)  # what it is, is seen when it is opened
            continue
        below = Path(name)
        for path in sorted(path for path in below.rglob("*") if not path.is_dir()):
            if any(part.startswith(".") for part in path.relative_to(below).parts):
                continue
            if Image.EXTENSION.get(path.suffix.lower()) in Image.OPEN:
                files.append(str(path))
            else:
                others += 1
    if not files:
        raise InputError(f"There are no images in {', '.join(images) or 'what was given: name files or folders'}.")
    return files, others


def _names(images: Sequence[str]) -> Iterator[str]:
    for name in images:
        if name == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        else:
            yield os.path.expanduser(name)


def _opened(options: PredictOptions, stack: ExitStack) -> tuple[Answer, int, Mapping[int, Mapping[int, str | None]]]:
    """How to answer for files, how many at a time, and the class names of each task."""
    from torchvision import transforms

    from distributed_eg.method.image_transform import given_transform
    from distributed_eg.store.registry import read_run_record
    from distributed_eg.store.storage import Storage
    from distributed_eg.strategy.model import ExpertGate
    from distributed_eg.strategy.predictions import reader_for

    steps = [transforms.ToTensor(), transforms.Normalize(options.mean, options.std)]
    transform = None if options.resize is None else [transforms.Resize(options.resize), *steps]
    size = options.batch_size
    if options.engine == "ray":
        strategy = stack.enter_context(open_run(options.run, options))
        model = strategy.model
        step = size * _CHUNK * (options.num_workers if isinstance(options.num_workers, int) else os.cpu_count() or 1)
    else:
        options.cluster(options.run, False, 1)  # says what it does not read
        read_run_record(Storage(options.run))  # says where there is none
        model, step = ExpertGate.load(options.run), size
    reader = reader_for(model.notes, given_transform(transform, model.shape), model.shape)

    def by_workers(chunk: Sequence[str]) -> list[Prediction | str]:
        said = strategy.predict(chunk, transform=transform, batch_size=size)
        return [one or _why_unread(reader, file) for file, one in zip(chunk, said, strict=True)]

    def here(chunk: Sequence[str]) -> list[Prediction | str]:
        images = [_read(reader, file) for file in chunk]
        said = iter(model.predict([image for image in images if not isinstance(image, str)], batch_size=size))
        return [image if isinstance(image, str) else next(said) for image in images]

    names = {task: notes.names for task, notes in model.notes.items()}
    return (by_workers if options.engine == "ray" else here), step, names


def _read(reader: ImageReader, file: str) -> Tensor | str:
    """An image as the network takes it, or why it cannot be had."""
    try:
        return reader.open(file)
    except InputError as error:
        return str(error)


def _why_unread(reader: ImageReader, file: str) -> str:
    """Why workers could not read a file."""
    image = _read(reader, file)
    return image if isinstance(image, str) else f"{file} can be read here, but not where the workers are."


def _shares(
    found: Mapping[str, Prediction], names: Mapping[int, Mapping[int, str | None]]
) -> dict[int, tuple[int, float, float]]:
    """Where folders are called as classes: by task how many images there are, and which shares of them were sent to it,
    and told by their class."""
    tasks = {
        folder_name(name): task
        for task, of_task in sorted(names.items(), reverse=True)
        for name in of_task.values()
        if name
    }
    hits: dict[int, list[tuple[bool, bool]]] = {}
    for file, said in found.items():
        folder = os.path.basename(os.path.dirname(os.path.abspath(file)))
        if folder in tasks:
            of_task = {} if said.task is None else names[said.task]
            in_task = any(name and folder_name(name) == folder for name in of_task.values())
            is_right = said.class_name is not None and folder_name(said.class_name) == folder
            hits.setdefault(tasks[folder], []).append((in_task, is_right))
    return {
        task: (len(its), *(sum(column) / len(its) for column in zip(*its, strict=True)))
        for task, its in sorted(hits.items())
    }
