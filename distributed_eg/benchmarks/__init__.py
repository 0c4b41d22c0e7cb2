"""Task sequences to try the system on, by name; the module of a name is imported when that name is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distributed_eg import given
from distributed_eg.errors import InputError

if TYPE_CHECKING:
    from distributed_eg.benchmarks.benchmark import Benchmark

__all__ = ["BENCHMARKS", "Benchmark", "make_benchmark"]

BENCHMARKS: tuple[str, ...] = ("embedded", "split-mnist", "split-fashion-mnist", "split-mnist+fashion", "split-cifar10")


def make_benchmark(
    name: str,
    *,
    data: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | None = None,
    train_per_task: int | Sequence[int] | None = None,
    test_per_task: int | Sequence[int] | None = None,
    seed: int = 0,
) -> Benchmark:
    """Build the task sequence called `name`, one of `BENCHMARKS`; the same arguments give the same images.

    `data` is the folder of the torchvision datasets, and `download` allows fetching a missing one into it;
    "embedded" needs neither. Images are float32, 3 x `image_size` x `image_size` pixels (64 for "embedded",
    96 otherwise), normalised with ImageNet's statistics. `train_per_task` and `test_per_task` are images a
    task: one number, or one for each task, split equally over the task's classes and rounded down; without
    them "embedded" has 240 and 120, and the others have all that there are. Raises `InputError`.
    """
    if name not in BENCHMARKS:
        raise InputError(f"There is no benchmark {name!r}; the names are {', '.join(BENCHMARKS)}.")
    if image_size is not None and (image_size := given.whole(image_size, "image_size")) < 8:
        raise InputError(f"image_size={image_size} is too small: give 8 pixels or more.")
    data = None if data is None else given.path(data, "data")
    download, seed = given.flag(download, "download"), given.whole(seed, "seed", least=0)
    if name == "embedded":
        from distributed_eg.benchmarks.embedded import embedded

        num_train = 240 if train_per_task is None else train_per_task
        num_test = 120 if test_per_task is None else test_per_task
        return embedded(image_size or 64, num_train, num_test, seed)
    from distributed_eg.benchmarks.torchvision_splits import torchvision_split

    return torchvision_split(name, data, download, image_size or 96, train_per_task, test_per_task, seed)


def __getattr__(name: str) -> object:
    # Avalanche takes seconds to import: listing the names, as a command line's help does, must not pay for it.
    if name == "Benchmark":
        from distributed_eg.benchmarks.benchmark import Benchmark

        return Benchmark
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
