"""Which task sequences have names, and what is known of their data before anything heavy is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = "embedded"

IN_TURNS: Mapping[str, tuple[str, ...]] = {"split-mnist+fashion": ("split-mnist", "split-fashion-mnist")}
"""Names that hold a plus themselves: their datasets take turns."""

MEDMNIST: Mapping[str, tuple[int, str]] = {
    "pathmnist": (9, "RGB"),
    "dermamnist": (7, "RGB"),
    "octmnist": (4, "grey"),
    "pneumoniamnist": (2, "grey"),
    "retinamnist": (5, "RGB"),
    "breastmnist": (2, "grey"),
    "bloodmnist": (8, "RGB"),
    "tissuemnist": (8, "grey"),
    "organamnist": (11, "grey"),
    "organcmnist": (11, "grey"),
    "organsmnist": (11, "grey"),
}
"""Those of MedMNIST whose images are flat and of one class each, with their classes and colours."""


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """A dataset in a folder, as it is published."""

    source: str
    """What it is called; its class in ``torchvision.datasets`` where torchvision opens it."""
    num_classes: int
    image: str
    """Width × height in pixels where all are alike, and colours."""
    licence: str
    """As its authors state it."""
    place: str
    """A path inside the folder that is there once the dataset is."""
    home: str | None = None
    """Where it is to be had; None where torchvision downloads it."""


@dataclass(frozen=True, kw_only=True)
class TorchvisionSet(KnownSet):
    """A dataset that torchvision opens from a folder, and how."""

    parts: tuple[Mapping[str, object], ...] = ({"split": "train"}, {"split": "test"})
    """Arguments that open the training part, and the test part; where there is none, it is a seeded share."""
    targets: str = "_labels"
    """Attribute that holds a class for each image, or pairs of file and class."""
    first_target: int = 0

    @property
    def classes_per_task(self) -> int:
        """Where nobody says another number."""
        return 2 if self.num_classes <= 26 else 10


_BY_TRAIN = ({"train": True}, {"train": False})
_TRAINVAL = ({"split": "trainval"}, {"split": "test"})
_UNSTATED = "not stated"

TORCHVISION: Mapping[str, TorchvisionSet] = {
    "split-mnist": TorchvisionSet(
        source="MNIST",
        num_classes=10,
        image="28×28 grey",
        licence="CC BY-SA 3.0",
        place="MNIST/raw/train-images-idx3-ubyte",
        targets="targets",
        parts=_BY_TRAIN,
    ),
    "split-fashion-mnist": TorchvisionSet(
        source="FashionMNIST",
        num_classes=10,
        image="28×28 grey",
        licence="MIT",
        place="FashionMNIST/raw/train-images-idx3-ubyte",
        targets="targets",
        parts=_BY_TRAIN,
    ),
    "split-kmnist": TorchvisionSet(
        source="KMNIST",
        num_classes=10,
        image="28×28 grey",
        licence="CC BY-SA 4.0",
        place="KMNIST/raw/train-images-idx3-ubyte",
        targets="targets",
        parts=_BY_TRAIN,
    ),
    "split-emnist-letters": TorchvisionSet(
        source="EMNIST",
        num_classes=26,
        image="28×28 grey",
        licence=_UNSTATED,
        place="EMNIST/raw/emnist-letters-train-images-idx3-ubyte",
        targets="targets",
        first_target=1,
        parts=({"split": "letters", "train": True}, {"split": "letters", "train": False}),
    ),
    "split-usps": TorchvisionSet(
        source="USPS",
        num_classes=10,
        image="16×16 grey",
        licence=_UNSTATED,
        place="usps.bz2",
        targets="targets",
        parts=_BY_TRAIN,
    ),
    "split-svhn": TorchvisionSet(
        source="SVHN",
        num_classes=10,
        image="32×32 RGB",
        licence="non-commercial use only",
        place="train_32x32.mat",
        targets="labels",
    ),
    "split-cifar10": TorchvisionSet(
        source="CIFAR10",
        num_classes=10,
        image="32×32 RGB",
        licence=_UNSTATED,
        place="cifar-10-batches-py",
        targets="targets",
        parts=_BY_TRAIN,
    ),
    "split-cifar100": TorchvisionSet(
        source="CIFAR100",
        num_classes=100,
        image="32×32 RGB",
        licence=_UNSTATED,
        place="cifar-100-python",
        targets="targets",
        parts=_BY_TRAIN,
    ),
    "split-flowers102": TorchvisionSet(
        source="Flowers102", num_classes=102, image="RGB", licence=_UNSTATED, place="flowers-102/jpg"
    ),
    "split-fgvc-aircraft": TorchvisionSet(
        source="FGVCAircraft",
        num_classes=100,
        image="RGB",
        licence="non-commercial research only",
        place="fgvc-aircraft-2013b/data",
        parts=_TRAINVAL,
    ),
    "split-stanford-cars": TorchvisionSet(
        source="StanfordCars",
        num_classes=196,
        image="RGB",
        licence=_UNSTATED,
        place="stanford_cars/devkit",
        home="https://github.com/pytorch/vision/issues/7545",
        targets="_samples",
    ),
    "split-food101": TorchvisionSet(
        source="Food101",
        num_classes=101,
        image="RGB",
        licence="scientific fair use; the images are Foodspotting's",
        place="food-101/images",
    ),
    "split-dtd": TorchvisionSet(
        source="DTD", num_classes=47, image="RGB", licence="research only", place="dtd/dtd/images"
    ),
    "split-eurosat": TorchvisionSet(
        source="EuroSAT",
        num_classes=10,
        image="64×64 RGB",
        licence="MIT",
        place="eurosat/2750",
        targets="targets",
        parts=({},),
    ),
    "split-gtsrb": TorchvisionSet(
        source="GTSRB", num_classes=43, image="RGB", licence=_UNSTATED, place="gtsrb/GTSRB", targets="_samples"
    ),
    "split-oxford-iiit-pet": TorchvisionSet(
        source="OxfordIIITPet",
        num_classes=37,
        image="RGB",
        licence="CC BY-SA 4.0",
        place="oxford-iiit-pet/images",
        parts=_TRAINVAL,
    ),
}

PUBLISHED: Mapping[str, KnownSet] = {
    "scenes": KnownSet(
        source="MIT Scenes 67",
        num_classes=67,
        image="RGB",
        licence=_UNSTATED,
        place="indoorCVPR_09/TrainImages.txt",
        home="https://web.mit.edu/torralba/www/indoor.html",
    ),
    "birds": KnownSet(
        source="CUB-200-2011",
        num_classes=200,
        image="RGB",
        licence=_UNSTATED,
        place="CUB_200_2011/images",
        home="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    ),
    "actions": KnownSet(
        source="VOC 2012 Actions",
        num_classes=11,
        image="RGB",
        licence="flickr's terms of use",
        place="VOCdevkit/VOC2012/ImageSets/Action",
        home="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    ),
}
"""Those of the paper's datasets that torchvision does not open; they have no benchmarks of their own."""

_PAPER_3 = ("scenes", "birds", "split-flowers102")
PAPER: Mapping[str, tuple[str, ...]] = {
    "paper-3": _PAPER_3,
    "paper-6": (*_PAPER_3, "split-stanford-cars", "split-fgvc-aircraft", "actions"),
}
"""The paper's two sequences: each dataset is one task."""

BENCHMARKS: tuple[str, ...] = (EMBEDDED, *TORCHVISION, *IN_TURNS, *PAPER)
"""The names that stand for themselves; ``names.py`` says what can be made of them."""


@dataclass(frozen=True)
class BenchmarkLine:
    """One task sequence, as it is listed."""

    name: str
    num_tasks: int | None
    """None: the data say."""
    num_classes: int | None
    image: str
    licence: str
    needs: str
    """What must be where."""
    is_there: bool | None
    """Whether it was found; None where nobody said where to look."""


def known_set(name: str) -> KnownSet:
    """The dataset of a name in `TORCHVISION` or `PUBLISHED`."""
    return PUBLISHED[name] if name in PUBLISHED else TORCHVISION[name]


def listed(data: str | None) -> list[BenchmarkLine]:
    """Every name, and whether its data are in the folder ``data``, as far as a look at the paths can tell."""
    has_packages = all(importlib.util.find_spec(name) is not None for name in ("skimage", "sklearn"))
    photographs = "scikit-image's and scikit-learn's"
    lines = [BenchmarkLine(EMBEDDED, 8, 22, "RGB", photographs, "the extra demo", has_packages)]
    for name, parts in {**{name: (name,) for name in TORCHVISION}, **IN_TURNS}.items():
        cut = [TORCHVISION[part] for part in parts]
        lines.append(_line(name, sum(num_tasks(part.num_classes, part.classes_per_task) for part in cut), cut, data))
    lines += [_line(name, len(parts), [known_set(part) for part in parts], data) for name, parts in PAPER.items()]
    for name, (num_classes, colours) in MEDMNIST.items():
        licence = "CC BY-NC 4.0" if name == "dermamnist" else "CC BY 4.0"
        found = None if data is None else (Path(data) / f"{name}.npz").is_file()
        needs = f"{name}.npz; the extra medmnist"
        lines.append(BenchmarkLine(f"medmnist:{name}", 1, num_classes, f"28×28 {colours}", licence, needs, found))
    own = "the owner's"
    lines.append(BenchmarkLine("folder:PATH", None, None, "any", own, "image files in a folder a class", None))
    lines.append(BenchmarkLine("hf:PATH", None, None, "any", own, "datasets' save_to_disk; the extra hf", None))
    return lines


def num_tasks(num_classes: int, classes_per_task: int) -> int:
    """Into how many tasks classes are split: one that would be alone in the last task joins the one before it."""
    return max(1, -(-num_classes // classes_per_task) - (num_classes % classes_per_task == 1 < classes_per_task))


def _line(name: str, tasks: int, known: Sequence[KnownSet], data: str | None) -> BenchmarkLine:
    classes = sum(part.num_classes for part in known)
    licences = "; ".join(dict.fromkeys(part.licence for part in known))
    needs = ", ".join(part.place for part in known)
    is_there = None if data is None else all((Path(data) / part.place).exists() for part in known)
    return BenchmarkLine(name, tasks, classes, known[0].image, licences, needs, is_there)
