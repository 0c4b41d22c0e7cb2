"""Records through a real directory: sealed, dropped, opened again, compared."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from distributed_eg.errors import DamagedFileError
from distributed_eg.store import layout, records
from distributed_eg.store.records import (
    AutoencoderRecord,
    CheckpointRecord,
    Contest,
    Record,
    RecordOfTask,
    RelatednessRecord,
    RetirementRecord,
    RivalCheckpointRecord,
    RunRecord,
    Span,
    StageTiming,
    StatisticsRecord,
    StoredRecords,
    StreamRecord,
    TaskManifest,
    TaskRecord,
    TaskTimings,
    artifact_of_record,
)
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.types import TransferChoice


def artifact(name: str) -> Artifact:
    """An artifact that nobody reads."""
    return Artifact(f"{name}-abc.safetensors", "abc" * 20, 123)


RUN = RunRecord("ab12", {"seed": 0, "lr": 1e-3}, 1, {"root": asdict(artifact("root"))}, {}, {"torch": "2"}, {})
STATISTICS = StatisticsRecord(artifact("s"), 60, artifact("root"))
ARRIVAL = TaskRecord(3, -2, (9,), (1, 3), 1, {"length": 60, "leaves": [["a", 1.5]]})
AUTOENCODER = AutoencoderRecord(3, -2, "linear", artifact("a"), 512)
RELATEDNESS = RelatednessRecord(3, TransferChoice(None, "lwf"), 1 / 3, 1e22, "variance", (None, 0), (2 / 7, 0.1 + 0.2))
MANIFEST = TaskManifest(3, -2, (1, 3), (9,), 0, "lwf", 1 / 3, artifact("a"), artifact("r"), artifact("e"))
TIMINGS = TaskTimings(3, (StageTiming("features", "w1", 0.25), StageTiming("expert", "w0", 1 / 3)))
CHECKPOINT = CheckpointRecord(3, "k", 2, {"dict": [["ä\ud800", {"float": "nan"}], [1, None]]}, artifact("c"))

NAMED: list[tuple[Record, str, list[str]]] = [
    (RUN, "run.json", ["root"]),
    (STATISTICS, "statistics.json", ["s", "root"]),
    (replace(STATISTICS, root_autoencoder=None), "statistics.json", ["s"]),
    (StreamRecord(4), "stream.json", []),
    (ARRIVAL, "tasks/00003/task.json", []),
    (AUTOENCODER, "tasks/00003/autoencoder.json", ["a"]),
    (replace(AUTOENCODER, summary=artifact("s"), quantiles=(0.5, 2 / 3)), "tasks/00003/autoencoder.json", ["a", "s"]),
    (RELATEDNESS, "tasks/00003/relatedness.json", []),
    (
        replace(RELATEDNESS, held_out=artifact("h"), shared_distances=(None, -1 / 3), known_shares=(None, 1.0)),
        "tasks/00003/relatedness.json",
        ["h"],
    ),
    (
        replace(
            RELATEDNESS,
            choice=TransferChoice(1, "finetune"),
            own_error=math.ulp(0.0),
            variance=4,
            candidates=(),
            errors=(),
        ),
        "tasks/00003/relatedness.json",
        [],
    ),
    (MANIFEST, "tasks/00003/manifest.json", ["a", "r", "e"]),
    (replace(MANIFEST, parent=None, transfer="fresh", distillation=None), "tasks/00003/manifest.json", ["a", "r", "e"]),
    (replace(MANIFEST, contest=Contest(1 / 3, 1.0)), "tasks/00003/manifest.json", ["a", "r", "e"]),
    (TIMINGS, "tasks/00003/timings.json", []),
    (RivalCheckpointRecord(3, "k", 2, None, artifact("c")), "tasks/00003/rival.json", ["c"]),
    (CHECKPOINT, "tasks/00003/checkpoint.json", ["c"]),
    (RetirementRecord(3, (Span(4, 6), Span(7, None)), False), "tasks/00003/retirement.json", []),
]


def task_of(record: Record) -> int | None:
    return record.task if isinstance(record, RecordOfTask) else None


@pytest.mark.parametrize(("record", "path", "names"), NAMED, ids=lambda value: type(value).__name__)
def test_a_record_comes_back_to_the_last_digit_and_knows_its_files(
    tmp_path: Path, record: Record, path: str, names: list[str]
) -> None:
    sealed = records.seal(Storage(str(tmp_path)), record)
    assert sealed.path == record.path == path
    again = records.read(Storage(str(tmp_path)), type(record), task_of(record))
    assert again == record == pickle.loads(pickle.dumps(record))
    assert again is not None
    assert again.artifacts == tuple(artifact(name) for name in names)
    assert artifact_of_record(again) == artifact_of_record(record) == sealed
    assert Storage(str(tmp_path)).read_artifact(sealed)


def test_every_kind_of_record_is_among_them() -> None:
    assert {type(record) for record, _, _ in NAMED} == set(records.KINDS)


SEALED_BEFORE = {
    STATISTICS: "294323c5d6ea813ea212020caac3bfad26d22c2cf20c4e91a1fb9b374acabd3c",
    AUTOENCODER: "aa3f922a77d02d53e9d600c6f1e00f5bba45528677cf4515a65dae5d164edbce",
    MANIFEST: "5ee91836b0f249d583b91d9be41ed763622c30ea687ec3df068549e0ef8edae7",
}
"""What earlier versions of this package sealed these records to."""


@pytest.mark.parametrize("record", SEALED_BEFORE, ids=lambda record: record.name)
def test_the_bytes_are_those_of_earlier_versions(record: Record) -> None:
    """Manifests name records by their hash: other bytes would be another run."""
    assert artifact_of_record(record).sha256 == SEALED_BEFORE[record]


def test_relatedness_of_earlier_versions_tells_everything_of_every_candidate(tmp_path: Path) -> None:
    said = {"task": 3, "own_error": 1 / 3, "variance": 1e22, "unit": "variance"}
    rows = [
        {**said, "candidate": None, "error": 2 / 7, "relatedness": 0.5, "chosen": True, "transfer": "lwf"},
        {**said, "candidate": 0, "error": 0.1 + 0.2, "relatedness": 0.25, "chosen": False, "transfer": None},
    ]
    written = {**asdict(RELATEDNESS), "rows": rows}
    for column in ("unit", "candidates", "errors"):
        del written[column]
    Storage(str(tmp_path)).write_record(RELATEDNESS.path, written)
    assert records.read(Storage(str(tmp_path)), RelatednessRecord, 3) == RELATEDNESS


def test_an_empty_run_has_no_records(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    for kind in records.KINDS:
        assert records.read(storage, kind, 0 if issubclass(kind, RecordOfTask) else None) is None
    assert records.read_all(storage) == StoredRecords({}, {}, {})


def test_the_same_record_seals_to_the_same_bytes_in_any_run(tmp_path: Path) -> None:
    sealed = [records.seal(Storage(str(tmp_path / name)), RELATEDNESS) for name in "ab"]
    assert sealed[0] == sealed[1]


def test_timings_are_apart_from_what_is_hashed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    before = records.seal(storage, MANIFEST)
    records.seal(storage, TIMINGS)
    assert storage.read_artifact(before)
    text = b"".join(file.read_bytes() for file in tmp_path.rglob("*.json") if file.name != "timings.json")
    assert b"seconds" not in text
    assert b"w0" not in text


def test_timings_of_earlier_versions_do_not_say_their_task(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_record(layout.task_file(3, "timings"), {"stages": asdict(TIMINGS)["stages"]})
    assert records.read(storage, TaskTimings, 3) == TIMINGS


@pytest.mark.parametrize("tasks", [[0, 1, 2], [9, 10, 11], [99_999, 100_000]])
def test_tasks_are_read_in_order(tmp_path: Path, tasks: list[int]) -> None:
    storage = Storage(str(tmp_path))
    for task in reversed(tasks):
        records.seal(storage, TaskTimings(task, ()))
    assert [*records.read_all(storage).records.values()] == [TaskTimings(task, ()) for task in tasks]


def test_all_records_are_read_and_damaged_ones_told_apart(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for record, _, _ in NAMED:
        records.seal(storage, record)
    (tmp_path / MANIFEST.path).write_text("{")
    found = records.read_all(storage)
    assert found.records.keys() | found.errors.keys() == {path for _, path, _ in NAMED}
    assert [type(error) for error in found.errors.values()] == [DamagedFileError]
    assert [*found.errors] == [MANIFEST.path]
    assert found.artifacts == {path: artifact_of_record(record) for path, record in found.records.items()}
    (only,) = records.read_all(storage, [AutoencoderRecord]).records.values()
    assert only == replace(AUTOENCODER, summary=artifact("s"), quantiles=(0.5, 2 / 3))


def test_a_record_in_another_tasks_folder_is_refused(tmp_path: Path) -> None:
    """A folder that was copied by hand."""
    storage = Storage(str(tmp_path))
    records.seal(storage, MANIFEST)
    shutil.copytree(tmp_path / "tasks/00003", tmp_path / "tasks/00004")
    with pytest.raises(DamagedFileError, match=r"tasks/00004/manifest\.json.*belongs to task 3"):
        records.read(storage, TaskManifest, 4)


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body.pop(key)


def _with(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body.update(values)


def _renamed(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body.update({key + "x": body.pop(key)})


HARMS = {
    "lacks a field": (MANIFEST, _without("expert")),
    "lacks its task": (MANIFEST, _without("task")),
    "another field": (MANIFEST, _with(more=1)),
    "a field's name": (MANIFEST, _renamed("label")),
    "no artifact": (MANIFEST, _with(expert=None)),
    "half an artifact": (MANIFEST, _with(expert={"path": "e", "sha256": "e"})),
    "a number for text": (MANIFEST, _with(expert={"path": 7, "sha256": "e", "size_bytes": 1})),
    "text for a number": (MANIFEST, _with(label="7")),
    "a fraction": (MANIFEST, _with(label=7.0)),
    "a truth value": (MANIFEST, _with(label=True)),
    "no list": (MANIFEST, _with(classes=9)),
    "something in a list": (MANIFEST, _with(classes=[9, None])),
    "no such transfer": (MANIFEST, _with(transfer="lw")),
    "a row": (RELATEDNESS, _with(rows=[{"task": 3}])),
    "no root": (RUN, _with(backbone={})),
    "another root": (RUN, _with(backbone={"root": {"path": 1}})),
}


@pytest.mark.parametrize(("record", "harm"), HARMS.values(), ids=HARMS)
@pytest.mark.parametrize("resealed", [False, True])
def test_a_record_with_other_fields_or_values_is_named(
    tmp_path: Path, record: Record, harm: Callable[[dict[str, Any]], Any], resealed: bool
) -> None:
    """JSON survives many a damage: a lost line, a changed letter; and somebody may know how records are sealed."""
    storage = Storage(str(tmp_path))
    records.seal(storage, record)
    if resealed:
        body = storage.read_record(record.path)
        harm(body)
        storage.write_record(record.path, body)
    else:
        body = json.loads((tmp_path / record.path).read_text())
        harm(body)
        (tmp_path / record.path).write_text(json.dumps(body))
    with pytest.raises(DamagedFileError, match=record.path):
        records.read(storage, type(record), task_of(record))
