"""Datasets that Hugging Face's `datasets` saved to disk."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from distributed_eg.benchmarks.image_set import ImagePart, ImageSet, split_off_test
from distributed_eg.errors import InputError, told
from distributed_eg.method.image_transform import is_deep

_TEST_PARTS = ("test", "validation")
"""The first that is there holds the test images."""


class TableImages(Dataset[tuple[Image.Image, int]]):
    """The images of a table that lies on disk; pickled, it holds where that is."""

    def __init__(self, table: Any, image: str, label: str, where: str) -> None:
        self.table = table
        self.image = image
        self.label = label
        self.where = where

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An image in RGB, and its class.

        Raises:
            InputError: it cannot be read, or has pixels deeper than a byte.
        """
        where = f"Row {index} of {self.where}"
        try:
            row = self.table[index]
            image = row[self.image]
            if not isinstance(image, Image.Image):
                raise InputError(f"{where} has no image in its column {self.image!r}.")
            if is_deep(image):
                raise InputError(f"{where} has pixels deeper than a byte (mode {image.mode}): convert it first.")
            return image.convert("RGB"), int(row[self.label])
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{where} cannot be read as an image ({told(error)}).") from error


def hugging_face_set(path: str, seed: int) -> ImageSet:
    """The dataset in a folder that `save_to_disk` wrote; without a test part, a share of each class is split off.

    Raises:
        InputError: the package is missing, there is no such dataset, or it has not one column of images and one of
            class labels.
    """
    try:
        package = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(f"hf:{path} needs the package {error.name!r}: pip install 'distributed-eg[hf]'.") from error
    where = os.path.abspath(path)
    try:
        loaded = package.load_from_disk(where)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no dataset that save_to_disk wrote, or not whole ({told(error)}).") from error
    tables = loaded if isinstance(loaded, package.DatasetDict) else {"train": loaded}
    if "train" not in tables:
        raise InputError(f"{path} has the parts {', '.join(tables)}, and none that is called 'train'.")
    name = os.path.basename(where)
    train, names = _part(package, tables["train"], f"the part 'train' of {path}")
    other = next((part for part in _TEST_PARTS if part in tables), None)
    if other is None:
        return ImageSet(name, names, *split_off_test(train, path, names, seed))
    test, test_names = _part(package, tables[other], f"the part {other!r} of {path}")
    if names != test_names:
        raise InputError(f"The parts 'train' and {other!r} of {path} have other classes: {names} and {test_names}.")
    return ImageSet(name, names, train, test)


def _part(package: Any, table: Any, where: str) -> tuple[ImagePart, tuple[str, ...]]:
    """A table's images and its class names."""
    columns = []
    for kind in (package.Image, package.ClassLabel):
        found = [name for name, feature in table.features.items() if isinstance(feature, kind)]
        if len(found) != 1:
            has = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in table.features.items())
            raise InputError(f"It takes one column of the type {kind.__name__}, and {where} has {has}.")
        columns.append(found[0])
    image, label = columns
    classes = np.asarray(table.select_columns([label])[:][label])
    if classes.dtype.kind not in "iu":
        raise InputError(f"Some images of {where} have no class in the column {label!r}: leave them out.")
    names = tuple(table.features[label].names)
    return ImagePart.all_of(TableImages(table, image, label, where), classes), names
