"""Records through a real directory: written, dropped, opened again, compared."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed_eg.errors import StorageError
from distributed_eg.store import records
from distributed_eg.store.records import (
    AutoencoderRecord,
    RelatednessRecord,
    StageTiming,
    StatisticsRecord,
    TaskManifest,
)
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.types import RelatednessRow, TransferChoice


def artifact(name: str) -> Artifact:
    """An artifact that nobody reads."""
    return Artifact(f"{name}-abc.safetensors", "abc" * 20, 123)


def row(task: int, candidate: int | None, *, relatedness: float = 0.1 + 0.2, chosen: bool = False) -> RelatednessRow:
    """A row whose floats need all their digits."""
    return RelatednessRow(
        task, candidate, 1 / 3, 2 / 7, 1e-300, "variance", relatedness, chosen, "lwf" if chosen else None
    )


STATISTICS = [StatisticsRecord(artifact("s"), 60), StatisticsRecord(artifact("s"), 60, artifact("root"))]
AUTOENCODER = AutoencoderRecord(3, -2, "linear", artifact("a"), 512)
RELATEDNESS = [
    RelatednessRecord(0, TransferChoice(None, "fresh"), 0.1, 0.0, ()),
    RelatednessRecord(
        3, TransferChoice(None, "lwf"), 1 / 3, 1e22, (row(3, None, chosen=True), row(3, 0, relatedness=-math.inf))
    ),
    RelatednessRecord(3, TransferChoice(1, "finetune"), math.ulp(0.0), math.nextafter(1, 2), (row(3, 1),)),
]
MANIFESTS = [
    TaskManifest(0, 7, (0,), (0, 1), None, "fresh", None, artifact("a"), artifact("r"), artifact("e")),
    TaskManifest(3, -2, (1, 3), (9,), 0, "lwf", 1 / 3, artifact("a"), artifact("r"), artifact("e")),
]


@pytest.mark.parametrize("record", STATISTICS)
def test_statistics_come_back(tmp_path: Path, record: StatisticsRecord) -> None:
    records.write_statistics(Storage(str(tmp_path)), record)
    assert records.read_statistics(Storage(str(tmp_path))) == record


def test_an_autoencoder_record_comes_back(tmp_path: Path) -> None:
    records.write_autoencoder(Storage(str(tmp_path)), AUTOENCODER)
    assert records.read_autoencoder(Storage(str(tmp_path)), 3) == AUTOENCODER


@pytest.mark.parametrize("record", RELATEDNESS)
def test_a_relatedness_record_comes_back_to_the_last_digit(tmp_path: Path, record: RelatednessRecord) -> None:
    records.write_relatedness(Storage(str(tmp_path)), record)
    assert records.read_relatedness(Storage(str(tmp_path)), record.task) == record


@pytest.mark.parametrize("record", MANIFESTS)
def test_a_manifest_comes_back(tmp_path: Path, record: TaskManifest) -> None:
    records.write_manifest(Storage(str(tmp_path)), record)
    assert records.read_manifest(Storage(str(tmp_path)), record.task) == record


def test_timings_come_back_in_order(tmp_path: Path) -> None:
    timings = [StageTiming("features", "w1", 0.25), StageTiming("expert", "w0", 1 / 3)]
    records.write_timings(Storage(str(tmp_path)), 4, timings)
    assert records.read_timings(Storage(str(tmp_path)), 4) == timings


def test_an_empty_run_has_no_records(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    assert records.read_statistics(storage) is None
    assert records.read_autoencoder(storage, 0) is None
    assert records.read_relatedness(storage, 0) is None
    assert records.read_manifest(storage, 0) is None
    assert records.read_timings(storage, 0) == []
    assert records.stored_tasks(storage) == []


def test_the_same_record_seals_to_the_same_bytes_in_any_run(tmp_path: Path) -> None:
    sealed = [records.write_relatedness(Storage(str(tmp_path / name)), RELATEDNESS[1]) for name in "ab"]
    assert sealed[0] == sealed[1]


def test_timings_are_apart_from_what_is_hashed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    before = records.write_manifest(storage, MANIFESTS[1])
    records.write_timings(storage, 3, [StageTiming("expert", "w0", 1.0)])
    assert storage.read_artifact(before)
    text = b"".join(file.read_bytes() for file in tmp_path.rglob("*.json") if file.name != "timings.json")
    assert b"seconds" not in text
    assert b"w0" not in text


@pytest.mark.parametrize("tasks", [[0, 1, 2], [9, 10, 11], [99_999, 100_000]])
def test_stored_tasks_are_in_order(tmp_path: Path, tasks: list[int]) -> None:
    storage = Storage(str(tmp_path))
    for task in reversed(tasks):
        records.write_timings(storage, task, [])
    assert records.stored_tasks(storage) == tasks


def test_a_record_in_another_tasks_folder_is_refused(tmp_path: Path) -> None:
    """A folder that was copied by hand."""
    storage = Storage(str(tmp_path))
    records.write_manifest(storage, MANIFESTS[1])
    shutil.copytree(tmp_path / "tasks/00003", tmp_path / "tasks/00004")
    with pytest.raises(StorageError, match=r"tasks/00004/manifest\.json.*belongs to task 3"):
        records.read_manifest(storage, 4)


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body.pop(key)


def _renamed(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body.update({key + "x": body.pop(key)})


@pytest.mark.parametrize("harm", [_without("expert"), _renamed("label"), lambda body: body.update(expert=None)])
def test_a_record_with_other_fields_is_named(tmp_path: Path, harm: Callable[[dict[str, Any]], Any]) -> None:
    """JSON survives many a damage: a lost line, a changed letter."""
    storage = Storage(str(tmp_path))
    records.write_manifest(storage, MANIFESTS[1])
    file = tmp_path / "tasks/00003/manifest.json"
    body = json.loads(file.read_text())
    harm(body)
    file.write_text(json.dumps(body))
    with pytest.raises(StorageError, match=r"tasks/00003/manifest\.json"):
        records.read_manifest(storage, 3)
