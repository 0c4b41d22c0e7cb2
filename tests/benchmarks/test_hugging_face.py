"""Datasets that Hugging Face's package saved to disk, by small ones."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distributed_eg.benchmarks import make_benchmark
from distributed_eg.benchmarks.hugging_face import hugging_face_set
from distributed_eg.errors import InputError


@pytest.fixture
def hf() -> Any:
    return pytest.importorskip("datasets", reason="the extra hf is not installed")


def table(hf: Any, count: int, names: tuple[str, ...] = ("no", "yes", "perhaps")) -> Any:
    """Images whose colour tells their class; some are grey."""
    labels = [k % len(names) for k in range(count)]
    images = [
        Image.new("RGB" if k % 4 else "L", (9, 7), (50 * label,) * 3 if k % 4 else 50 * label)
        for k, label in enumerate(labels)
    ]
    features = hf.Features({"picture": hf.Image(), "kind": hf.ClassLabel(names=list(names))})
    return hf.Dataset.from_dict({"picture": images, "kind": labels}, features=features)


def test_train_and_test_are_its_own(hf: Any, tmp_path: Path) -> None:
    hf.DatasetDict(train=table(hf, 12), test=table(hf, 6)).save_to_disk(tmp_path / "set")
    benchmark = make_benchmark(f"hf:{tmp_path / 'set'}", image_size=16)
    assert benchmark.task_names == ("set",)
    assert benchmark.class_names == {0: "no", 1: "yes", 2: "perhaps"}
    assert [len(stream[0].dataset) for stream in benchmark.scenario.streams.values()] == [12, 6]
    for image, target, _ in benchmark.scenario.test_stream[0].dataset:
        assert round(float(image[0, 0, 0] * 0.229 + 0.485) * 255) == 50 * target


def test_a_share_is_split_off_where_there_is_no_test_part(hf: Any, tmp_path: Path) -> None:
    table(hf, 30).save_to_disk(tmp_path / "set")
    train, test = (part for part in vars(hugging_face_set(str(tmp_path / "set"), 0)).values() if hasattr(part, "rows"))
    assert (len(train.rows), len(test.rows)) == (24, 6)
    assert not set(train.rows) & set(test.rows)


def test_it_travels_without_its_images(hf: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    features = hf.Features({"picture": hf.Image(), "kind": hf.ClassLabel(names=["a", "b"])})
    rows = {"picture": [Image.fromarray(noise)] * 20, "kind": [0, 1] * 10}
    hf.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    leaf = hugging_face_set(str(tmp_path / "set"), 0).train.leaf
    packed = pickle.dumps(leaf)
    assert len(packed) < noise.nbytes
    assert pickle.loads(packed)[3][0].tobytes() == noise.tobytes()


def test_what_it_cannot_use_is_named(hf: Any, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="nothing is no dataset that save_to_disk wrote"):
        make_benchmark(f"hf:{tmp_path / 'nothing'}")
    hf.Dataset.from_dict({"kind": [0, 1]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(
        InputError, match=r"one column of the type Image, and the part 'train' of .* has kind \(Value\)"
    ):
        make_benchmark(f"hf:{tmp_path / 'numbers'}")
    hf.DatasetDict(train=table(hf, 6), test=table(hf, 6, ("no", "yes"))).save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match=r"'train' and 'test' of .* have other classes"):
        make_benchmark(f"hf:{tmp_path / 'other'}")
    hf.DatasetDict(test=table(hf, 6)).save_to_disk(tmp_path / "untrained")
    with pytest.raises(InputError, match="none that is called 'train'"):
        make_benchmark(f"hf:{tmp_path / 'untrained'}")


def test_deep_and_missing_images_are_named_when_they_are_read(hf: Any, tmp_path: Path) -> None:
    features = hf.Features({"picture": hf.Image(), "kind": hf.ClassLabel(names=["a", "b"])})
    images = [None, Image.fromarray(np.zeros((4, 4), np.uint16)), *[Image.new("RGB", (4, 4))] * 6]
    rows = {"picture": images, "kind": [0, 0, 0, 0, 1, 1, 1, 1]}
    hf.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    leaf = hugging_face_set(str(tmp_path / "set"), 0).train.leaf
    for row, says in ((0, "Row 0 of .* has no image"), (1, "Row 1 of .* deeper than a byte")):
        with pytest.raises(InputError, match=says):
            leaf[row]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'distributed-eg\[hf\]'"):
        make_benchmark(f"hf:{tmp_path}")
