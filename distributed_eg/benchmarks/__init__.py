"""Task sequences to try the system on, by name; the module of a name is imported when that name is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distributed_eg import given
from distributed_eg.benchmarks.catalog import BENCHMARKS, IN_TURNS, TORCHVISION
from distributed_eg.benchmarks.names import Part, parts_of_name
from distributed_eg.benchmarks.request import Request
from distributed_eg.errors import InputError

if TYPE_CHECKING:
    from distributed_eg.benchmarks.benchmark import Benchmark
    from distributed_eg.benchmarks.image_set import ImageSet

__all__ = ["BENCHMARKS", "Benchmark", "make_benchmark"]


def make_benchmark(
    name: str,
    *,
    data: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | None = None,
    train_per_task: int | Sequence[int] | None = None,
    test_per_task: int | Sequence[int] | None = None,
    seed: int = 0,
    classes_per_task: int | None = None,
    order_seed: int | None = None,
) -> Benchmark:
    """Build the task sequence called `name`; the same arguments give the same images.

    `name` is one of `BENCHMARKS`, "medmnist:NAME" (one of MedMNIST's flat datasets), "folder:PATH" (image files, a
    folder a class), "hf:PATH" (what Hugging Face's datasets saved to disk), one of these changed ("permuted:NAME",
    "rotated:NAME", "pairs:NAME"; "rotated-36:NAME" is done 36 times), or a chain of all these ("a+b+c").

    `data` is the folder of torchvision's, MedMNIST's and the paper's datasets, and `download` allows fetching into it
    what torchvision and MedMNIST can fetch.
    Images are float32, 3 x `image_size` x `image_size` pixels (64 for "embedded" alone, 96 otherwise), normalised with
    ImageNet's statistics. `train_per_task` and `test_per_task` are images a task: one number, or one for each task
    where nothing is chained, split equally over the task's classes and rounded down; without them "embedded" has 240
    and 120, and the others have all that there are. `classes_per_task` are those of a dataset in its own order, or in
    one that `order_seed` draws; without it the datasets of "split-…" have 2, or 10 where they have more than 26
    classes, and the others are one task each, as is everything that is permuted or rotated. Raises `InputError`.
    """
    parts = parts_of_name(given.text(name, "The name of a benchmark"))
    if image_size is not None and (image_size := given.whole(image_size, "image_size")) < 8:
        raise InputError(f"image_size={image_size} is too small: give 8 pixels or more.")
    data = None if data is None else given.path(data, "data")
    download, seed = given.flag(download, "download"), given.whole(seed, "seed", least=0)
    classes_per_task = None if classes_per_task is None else given.whole(classes_per_task, "classes_per_task", least=2)
    order_seed = None if order_seed is None else given.whole(order_seed, "order_seed", least=0)
    for option, per_task in (("train_per_task", train_per_task), ("test_per_task", test_per_task)):
        if len(parts) > 1 and isinstance(per_task, Sequence):
            raise InputError(f"{option} has {len(per_task)} numbers, and {name!r} is a chain: give one for all tasks.")
    size = image_size or (64 if all(part.kind == "embedded" for part in parts) else 96)
    request = Request(size, data, download, train_per_task, test_per_task, classes_per_task, seed, order_seed)
    made = [_embedded(request) if part.kind == "embedded" else _split(part, request) for part in parts]
    if len(made) == 1:
        return made[0]
    from distributed_eg.benchmarks.benchmark import chained

    return chained(name, made)


def _embedded(request: Request) -> Benchmark:
    from distributed_eg.benchmarks.embedded import embedded

    for option in ("classes_per_task", "order_seed"):
        if (value := getattr(request, option)) is not None:
            raise InputError(f"{option} is {value}, and 'embedded' has tasks of its own: leave it out.")
    num_train = 240 if request.train_per_task is None else request.train_per_task
    num_test = 120 if request.test_per_task is None else request.test_per_task
    return embedded(request.image_size, num_train, num_test, request.seed)


def _split(part: Part, request: Request) -> Benchmark:
    from distributed_eg.benchmarks.split import split

    sets = _sets(part, request)
    per_task = [_classes_per_task(part, images, request.classes_per_task) for images in sets]
    return split(part.name, sets, per_task, part.change, request, in_turns=part.what in IN_TURNS)


def _sets(part: Part, request: Request) -> list[ImageSet]:
    """The datasets behind a part of a chain."""
    data, download, seed = request.data, request.download, request.seed
    if part.kind == "torchvision":
        from distributed_eg.benchmarks.torchvision_sets import torchvision_set

        return [
            torchvision_set(name, data, download=download, seed=seed) for name in IN_TURNS.get(part.what, (part.what,))
        ]
    if part.kind == "paper":
        from distributed_eg.benchmarks.paper_sets import paper_sets

        return paper_sets(part.what, data, download=download, seed=seed)
    if part.kind == "medmnist":
        from distributed_eg.benchmarks.medmnist_sets import medmnist_set

        return [medmnist_set(part.what, data, download=download)]
    if part.kind == "folder":
        from distributed_eg.benchmarks.folders import folder_sets

        return folder_sets(part.what, seed)
    from distributed_eg.benchmarks.hugging_face import hugging_face_set

    return [hugging_face_set(part.what, seed)]


def _classes_per_task(part: Part, images: ImageSet, given_number: int | None) -> int:
    if part.change is not None and part.change.kind == "pairs":
        if given_number not in (None, 2):
            raise InputError(f"classes_per_task is {given_number}, and {part.name!r} has two a task: leave it out.")
        return 2
    if given_number is not None:
        return given_number
    if part.kind == "torchvision" and part.change is None:
        return TORCHVISION[IN_TURNS.get(part.what, (part.what,))[0]].classes_per_task
    return len(images.class_names)


def __getattr__(name: str) -> object:
    # Avalanche takes seconds to import: listing the names, as a command line's help does, must not pay for it.
    if name == "Benchmark":
        from distributed_eg.benchmarks.benchmark import Benchmark

        return Benchmark
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
