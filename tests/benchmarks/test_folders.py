"""Image files in folders: which tasks they make, what is refused before training and by which sentence."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_eg import ExpertGate
from distributed_eg.benchmarks import Benchmark, make_benchmark
from distributed_eg.benchmarks.folders import ImageFiles, folder_sets
from distributed_eg.errors import HookError, InputError
from tests.helpers import tiny_net, tiny_strategy

COLOURS = {"crow": (200, 0, 0), "gull": (0, 200, 0), "owl": (0, 0, 200), "audi": (200, 200, 0), "saab": (0, 200, 200)}


def fill(folder: Path, classes: tuple[str, ...], count: int) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 12 + number), COLOURS[name]).save(folder / name / f"{number}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset with a test part, and one without."""
    fill(tmp_path / "birds" / "train", ("crow", "gull", "owl"), 5)
    fill(tmp_path / "birds" / "test", ("crow", "gull", "owl"), 2)
    fill(tmp_path / "cars", ("audi", "saab"), 10)
    return tmp_path


def made(root: Path, **options: object) -> Benchmark:
    return make_benchmark(f"folder:{root}", image_size=16, **options)


def test_a_task_for_each_sub_folder(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "birds" / "train" / "crow" / "notes.txt").write_text("no image")
    (root / "birds" / "train" / "gull" / "more").mkdir()
    (root / ".cache").mkdir()
    benchmark = made(root)
    said = f"2 entries of {root}/birds/train and of the folders in it are no images of a class by their names"
    assert any(message.startswith(said) for message in caplog.messages)
    assert benchmark.task_names == ("birds", "cars")
    assert benchmark.class_names == {0: "crow", 1: "gull", 2: "owl", 3: "audi", 4: "saab"}
    sizes = [[len(e.dataset) for e in stream] for stream in benchmark.scenario.streams.values()]
    assert sizes == [[15, 16], [6, 4]]
    for experience in benchmark.scenario.test_stream:
        for image, target, label in experience.dataset:
            assert label == experience.task_label
            assert image.shape == (3, 16, 16)
            brightest = image.amax((1, 2)) > 0
            expected = torch.tensor(COLOURS[benchmark.class_names[target]]) > 0
            assert torch.equal(brightest, expected)


def test_train_and_test_images_differ_and_follow_the_seed(root: Path) -> None:
    def files(seed: int) -> tuple[set[str], set[str]]:
        cars = folder_sets(str(root), seed)[1]
        return tuple({cars.train.leaf.files[row] for row in part.rows} for part in (cars.train, cars.test))

    train, test = files(0)
    assert not train & test
    assert (len(train), len(test)) == (16, 4)
    assert files(0) == (train, test) != files(1)


def test_one_dataset_is_split_by_classes(root: Path) -> None:
    assert made(root / "birds", classes_per_task=2).task_names == ("birds",)  # nobody is left alone
    fill(root / "birds" / "train", ("audi",), 2)
    fill(root / "birds" / "val", ("audi", "crow"), 2)  # not read where there is test/
    fill(root / "birds" / "test", ("audi",), 2)
    assert made(root / "birds", classes_per_task=2).task_names == ("birds 0-1", "birds 2-3")


def test_grey_transparent_and_palette_images_become_rgb(root: Path) -> None:
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.new(mode, (9, 9)).save(root / "cars" / "audi" / f"{mode}.{suffix}")
    leaf = folder_sets(str(root), 0)[1].train.leaf
    assert {leaf[k][0].mode for k in range(len(leaf))} == {"RGB"}


def deep(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(path)


def huge(path: Path) -> None:
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    path.write_bytes(head + zlib.crc32(head[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT" + b"\x35\xaf\x06\x1e")


def deep_colours(path: Path) -> None:
    """Two bytes a colour, which Pillow opens as RGB."""
    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    parts = {b"IHDR": head, b"IDAT": zlib.compress(bytes(4 * (1 + 4 * 6))), b"IEND": b""}
    chunks = [
        struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts.items()
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
        (deep_colours, "pixels deeper than a byte (mode RGB)"),
        (lambda path: path.symlink_to("gone.png"), "is a link to gone.png, which is not there"),
        (lambda path: path.write_bytes(b"not a picture"), "cannot be taken as an image"),
        (deep, "pixels deeper than a byte (mode I;16)"),
        (huge, "DecompressionBombError"),
    ],
)
def test_a_file_that_is_no_usable_image_is_named(root: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(root / "cars" / "audi" / "bad.png")
    with pytest.raises(InputError) as caught:
        made(root)
    assert str(root / "cars" / "audi" / "bad.png") in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def _empty_class(root: Path) -> str:
    (root / "cars" / "volvo").mkdir()
    return f"{root}/cars/volvo has no images in it"


def _one_class(root: Path) -> str:
    fill(root / "planes", ("audi",), 3)
    return f"{root}/planes has one class only ('audi')"


def _one_image(root: Path) -> str:
    fill(root / "planes", ("audi", "saab"), 1)
    return f"The class 'audi' of {root}/planes has one image"


def _other_classes(root: Path) -> str:
    fill(root / "birds" / "test", ("saab",), 1)
    return f"{root}/birds/train and {root}/birds/test have other classes: only test/ has 'saab'."


def _no_images(root: Path) -> str:
    (root / "planes").mkdir()
    return f"{root}/planes holds neither train/ and test/ nor a folder of images for each class"


def _capitals(root: Path) -> str:
    (root / "birds" / "test").rename(root / "birds" / "Test")
    return f"{root}/birds has Test/, a part of a dataset by its name, and it would not be read as one: call the parts"


def _another_word(root: Path) -> str:
    fill(root / "birds" / "valid", ("crow", "gull", "owl"), 1)
    return f"{root}/birds has valid/, a part of a dataset"


def _a_class_that_is_gone(root: Path) -> str:
    (root / "cars" / "volvo").symlink_to("/gone/volvo")
    return f"{root}/cars/volvo is a link to /gone/volvo, which is not there"


SPOILED = [_empty_class, _one_class, _one_image, _other_classes, _no_images]
SPOILED += [_capitals, _another_word, _a_class_that_is_gone]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_folder_that_makes_no_task_is_named(root: Path, spoil: Callable[[Path], str]) -> None:
    says = spoil(root)
    with pytest.raises(InputError) as caught:
        made(root)
    assert says in str(caught.value)


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "test"), ("test", "test2"), ("val", "cars")])
def test_parts_that_are_called_otherwise_are_no_tasks(tmp_path: Path, names: tuple[str, str]) -> None:
    """Else the test images would be trained on."""
    for name in names:
        fill(tmp_path / name, ("audi", "saab"), 3)
    with pytest.raises(InputError, match=r"a part of a dataset by its name"):
        made(tmp_path)


def test_classes_may_be_called_as_parts(tmp_path: Path) -> None:
    fill(tmp_path, ("audi", "saab"), 4)
    (tmp_path / "audi").rename(tmp_path / "test")
    assert made(tmp_path).class_names == {0: "saab", 1: "test"}


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path} holds neither"):
        made(tmp_path)


def test_it_travels_without_its_images_and_reads_them_from_anywhere(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(root)
    leaf = folder_sets("cars", 0)[0].train.leaf
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    copy = pickle.loads(pickle.dumps(leaf))
    assert isinstance(copy, ImageFiles)
    assert len(pickle.dumps(leaf)) < 1000
    assert copy[0][0].getpixel((0, 0)) == COLOURS["audi"]


def test_a_file_cut_off_behind_its_head_is_named_when_it_is_read(root: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = root / "cars" / "audi" / "cut.jpg"
    Image.fromarray(pixels).save(file)
    file.write_bytes(file.read_bytes()[:1500])
    benchmark = made(root)
    model = ExpertGate(benchmark.shape, arch=tiny_net(), autoencoder="linear")
    with tiny_strategy(model=model) as strategy, pytest.raises(HookError) as caught:
        strategy.train(benchmark.scenario.train_stream)
    assert f"{file} cannot be read as an image" in str(caught.value)
    assert "Traceback" not in str(caught.value), "what is said is all there is to say"
