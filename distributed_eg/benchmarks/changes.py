"""What makes another task of the same images: turned, or with their pixels in another order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from distributed_eg.benchmarks.names import Change


@dataclass(frozen=True)
class Rotated:
    """Turns an image, before it is resized; what comes into its corners is black."""

    degrees: float

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image turned counter-clockwise, as large as it was."""
        return image.rotate(self.degrees, resample=Image.Resampling.BILINEAR)

    def __str__(self) -> str:
        return f"rotated {self.degrees:g}°"


@dataclass(frozen=True)
class Permuted:
    """Puts the pixels of what the network is given into an order of their own."""

    seed: int
    number: int

    def __call__(self, image: Tensor) -> Tensor:
        """The image (channels, height, width) with its pixels in another order, the same for all images."""
        # Made anew for each image: an order of every task would travel with it, and be as large as an image.
        order = np.random.default_rng([self.seed, self.number]).permutation(image[0].numel())
        return image.flatten(1)[:, order].view_as(image)

    def __str__(self) -> str:
        return f"permuted {self.number}"


Changed: TypeAlias = Rotated | Permuted


def changes_of(change: Change | None, seed: int) -> list[Changed | None]:
    """Every way in which images are changed: first not at all, then by orders of this seed, or by angles as far apart
    as they can be."""
    if change is None:
        return [None]
    others: list[Changed | None] = [
        Permuted(seed, number) if change.kind == "permuted" else Rotated(360 * number / change.count)
        for number in range(1, change.count)
    ]
    return [None, *others]
