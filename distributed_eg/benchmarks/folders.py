"""Image files in folders, a folder a class: read when a task needs them, looked at before anything is trained."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from distributed_eg.benchmarks.image_set import ImagePart, ImageSet, split_off_test
from distributed_eg.errors import InputError, told
from distributed_eg.method.image_transform import is_deep

logger = logging.getLogger(__name__)

_TEST_FOLDERS = ("test", "val")
"""The first that is there holds the test images: some datasets are published without the other."""
_LIKE_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Image files, opened when they are read; pickled, it holds their names only.

    Args:
        folder: absolute path that the files' names start from.
        files: names.
        targets: class of each.
        classes: class names.
    """

    def __init__(self, folder: str, files: Sequence[str], targets: Sequence[int], classes: Sequence[str]) -> None:
        self.folder = folder
        self.files = list(files)
        self.targets = list(targets)
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An image in RGB, without its transparency, and its class.

        Raises:
            InputError: its file cannot be read.
        """
        path = os.path.join(self.folder, self.files[index])
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), self.targets[index]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
            raise InputError(
                f"{path} cannot be read as an image ({told(error)}): repair it, or move it away."
            ) from error


def folder_sets(path: str, seed: int) -> list[ImageSet]:
    """The dataset in a folder, or the datasets in its sub-folders, by name.

    A dataset has a folder for each class, or `train/` and `test/` (or `val/`) with these; without a test part, a share
    of each class is split off by the seed. Every file's head is read, not its pixels.

    Raises:
        InputError: there are none, a class has no images, train and test differ in their classes, or a file cannot be
            taken as an image. Each names the folder or the file.
    """
    root = Path(os.path.abspath(path))
    _refuse_misnamed_parts(root)
    if _is_dataset(root):
        return [_dataset(root, seed)]
    folders = _folders(root)
    others = [folder for folder in folders if not _is_dataset(folder)]
    if not folders or others:
        raise InputError(
            f"{others[0] if others else root} holds neither train/ and test/ nor a folder of images for each class."
        )
    return [_dataset(folder, seed) for folder in folders]


def _is_misnamed_part(folder: Path) -> bool:
    """Whether it holds class folders, and is called as a part of a dataset, but not as a part that is read."""
    if folder.name.lower() not in _LIKE_PARTS or not _is_dataset(folder):
        return False
    return folder.name not in ("train", *_TEST_FOLDERS) or not (folder.parent / "train").is_dir()


def _is_dataset(folder: Path) -> bool:
    folders = _folders(folder)
    return (folder / "train").is_dir() or any(_images(inner)[0] for inner in folders)


def _refuse_misnamed_parts(folder: Path) -> None:
    """No part of a dataset is taken for a dataset of its own, or overlooked, for what it is called.

    Raises:
        InputError: one would be.
    """
    if parts := [f"{inner.name}/" for inner in _folders(folder) if _is_misnamed_part(inner)]:
        raise InputError(
            f"{folder} has {', '.join(parts)}, a part of a dataset by its name, and it would not be read as one: call "
            "the parts train/ and test/ (or val/); test/ needs train/ beside it."
        )


def _dataset(folder: Path, seed: int) -> ImageSet:
    _refuse_misnamed_parts(folder)
    train = folder / "train"
    if not train.is_dir():
        return _shared_out(folder, folder, seed)
    test = next((folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()), None)
    if test is None:
        return _shared_out(folder, train, seed)
    (train_part, names), (test_part, test_names) = _part(train), _part(test)
    if names != test_names:
        only = [
            f"only {side.name}/ has {', '.join(map(repr, sorted(mine - its)[:3]))}"
            for side, mine, its in ((train, {*names}, {*test_names}), (test, {*test_names}, {*names}))
            if mine - its
        ]
        raise InputError(f"{train} and {test} have other classes: {' and '.join(only)}.")
    return ImageSet(folder.name, names, train_part, test_part)


def _shared_out(folder: Path, of: Path, seed: int) -> ImageSet:
    part, names = _part(of)
    return ImageSet(folder.name, names, *split_off_test(part, str(of), names, seed))


def _part(folder: Path) -> tuple[ImagePart, tuple[str, ...]]:
    """The images in the class folders of a folder, and the classes' names."""
    classes = _folders(folder)
    if not classes:
        raise InputError(f"{folder} has no folder of images for each class.")
    files: list[str] = []
    targets: list[int] = []
    num_others = len(_entries(folder)) - len(classes)
    for number, inner in enumerate(classes):
        images, others = _images(inner)
        if not images:
            raise InputError(f"{inner} has no images in it: move it away, or fill it.")
        for image in images:
            image_size(image)
        files += [str(image.relative_to(folder)) for image in images]
        targets += [number] * len(images)
        num_others += others
    if num_others:
        logger.warning(
            "%d entries of %s and of the folders in it are no images of a class by their names, and left out.",
            num_others,
            folder,
        )
    if len(classes) == 1:
        raise InputError(
            f"{folder} has one class only ({classes[0].name!r}): an expert has nothing to tell apart there."
        )
    names = tuple(inner.name for inner in classes)
    return ImagePart.all_of(ImageFiles(str(folder), files, targets, names), np.asarray(targets)), names


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, by name, but for what is hidden.

    Raises:
        InputError: it cannot be read, or holds a link to what is not there.
    """
    try:
        with os.scandir(folder) as found:  # which knows links without asking for each file
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}.") from error
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise InputError(
                f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there: restore it, or remove it."
            )
    return sorted(Path(entry.path) for entry in entries)


def _folders(folder: Path) -> list[Path]:
    """Sub-folders by name, but for hidden ones."""
    return [path for path in _entries(folder) if path.is_dir()]


def _images(folder: Path) -> tuple[list[Path], int]:
    """The image files in a folder, by name, and how many entries are none by their names; hidden ones do not count."""
    Image.init()
    suffixes = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    entries = _entries(folder)
    images = [path for path in entries if path.suffix.lower() in suffixes and path.is_file()]
    return images, len(entries) - len(images)


def image_size(file: Path) -> tuple[int, int]:
    """Width and height of an image in pixels, from its file's head.

    Raises:
        InputError: it cannot be taken as an image.
    """
    try:
        if not file.stat().st_size:
            raise InputError(f"{file} is empty (0 bytes): repair it, or move it away.")
        with Image.open(file) as image:
            mode, size, too_deep = image.mode, image.size, is_deep(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be taken as an image ({told(error)}): repair it, or move it away.") from error
    if too_deep:
        raise InputError(f"{file} has pixels deeper than a byte (mode {mode}): convert it to RGB or grey first.")
    return size
