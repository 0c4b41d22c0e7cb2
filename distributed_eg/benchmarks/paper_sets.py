"""The paper's own sequences, from its datasets as they are published; those that torchvision does not open are read
here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from xml.etree import ElementTree

from PIL import Image

from distributed_eg.benchmarks.catalog import PAPER, PUBLISHED, TORCHVISION, known_set
from distributed_eg.benchmarks.folders import ImageFiles, image_size
from distributed_eg.benchmarks.image_set import ImagePart, ImageSet
from distributed_eg.benchmarks.torchvision_sets import torchvision_set
from distributed_eg.errors import InputError, told

logger = logging.getLogger(__name__)

Box: TypeAlias = tuple[int, int, int, int]
"""Left, upper, right and lower edge in pixels, as Pillow counts them."""


@dataclass(frozen=True)
class Sample:
    """One image of a class, or a part of one."""

    file: str
    """Below the dataset's folder of images."""
    class_name: str
    box: Box | None = None
    """What is cut out of it; it may reach beyond the image."""


class CutOuts(ImageFiles):
    """Parts of image files, cut out when they are read.

    Args:
        boxes: what to cut out of each file, inside its image; the others are those of `ImageFiles`.
    """

    def __init__(
        self, folder: str, files: Sequence[str], targets: Sequence[int], classes: Sequence[str], boxes: Sequence[Box]
    ) -> None:
        super().__init__(folder, files, targets, classes)
        self.boxes = list(boxes)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """What was cut out, in RGB, and its class.

        Raises:
            InputError: its file cannot be read.
        """
        image, target = super().__getitem__(index)
        return image.crop(self.boxes[index]), target


def paper_sets(name: str, data: str | None, *, download: bool, seed: int) -> list[ImageSet]:
    """The datasets of ``paper-3`` or ``paper-6``, in the paper's order, from the sub-folders of ``data`` that they
    unpack to; ``download`` fetches those that torchvision can fetch.

    Each has the training and the test part that it is published with: of Flowers its validation part is left out, and
    of Actions, whose test part has no annotations, the validation part is the test part. A sample of Actions is a
    person with exactly one action, "other" among them, cut out by the bounding box, for nothing else says whose action
    it is; the others are whole images. Whether the paper does the same in all this is open.

    Raises:
        InputError: a dataset is not in the folder, or is damaged.
    """
    is_fetched = download and data is not None
    missing = [
        f"{known.place} (from {known.home or '--download'})"
        for known in map(known_set, PAPER[name])
        if data is None or not os.path.exists(os.path.join(data, known.place))
        if not (is_fetched and known.home is None)
    ]
    if missing or data is None:
        where = "no folder was given" if data is None else f"{data} does not have it"
        raise InputError(
            f"{name} needs {', '.join(missing)}, and {where}: unpack it into DIR, and pass --data DIR "
            "(in Python: data=)."
        )
    root = Path(os.path.abspath(data))
    return [
        torchvision_set(part, data, download=download, seed=seed) if part in TORCHVISION else _published(part, root)
        for part in PAPER[name]
    ]


def _published(name: str, root: Path) -> ImageSet:
    known, (place, samples) = PUBLISHED[name], _READERS[name](root)
    class_names = tuple(sorted({sample.class_name for part in samples for sample in part}))
    if len(class_names) != known.num_classes:
        logger.warning("%s has %d classes here; as published, %d.", known.source, len(class_names), known.num_classes)
    if in_both := {sample.file for sample in samples[0]} & {sample.file for sample in samples[1]}:
        logger.warning("%d files of %s are trained on and tested on: %s, …", len(in_both), known.source, min(in_both))
    train, test = (_part(place, part, class_names) for part in samples)
    return ImageSet(known.source, class_names, train, test)


def _part(folder: Path, samples: Sequence[Sample], class_names: tuple[str, ...]) -> ImagePart:
    """These samples, once the head of each of their files was read."""
    sizes: dict[str, tuple[int, int]] = {}
    for file in dict.fromkeys(sample.file for sample in samples):
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is listed, and not there: unpack the dataset again.")
        sizes[file] = image_size(folder / file)
    files, targets = [s.file for s in samples], [class_names.index(s.class_name) for s in samples]
    boxes = [_inside(s.box, sizes[s.file], folder / s.file) for s in samples if s.box is not None]
    if boxes:
        return ImagePart.all_of(CutOuts(str(folder), files, targets, class_names, boxes), targets)
    return ImagePart.all_of(ImageFiles(str(folder), files, targets, class_names), targets)


def _inside(box: Box, size: tuple[int, int], file: Path) -> Box:
    """The part of a box that lies in an image."""
    left, upper, right, lower = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    if left >= right or upper >= lower:
        raise InputError(
            f"A person in {file} has the box {box}, and the image is {size[0]}×{size[1]}: unpack the dataset again."
        )
    return left, upper, right, lower


def _scenes(root: Path) -> tuple[Path, list[list[Sample]]]:
    """Lines of ``class/file``."""
    folder = root / "indoorCVPR_09"
    lists = [_fields(folder / file, "/", 2) for file in ("TrainImages.txt", "TestImages.txt")]
    return folder / "Images", [[Sample("/".join(row), row[0]) for row in rows] for rows in lists]


def _birds(root: Path) -> tuple[Path, list[list[Sample]]]:
    """Lines that begin with an image's number; its class is the folder that it lies in, and has a number, too."""
    folder = root / "CUB_200_2011"
    names = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    rows = [_fields(folder / name, None, 2) for name in names]
    files, labels, splits = (dict(fields) for fields in rows)
    if not files.keys() == labels.keys() == splits.keys() or any(len(fields) > len(files) for fields in rows):
        raise InputError(f"{', '.join(names)} in {folder} list other images, or one twice: unpack the dataset again.")
    classes = {image: file.partition("/")[0] for image, file in files.items()}
    pairs = {(labels[image], classes[image]) for image in files}
    if not len(pairs) == len(set(labels.values())) == len(set(classes.values())):
        raise InputError(
            f"images.txt and image_class_labels.txt in {folder} have other classes: unpack the dataset again."
        )
    if wrong := set(splits.values()) - {"0", "1"}:
        raise InputError(
            f"{folder / names[2]} has {sorted(wrong)}, and only 1 (training) and 0 (test) are known: unpack the "
            "dataset again."
        )
    parts = [[Sample(files[i], classes[i]) for i in files if splits[i] == part] for part in ("1", "0")]
    return folder / "images", parts


def _actions(root: Path) -> tuple[Path, list[list[Sample]]]:
    """Lines of an image's name; its people stand in its annotation."""
    folder = root / "VOCdevkit" / "VOC2012"
    parts: list[list[Sample]] = []
    num_others = 0
    for file in ("train.txt", "val.txt"):
        parts.append([])
        for (image,) in _fields(folder / "ImageSets" / "Action" / file, None, 1):
            for actions, box in _people(folder / "Annotations" / f"{image}.xml"):
                if len(actions) == 1:
                    parts[-1].append(Sample(f"{image}.jpg", actions[0], box))
                num_others += len(actions) != 1
    if num_others:
        logger.info("%d people in %s have no action or several, and are left out.", num_others, folder)
    return folder / "JPEGImages", parts


_READERS: Mapping[str, Callable[[Path], tuple[Path, list[list[Sample]]]]] = {
    "scenes": _scenes,
    "birds": _birds,
    "actions": _actions,
}
"""What reads a dataset's training and test samples, and the folder that their files lie in."""


def _people(annotation: Path) -> list[tuple[list[str], Box]]:
    """What each person in an image does, and where."""
    people = []
    try:
        for thing in ElementTree.parse(annotation).iterfind("object"):
            if thing.find("actions") is not None:
                actions = [action.tag for action in thing.iterfind("actions/*") if int(action.text or "")]
                edges = (thing.findtext(f"bndbox/{edge}", "") for edge in ("xmin", "ymin", "xmax", "ymax"))
                left, upper, right, lower = (round(float(edge)) for edge in edges)
                # Their first pixel is 1, and the last one belongs to the box.
                people.append((actions, (left - 1, upper - 1, right, lower)))
    except (OSError, ValueError, OverflowError, ElementTree.ParseError) as error:
        raise InputError(f"{annotation} cannot be read ({told(error)}): unpack the dataset again.") from error
    return people


def _fields(path: Path, separator: str | None, count: int) -> list[list[str]]:
    """The fields of each line of a list.

    Raises:
        InputError: the list cannot be read, is empty, or has another line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({told(error)}): it is a part of the dataset.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = line.strip().split(separator)
        if line.strip() and (len(row) != count or not all(row)):
            raise InputError(f"Line {number} of {path} is {line!r}, which names no image: get the list again.")
        if line.strip():
            rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty: get the list again.")
    return rows
