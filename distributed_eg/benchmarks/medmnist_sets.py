"""MedMNIST's flat datasets of one class an image, from .npz files that the user has."""

from __future__ import annotations

import importlib
import os
import zlib
from zipfile import BadZipFile

import numpy as np

from distributed_eg.benchmarks.image_set import ImagePart, ImageSet
from distributed_eg.errors import InputError, told


def medmnist_set(flag: str, data: str | None, *, download: bool) -> ImageSet:
    """The dataset that MedMNIST calls `flag`, with its own training and test part, 28 × 28 pixels.

    Raises:
        InputError: the package or the file is missing, or the file is damaged.
    """
    try:
        package = importlib.import_module("medmnist")
    except ImportError as error:
        raise InputError(
            f"medmnist:{flag} needs the package {error.name!r}: pip install 'distributed-eg[medmnist]'."
        ) from error
    info = package.INFO[flag]
    where = "no folder was given"
    if data is not None:
        root = os.path.abspath(data)
        kind = getattr(package, info["python_class"])
        try:
            parts = [
                kind(split=split, root=root, download=download, target_transform=only_label)
                for split in ("train", "test")
            ]
            train, test = (ImagePart.all_of(leaf, np.asarray(leaf.labels)[:, 0]) for leaf in parts)
            return ImageSet(
                f"medmnist:{flag}", tuple(info["label"][str(c)] for c in range(len(info["label"]))), train, test
            )
        except InputError:
            raise
        # MedMNIST's own are RuntimeErrors; the others come of a file that is no such archive, or cut off.
        except (RuntimeError, OSError, ValueError, EOFError, LookupError, BadZipFile, zlib.error) as error:
            where = f"{data} does not have {flag}.npz, or not whole ({told(error)})"
    raise InputError(
        f"medmnist:{flag} needs MedMNIST's {flag}.npz, and {where}: pass --data DIR, and --download to fetch it into "
        "DIR (in Python: data= and download=True)."
    )


def only_label(label: np.ndarray) -> int:
    """The class in a label of MedMNIST's, an array of one number."""
    return int(label[0])
