"""A benchmark of real images that come inside scikit-learn and scikit-image: nothing is downloaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import transforms

from distributed_eg.benchmarks import benchmark
from distributed_eg.benchmarks.benchmark import Benchmark, images_per_class
from distributed_eg.errors import InputError

TILES_PER_PHOTOGRAPH = 80  # about; enough that both splits show every part of it
PATCH_PER_TILE = 0.8  # patch side / tile side: the rest is room for the patch to move in
MIN_TILE_STD = 4.0  # grey levels of 255; a flatter tile (empty background) does not tell what it belongs to


@dataclass(frozen=True)
class EmbeddedTask:
    """One task: tell apart its classes, each a digit (0 ... 9) or a photograph (its file name)."""

    name: str
    domain: str
    classes: tuple[int | str, ...]


TASKS: tuple[EmbeddedTask, ...] = (
    EmbeddedTask("cat-flower-rocket", "photographs", ("chelsea.png", "flower.jpg", "rocket.jpg")),
    EmbeddedTask("digits-0-1-4", "handwriting", (0, 1, 4)),
    EmbeddedTask("brick-grass-gravel", "textures", ("brick.png", "grass.png", "gravel.png")),
    EmbeddedTask("pagoda-coffee-coins", "photographs", ("china.jpg", "coffee.png", "coins.png")),
    EmbeddedTask("digits-5-6-7", "handwriting", (5, 6, 7)),
    EmbeddedTask("tissue-retina", "medicine", ("ihc.png", "retina.jpg")),
    EmbeddedTask("galaxies-moon", "space", ("hubble_deep_field.jpg", "moon.png")),
    EmbeddedTask("print-ink", "documents", ("page.png", "text.png")),
)


def embedded(
    size: int, train_per_task: int | Sequence[int], test_per_task: int | Sequence[int], seed: int
) -> Benchmark:
    """Eight tasks of two or three classes; ``size`` is the side of an image in pixels."""
    counts = [len(task.classes) for task in TASKS]
    num_train = images_per_class("train_per_task", train_per_task, counts)
    num_test = images_per_class("test_per_task", test_per_task, counts)
    digits = {  # before photographs are drawn from, which takes a while
        source: _digits(source, num_train[index] + num_test[index])
        for index, task in enumerate(TASKS)
        for source in task.classes
        if isinstance(source, int)
    }
    train, test = [], []
    first_class = 0
    names = [
        f"digit {source}" if isinstance(source, int) else Path(source).stem for task in TASKS for source in task.classes
    ]
    for index, task in enumerate(TASKS):
        parts = []
        for position, source in enumerate(task.classes):
            rng = np.random.default_rng([seed, index, position])
            if isinstance(source, int):
                parts.append(_digit_images(digits[source], num_train[index], num_test[index], size, rng))
            else:
                photograph = read_photograph(source)
                side, train_tiles, test_tiles = patch_tiles(photograph)
                # The test images come first: they stay the same, however many there are to train on.
                test_part = cut_patches(photograph, test_tiles, side, num_test[index], size, rng)
                parts.append((cut_patches(photograph, train_tiles, side, num_train[index], size, rng), test_part))
        train_parts, test_parts = zip(*parts, strict=True)
        train.append(_dataset(train_parts, first_class))
        test.append(_dataset(test_parts, first_class))
        first_class += len(task.classes)
    normalize = transforms.Normalize(benchmark.IMAGENET_MEAN, benchmark.IMAGENET_STD)
    return Benchmark(
        name="embedded",
        scenario=benchmark.task_incremental(train, test),
        task_names=tuple(task.name for task in TASKS),
        domains=tuple(task.domain for task in TASKS),
        shape=(3, size, size),
        class_names=dict(enumerate(names)),
        # The images were resized before they were kept: what is saved of them is of that size.
        transform=transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor(), normalize]),
        labels=tuple(range(len(TASKS))),
    )


def read_photograph(file_name: str) -> Image.Image:
    """The photograph `file_name` of scikit-image or scikit-learn, in RGB."""
    # Read from the package folders: scikit-image's own loaders may download.
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        path = _package(package) / folder / file_name
        if path.is_file():
            return Image.open(path).convert("RGB")
    raise InputError(f"The installed scikit-image and scikit-learn do not carry {file_name}; install newer ones.")


def patch_tiles(photograph: Image.Image) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]]:
    """The tile side and the (left, top) corners of the training tiles and of the test tiles, all in pixels.

    The photograph is cut into square tiles that share no pixel; every third one, along diagonals, is for the
    test. Flat tiles belong to neither.
    """
    grey = np.asarray(photograph.convert("L"), dtype=np.float32)
    height, width = grey.shape
    side = math.isqrt(height * width // TILES_PER_PHOTOGRAPH)
    train: list[tuple[int, int]] = []
    test: list[tuple[int, int]] = []
    for row in range(height // side):
        for column in range(width // side):
            left, top = column * side, row * side
            if grey[top : top + side, left : left + side].std() >= MIN_TILE_STD:
                (test if (row + column) % 3 == 0 else train).append((left, top))
    return side, train, test


def cut_patches(
    photograph: Image.Image,
    tiles: Sequence[tuple[int, int]],
    side: int,
    count: int,
    size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """`count` patches, (count, size, size, 3) uint8, from random places of `tiles` (`side` pixels wide) in turn."""
    patch = int(side * PATCH_PER_TILE)
    order = rng.permutation(len(tiles))
    patches = []
    for number in range(count):
        left, top = np.add(tiles[order[number % len(tiles)]], rng.integers(0, side - patch + 1, size=2)).tolist()
        # Cropped, then resized: the other way round the pixels of a neighbouring tile would blend in.
        patches.append(_resized(photograph.crop((left, top, left + patch, top + patch)), size))
    return np.stack(patches)


def _digits(digit: int, at_least: int) -> np.ndarray:
    """All images of one handwritten digit, 8 × 8, grey levels 0 … 16.

    Raises:
        InputError: there are fewer.
    """
    _package("sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images: np.ndarray = digits.images[digits.target == digit]
    if at_least > len(images):
        raise InputError(
            f"The embedded benchmark has {len(images)} images of the digit {digit}, and {at_least} to train or test on"
            " were asked for: lower train_per_task or test_per_task."
        )
    return images


def _digit_images(
    images: np.ndarray, num_train: int, num_test: int, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Training and test images of those of one digit, (N, size, size, 3) uint8, no sample in both."""
    order = rng.permutation(len(images))[: num_test + num_train]
    grey = (images[order] * (255 / 16)).round().astype(np.uint8)
    pictures = np.stack([_resized(Image.fromarray(image).convert("RGB"), size) for image in grey])
    return pictures[num_test:], pictures[:num_test]


def _resized(image: Image.Image, size: int) -> np.ndarray:
    # Pillow resizes bytes in integer arithmetic: the same bytes on every machine.
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _dataset(class_images: Sequence[np.ndarray], first_class: int) -> ClassificationDataset:
    """One task's images, (N, size, size, 3) uint8 a class, as normalised (N, 3, size, size) float32."""
    pixels = torch.from_numpy(np.concatenate(class_images)).permute(0, 3, 1, 2).contiguous().float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (benchmark.IMAGENET_MEAN, benchmark.IMAGENET_STD))
    targets = [first_class + k for k, images in enumerate(class_images) for _ in images]
    return benchmark.labelled(TensorDataset((pixels - mean) / std, torch.tensor(targets)), targets)


def _package(name: str) -> Path:
    """The folder of an installed package of the extra "demo"."""
    try:
        return Path(str(files(name)))
    except ModuleNotFoundError as error:
        raise InputError(
            f"The embedded benchmark needs {name}, which is missing: pip install 'distributed-eg[demo]'."
        ) from error
