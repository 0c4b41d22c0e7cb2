"""Torchvision's datasets, each opened by torchvision itself from a small folder of its published layout."""

from __future__ import annotations

import bz2
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from distributed_eg.benchmarks import make_benchmark
from distributed_eg.benchmarks.catalog import TORCHVISION, listed
from distributed_eg.errors import InputError


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (number, 0, 0)).save(path)


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def usps(root: Path) -> None:
    rows = [f"{1 + k % 10} " + " ".join(f"{i + 1}:-1.0" for i in range(256)) for k in range(20)]
    for name in ("usps.bz2", "usps.t.bz2"):
        (root / name).write_bytes(bz2.compress("\n".join(rows).encode()))


def svhn(root: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    labels = np.array([[1 + k % 10] for k in range(20)], dtype=np.uint8)  # 10 stands for the digit 0
    for part in ("train", "test"):
        savemat(root / f"{part}_32x32.mat", {"X": np.zeros((32, 32, 3, 20), np.uint8), "y": labels})


def flowers(root: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    base = root / "flowers-102"
    for number in range(1, 205):
        picture(base / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(base / "imagelabels.mat", {"labels": [1 + k % 102 for k in range(204)]})
    savemat(base / "setid.mat", {"trnid": list(range(1, 103)), "valid": [1], "tstid": list(range(103, 205))})


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    text(data / "variants.txt", "707-320", "A300", "Cessna 172")
    for part in ("trainval", "test"):
        names = [f"{part}{k}" for k in range(6)]
        text(
            data / f"images_variant_{part}.txt",
            *(f"{n} {('707-320', 'A300', 'Cessna 172')[k % 3]}" for k, n in enumerate(names)),
        )
        for k, name in enumerate(names):
            picture(data / "images" / f"{name}.jpg", k)


def cars(root: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = np.array(["Audi TT", "Saab 900", "Volvo 240"], dtype=object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    for part, file in (
        ("train", base / "devkit" / "cars_train_annos.mat"),
        ("test", base / "cars_test_annos_withlabels.mat"),
    ):
        rows = np.zeros(6, dtype=[("fname", object), ("class", object)])
        for k in range(6):
            rows[k] = (f"{k:05d}.jpg", 1 + k % 3)
            picture(base / f"cars_{part}" / f"{k:05d}.jpg", k)
        savemat(file, {"annotations": rows})


def food(root: Path) -> None:
    base = root / "food-101"
    for part in ("train", "test"):
        listed = {name: [f"{name}/{part}{k}" for k in range(2)] for name in ("pie", "soup")}
        text(base / "meta" / f"{part}.json", json.dumps(listed))
        for k, name in enumerate(path for paths in listed.values() for path in paths):
            picture(base / "images" / f"{name}.jpg", k)


def dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    for part in ("train", "test"):
        names = [f"{name}/{part}{k}.jpg" for name in ("dotted", "woven") for k in range(2)]
        text(base / "labels" / f"{part}1.txt", *names)
        for k, name in enumerate(names):
            picture(base / "images" / name, k)


def eurosat(root: Path) -> None:
    for name in ("Forest", "River"):
        for k in range(10):
            picture(root / "eurosat" / "2750" / name / f"{k}.jpg", k)


def gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for c in range(43):
        picture(base / "GTSRB" / "Training" / f"{c:05d}" / "0.ppm", c)
        picture(base / "GTSRB" / "Final_Test" / "Images" / f"{c:05d}.ppm", c)
        rows.append(f"{c:05d}.ppm;12;10;1;1;9;9;{c}")
    text(base / "GT-final_test.csv", *rows)


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for part in ("trainval", "test"):
        names = [f"{name}_{part}{k}" for name in ("Abyssinian", "beagle") for k in range(2)]
        text(base / "annotations" / f"{part}.txt", *(f"{name} {1 + k // 2} 1 1" for k, name in enumerate(names)))
        (base / "annotations" / "trimaps").mkdir(exist_ok=True)
        for k, name in enumerate(names):
            picture(base / "images" / f"{name}.jpg", k)


TREES: dict[str, tuple[Callable[[Path], None], int, int, str]] = {
    "split-usps": (usps, 5, 10, "USPS 0"),
    "split-svhn": (svhn, 5, 10, "SVHN 0"),
    "split-flowers102": (flowers, 11, 102, "pink primrose"),
    "split-fgvc-aircraft": (aircraft, 1, 3, "707-320"),
    "split-stanford-cars": (cars, 1, 3, "Audi TT"),
    "split-food101": (food, 1, 2, "pie"),
    "split-dtd": (dtd, 1, 2, "dotted"),
    "split-eurosat": (eurosat, 1, 2, "Forest"),
    "split-gtsrb": (gtsrb, 5, 43, "GTSRB 0"),
    "split-oxford-iiit-pet": (pets, 1, 2, "Abyssinian"),
}


@pytest.fixture(autouse=True)
def checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the published files are not those of these."""
    for name in ("SVHN", "Flowers102"):
        monkeypatch.setattr(getattr(datasets, name), "_check_integrity", lambda self: True)


@pytest.mark.parametrize("name", TREES)
def test_it_is_opened_and_split(name: str, tmp_path: Path) -> None:
    make, num_tasks, num_classes, first_name = TREES[name]
    assert not {line.name: line.is_there for line in listed(str(tmp_path))}[name]
    make(tmp_path)
    assert {line.name: line.is_there for line in listed(str(tmp_path))}[name]
    benchmark = make_benchmark(name, data=tmp_path, image_size=8)
    assert (len(benchmark.labels), benchmark.num_classes, benchmark.class_names[0]) == (
        num_tasks,
        num_classes,
        first_name,
    )
    assert benchmark.domains[0] == TORCHVISION[name].source
    for stream in benchmark.scenario.streams.values():
        seen = set()
        for experience in stream:
            dataset = experience.dataset
            samples = [dataset[k] for k in range(len(dataset))]
            assert [target for _, target, _ in samples] == list(dataset.targets)
            assert {tuple(image.shape) for image, *_ in samples} == {(3, 8, 8)}
            seen |= set(dataset.targets)
        assert seen == set(range(num_classes))


def test_letters_count_from_a_and_a_cut_off_file_is_told(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    labels = bytes(1 + k % 26 for k in range(52))
    for part in ("train", "test"):
        head = (8 * 256 + 3).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (52, 28, 28))
        (raw / f"emnist-letters-{part}-images-idx3-ubyte").write_bytes(head + bytes(52 * 28 * 28))
        head = (8 * 256 + 1).to_bytes(4, "big") + (52).to_bytes(4, "big")
        (raw / f"emnist-letters-{part}-labels-idx1-ubyte").write_bytes(head + labels)
    benchmark = make_benchmark("split-emnist-letters", data=tmp_path, image_size=8)
    assert len(benchmark.labels) == 13
    assert (benchmark.class_names[0], benchmark.class_names[25]) == ("a", "z")
    last = benchmark.scenario.test_stream[12].dataset
    assert [target for _, target, _ in last] == [24, 25, 24, 25]
    (raw / "emnist-letters-test-labels-idx1-ubyte").write_bytes(b"\0\0")
    with pytest.raises(InputError, match="does not have it, or not whole"):
        make_benchmark("split-emnist-letters", data=tmp_path)
