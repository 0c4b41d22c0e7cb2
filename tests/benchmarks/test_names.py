"""Names of task sequences, read apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed_eg.benchmarks.catalog import BENCHMARKS, num_tasks
from distributed_eg.benchmarks.names import Change, parts_of_name


def read(name: str) -> list[tuple[str, str, Change | None]]:
    return [(part.kind, part.what, part.change) for part in parts_of_name(name)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_name_stands_for_itself(name: str) -> None:
    ((kind, what, change),) = read(name)
    assert (kind == "embedded", what, change) == (name == "embedded", name, None)


def test_a_plus_inside_a_name_is_no_chain() -> None:
    assert read("split-mnist+fashion+split-mnist") == [
        ("torchvision", "split-mnist+fashion", None),
        ("torchvision", "split-mnist", None),
    ]
    assert read("embedded+rotated-4:split-mnist+fashion") == [
        ("embedded", "embedded", None),
        ("torchvision", "split-mnist+fashion", Change("rotated", 4)),
    ]


def test_a_plus_inside_a_path_is_no_chain(tmp_path: Path) -> None:
    folder = tmp_path / "cats+dogs: new"
    folder.mkdir()
    assert read(f"permuted:folder:{folder}+hf:{tmp_path}+pairs:split-svhn+medmnist:bloodmnist+split-usps") == [
        ("folder", str(folder), Change("permuted", 10)),
        ("hf", str(tmp_path), None),
        ("torchvision", "split-svhn", Change("pairs", 24)),
        ("medmnist", "bloodmnist", None),
        ("torchvision", "split-usps", None),
    ]


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("folder:~") == [("folder", str(tmp_path), None)]


@pytest.mark.parametrize(
    ("num_classes", "per_task", "expected"), [(10, 2, 5), (10, 3, 3), (47, 10, 5), (101, 10, 10), (2, 10, 1), (3, 2, 1)]
)
def test_no_class_is_left_alone(num_classes: int, per_task: int, expected: int) -> None:
    assert num_tasks(num_classes, per_task) == expected
