"""The paper's sequences, from a small folder of each dataset's published layout."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from distributed_eg.benchmarks import make_benchmark
from distributed_eg.cli import main
from distributed_eg.errors import InputError
from tests.benchmarks.test_torchvision_trees import aircraft, cars, flowers, picture, text
from tests.benchmarks.test_torchvision_trees import checksums as checksums

VOC = "VOCdevkit/VOC2012"
RED, BLUE = (200, 0, 0), (0, 0, 200)


def scenes(root: Path) -> None:
    base = root / "indoorCVPR_09"
    for part, count in (("Train", 3), ("Test", 2)):
        names = [f"{name}/{part} {k}.jpg" for name in ("winecellar", "bar") for k in range(count)]
        # One of the published lists ends without a line break.
        (base / "Images").mkdir(parents=True, exist_ok=True)
        (base / f"{part}Images.txt").write_text("\n".join(names))
        for k, name in enumerate(names):
            picture(base / "Images" / name, 100 * ("winecellar" in name) + k)


def birds(root: Path) -> None:
    base = root / "CUB_200_2011"
    names = [f"{folder}/{k}.jpg" for folder in ("001.Black_footed_Albatross", "002.Laysan_Albatross") for k in range(4)]
    text(base / "images.txt", *(f"{1 + k} {name}" for k, name in enumerate(names)))
    text(base / "image_class_labels.txt", *(f"{1 + k} {1 + k // 4}" for k in range(8)))
    text(base / "train_test_split.txt", *(f"{1 + k} {int(k % 4 < 3)}" for k in range(8)))
    for k, name in enumerate(names):
        picture(base / "images" / name, k)


def person(box: tuple[float, float, float, float], *actions: str) -> str:
    flags = "".join(f"<{a}>{int(a in actions)}</{a}>" for a in ("jumping", "other", "reading"))
    edges = "".join(f"<{e}>{v}</{e}>" for e, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    part = "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>"
    return f"<object><name>person</name><bndbox>{edges}</bndbox>{part}<actions>{flags}</actions></object>"


def actions(root: Path) -> None:
    """Images with a red left half and a blue right half: those on the left jump, those on the right read."""
    base = root / VOC
    people = (
        person((1, 1, 6, 10), "jumping"),
        person((7.2, 2, 14, 10), "reading"),  # reaches beyond the image
        person((3, 1, 12, 10), "other"),
        person((1, 1, 4, 4), "jumping", "reading"),
        person((1, 1, 4, 4)),
        "<object><name>dog</name><bndbox><xmin>1</xmin></bndbox></object>",
    )
    for part in ("train", "val"):
        text(base / "ImageSets" / "Action" / f"{part}.txt", f"{part}_1", f"{part}_2")
        for name in (f"{part}_1", f"{part}_2"):
            text(base / "Annotations" / f"{name}.xml", f"<annotation>{''.join(people)}</annotation>")
            (base / "JPEGImages").mkdir(exist_ok=True)
            image = Image.new("RGB", (12, 10), RED)
            image.paste(BLUE, (6, 0, 12, 10))
            image.save(base / "JPEGImages" / f"{name}.jpg", quality=100, subsampling=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for make in (scenes, birds, flowers, cars, aircraft, actions):
        make(tmp_path)
    return tmp_path


def test_one_task_a_dataset_in_the_papers_order(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    benchmark = make_benchmark("paper-6", data=root, image_size=8, download=True)  # what is there is not fetched
    names = ("MIT Scenes 67", "CUB-200-2011", "Flowers102", "StanfordCars", "FGVCAircraft", "VOC 2012 Actions")
    assert benchmark.task_names == names
    sizes = [[len(e.dataset) for e in stream] for stream in benchmark.scenario.streams.values()]
    assert sizes == [[6, 6, 102, 6, 6, 6], [4, 2, 102, 6, 6, 6]]
    scenes_, birds_, actions_ = (list(benchmark.class_names.values())[a:b] for a, b in ((0, 2), (2, 4), (112, 115)))
    assert scenes_ == ["bar", "winecellar"]
    assert birds_ == ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    assert actions_ == ["jumping", "other", "reading"]
    assert "MIT Scenes 67 has 2 classes here; as published, 67." in caplog.messages
    assert f"8 people in {root / VOC} have no action or several, and are left out." in caplog.messages
    for image, target, label in benchmark.scenario.test_stream[0].dataset:
        assert (label, target) == (0, int(image[0].mean() > -1))  # the cellars are redder


def test_paper_3_is_its_beginning_and_can_be_split_and_chained(root: Path) -> None:
    benchmark = make_benchmark("paper-3", data=root, image_size=8)
    assert benchmark.task_names == ("MIT Scenes 67", "CUB-200-2011", "Flowers102")
    chained = make_benchmark("paper-3+rotated-2:paper-3", data=root, image_size=8, classes_per_task=51)
    assert len(chained.labels) == 4 + 8
    assert chained.task_names[2:4] == ("Flowers102 0-50", "Flowers102 51-101")


def test_a_person_is_cut_out_by_the_box(root: Path) -> None:
    actions_ = make_benchmark("paper-6", data=root, image_size=8).scenario.test_stream[5].dataset
    dataset = pickle.loads(pickle.dumps(actions_))
    seen = [(target - 112, bool(image[0].max() > 0), bool(image[2].max() > 0)) for image, target, _ in dataset]
    assert seen == 2 * [(0, True, False), (2, False, True), (1, True, True)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(actions_, dataset, strict=True))


def rewritten(path: str, old: str, new: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        before = (root / path).read_text()
        assert old in before
        (root / path).write_text(before.replace(old, new))

    return change


CUB = "CUB_200_2011"
ANNOTATION = f"{VOC}/Annotations/val_1.xml"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda r: (r / "indoorCVPR_09/TestImages.txt").unlink(), r"TestImages.txt cannot be read \(FileNotFoundError"),
        (lambda r: (r / "indoorCVPR_09/TestImages.txt").write_text("\n"), "TestImages.txt is empty"),
        (lambda r: (r / "indoorCVPR_09/TestImages.txt").write_bytes(b"\xff"), "TestImages.txt cannot be read"),
        (rewritten("indoorCVPR_09/TrainImages.txt", "bar/", "bar"), "Line 4 of .*TrainImages.txt is 'barTrain 0.jpg'"),
        (
            rewritten("indoorCVPR_09/TestImages.txt", "bar/Test", "winecellar/Train"),
            "no test images of its class 'bar'",
        ),
        (lambda r: (r / "indoorCVPR_09/Images/bar/Test 1.jpg").unlink(), "bar/Test 1.jpg is listed, and not there"),
        (lambda r: (r / "indoorCVPR_09/Images/bar/Test 1.jpg").write_text("x"), "cannot be taken as an image"),
        (rewritten(f"{CUB}/images.txt", "3 001", "001"), "Line 3 of .*images.txt is '001.Black"),
        (rewritten(f"{CUB}/train_test_split.txt", "8 0\n", ""), "list other images, or one twice"),
        (rewritten(f"{CUB}/train_test_split.txt", "8 0", "8 0\n7 0"), "list other images, or one twice"),
        (rewritten(f"{CUB}/train_test_split.txt", "8 0", "8 2"), r"train_test_split.txt has \['2'\]"),
        (rewritten(f"{CUB}/train_test_split.txt", "8 0", "8 1"), "no test images of its class '002"),
        (rewritten(f"{CUB}/image_class_labels.txt", "4 1", "4 2"), "image_class_labels.txt in .* have other classes"),
        (rewritten(f"{VOC}/ImageSets/Action/val.txt", "val_2", "val_2 1 1"), "Line 2 of .*val.txt is 'val_2 1 1'"),
        (lambda r: (r / ANNOTATION).unlink(), "val_1.xml cannot be read"),
        (rewritten(ANNOTATION, "</annotation>", ""), r"val_1.xml cannot be read \(ParseError"),
        (rewritten(ANNOTATION, "<xmin>7.2</xmin>", ""), r"val_1.xml cannot be read \(ValueError"),
        (rewritten(ANNOTATION, "<jumping>1", "<jumping>yes"), r"val_1.xml cannot be read \(ValueError"),
        (rewritten(ANNOTATION, "7.2", "13"), r"val_1.jpg has the box \(12, 1, 14, 10\), and the image is 12×10"),
    ],
)
def test_what_is_damaged_is_named(damage: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    for make in (scenes, birds, flowers, cars, aircraft, actions):
        make(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=says):
        make_benchmark("paper-6", data=tmp_path)


def test_a_file_that_is_trained_and_tested_on_is_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewritten("indoorCVPR_09/TestImages.txt", "bar/Test 1", "bar/Train 1")(root)
    make_benchmark("paper-3", data=root)
    assert "1 files of MIT Scenes 67 are trained on and tested on: bar/Train 1.jpg, …" in caplog.messages


def test_what_is_missing_is_one_sentence_with_its_place_and_where_it_is_to_be_had(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\(from --download\), and no folder was given: unpack it"):
        make_benchmark("paper-3")
    scenes(tmp_path)
    with pytest.raises(InputError) as refused:
        make_benchmark("paper-3", data=tmp_path)
    assert str(refused.value) == (
        "paper-3 needs CUB_200_2011/images (from https://www.vision.caltech.edu/datasets/cub_200_2011/), "
        f"flowers-102/jpg (from --download), and {tmp_path} does not have it: unpack it into DIR, and pass --data DIR "
        "(in Python: data=)."
    )
    with pytest.raises(InputError, match=r"cub_200_2011/\), and"):  # before anything is fetched
        make_benchmark("paper-3", data=tmp_path, download=True)
    with pytest.raises(InputError, match=r"nothing downloads it; https://github.com/pytorch/vision/issues/7545"):
        make_benchmark("split-stanford-cars", data=tmp_path, download=True)
    assert [path.name for path in tmp_path.iterdir()] == ["indoorCVPR_09"]


def test_they_are_listed_with_what_is_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def there() -> dict[str, tuple[int, int, bool]]:
        main(["benchmarks", "--data", str(root), "--json"])
        (lines,) = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
        assert all(line["licence"] and line["needs"] for line in lines)
        papers = [line for line in lines if line["name"].startswith("paper-")]
        return {line["name"]: (line["num_tasks"], line["num_classes"], line["is_there"]) for line in papers}

    assert there() == {"paper-3": (3, 369, True), "paper-6": (6, 676, True)}
    (root / VOC / "ImageSets" / "Action").rename(root / "elsewhere")
    assert there() == {"paper-3": (3, 369, True), "paper-6": (6, 676, False)}
