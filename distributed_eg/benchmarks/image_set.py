"""A dataset of images with their classes, in a training and a test part: what tasks are views of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from distributed_eg.errors import InputError

TEST_SHARE = 0.2
"""Of the images of each class, where a dataset has no test part of its own."""


@dataclass(frozen=True)
class ImagePart:
    """The training or the test images of a dataset."""

    leaf: Dataset[Any]
    """Gives (Pillow image, target); it may hold other images, too."""
    rows: npt.NDArray[np.int64]
    """Which of the leaf's."""
    classes: npt.NDArray[np.int64]
    """Of each row, from 0."""

    @staticmethod
    def all_of(leaf: Dataset[Any], classes: npt.ArrayLike) -> ImagePart:
        """Every image of a leaf, of these classes.

        Raises:
            InputError: there are more or fewer.
        """
        found = np.asarray(classes, dtype=np.int64)
        if len(found) != len(leaf):  # type: ignore[arg-type]
            kind, num_images = type(leaf).__name__, len(leaf)  # type: ignore[arg-type]
            raise InputError(f"{kind} holds {num_images} images and the classes of {len(found)}: it is damaged.")
        return ImagePart(leaf, np.arange(len(found)), found)


@dataclass(frozen=True)
class ImageSet:
    """A dataset whose every class has images to train and to test on."""

    name: str
    class_names: tuple[str, ...]
    train: ImagePart
    test: ImagePart
    first_target: int = 0
    """Target of class 0 in the leaves."""

    def __post_init__(self) -> None:
        for what, part in (("training", self.train), ("test", self.test)):
            strangers = set(np.unique(part.classes).tolist()) - set(range(len(self.class_names)))
            if strangers:
                raise InputError(
                    f"{self.name} has {len(self.class_names)} classes, and {what} images of the targets "
                    f"{sorted(c + self.first_target for c in strangers)}: it is damaged, or of another version."
                )
            for c, count in enumerate(np.bincount(part.classes, minlength=len(self.class_names)).tolist()):
                if not count:
                    raise InputError(f"{self.name} has no {what} images of its class {self.class_names[c]!r}.")
        if len(self.class_names) < 2:
            raise InputError(
                f"{self.name} has one class only ({self.class_names[0]!r}): an expert has nothing to tell apart there."
            )


def split_off_test(part: ImagePart, name: str, class_names: Sequence[str], seed: int) -> tuple[ImagePart, ImagePart]:
    """A training and a test part that share no image: a seeded `TEST_SHARE` of each class, one at least.

    Raises:
        InputError: a class has one image only.
    """
    in_test = np.zeros(len(part.rows), dtype=bool)
    for c, class_name in enumerate(class_names):
        mine = np.flatnonzero(part.classes == c)
        if len(mine) == 1:
            raise InputError(
                f"The class {class_name!r} of {name} has one image: it takes one to train and one to test on."
            )
        drawn = np.random.default_rng([seed, c]).permutation(mine)
        in_test[drawn[: max(1, round(TEST_SHARE * len(mine)))]] = True
    train, test = (ImagePart(part.leaf, part.rows[chosen], part.classes[chosen]) for chosen in (~in_test, in_test))
    return train, test
