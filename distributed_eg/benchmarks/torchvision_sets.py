"""Torchvision's datasets, opened from a folder that the user names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import numpy as np
from torchvision import datasets

from distributed_eg.benchmarks.catalog import TORCHVISION, TorchvisionSet
from distributed_eg.benchmarks.image_set import ImagePart, ImageSet, split_off_test
from distributed_eg.errors import InputError, told


def torchvision_set(name: str, data: str | None, *, download: bool, seed: int) -> ImageSet:
    """The dataset behind a name of the catalogue. Its pixels are not copied; where they lie in files, nor read.

    Raises:
        InputError: it is not in the folder ``data``, cannot be downloaded into it, or is damaged.
    """
    known = TORCHVISION[name]
    parts = []
    for arguments in known.parts:
        leaf = _open(known, name, data, arguments, download)
        targets = np.asarray([_class_of(value) for value in getattr(leaf, known.targets)])
        parts.append(ImagePart.all_of(leaf, targets - known.first_target))
    names = getattr(leaf, "classes", None) or [f"{known.source} {c}" for c in range(known.num_classes)]
    class_names = tuple(names)[known.first_target if len(names) > known.num_classes else 0 :]
    if len(parts) == 1:
        parts = list(split_off_test(parts[0], name, class_names, seed))
    return ImageSet(known.source, class_names, parts[0], parts[1], known.first_target)


def _class_of(value: Any) -> int:
    return int(value[1] if isinstance(value, tuple | list) else value)


def _open(known: TorchvisionSet, name: str, data: str | None, arguments: Mapping[str, object], download: bool) -> Any:
    """A part of a torchvision dataset, from the folder `data`."""
    where = "no folder was given"
    if data is not None:
        # Workers read its files from wherever they run.
        root = os.path.abspath(data)
        try:
            return getattr(datasets, known.source)(root, **arguments, download=download and known.home is None)
        except ImportError as error:
            raise InputError(f"{name} needs the package {error.name!r}: pip install it.") from error
        # Torchvision's own are RuntimeErrors; the others come of files that are cut off or not what they should be.
        except (RuntimeError, OSError, ValueError, EOFError, LookupError, AssertionError, UnpicklingError) as error:
            if download and known.home is None:
                raise InputError(f"{name} could not download {known.source} into --data {data}: {error}") from error
            where = f"{data} does not have it, or not whole ({told(error)})"
    how = "pass --data DIR, and --download to fetch it into DIR (in Python: data= and download=True)"
    if known.home is not None:
        how = f"nothing downloads it; {known.home} says where it is, and --data DIR (in Python: data=) where you put it"
    raise InputError(f"{name} needs torchvision's {known.source}, and {where}: {how}.")
