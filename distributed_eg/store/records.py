"""The records of a run: what each stage leaves behind, as frozen values and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from distributed_eg.errors import DamagedFileError
from distributed_eg.store import layout
from distributed_eg.store.storage import Artifact, Storage, artifact_of
from distributed_eg.types import AutoencoderKind, RelatednessRow, TaskId, Transfer, TransferChoice


@dataclass(frozen=True, slots=True)
class StatisticsRecord:
    """The run's standardization statistics, and the root's autoencoder where a reference was given."""

    artifact: Artifact
    num_samples: int
    root_autoencoder: Artifact | None = None


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """What arrived as a task, written before anything is done for it: a resumed run must be given the same again."""

    task: TaskId
    label: int
    classes: tuple[int, ...]
    versions: tuple[TaskId, ...]
    continues: TaskId | None
    identity: dict[str, Any]
    """What the data are recognised by: JSON values."""


@dataclass(frozen=True, slots=True)
class AutoencoderRecord:
    """A task's sealed autoencoder."""

    task: TaskId
    label: int
    kind: AutoencoderKind
    artifact: Artifact
    num_samples: int


@dataclass(frozen=True, slots=True)
class RelatednessRecord:
    """A task's row of the relatedness table and the parent that follows from it."""

    task: TaskId
    choice: TransferChoice
    own_error: float
    variance: float
    rows: tuple[RelatednessRow, ...]


@dataclass(frozen=True, slots=True)
class TaskManifest:
    """The seal of a task: it exists when this is written."""

    task: TaskId
    label: int
    versions: tuple[TaskId, ...]
    """Numbers of all versions of this task up to this one; the first is what users see."""
    classes: tuple[int, ...]
    parent: TaskId | None
    transfer: Transfer
    distillation: float | None
    """Mean distillation term over the training iterations; None where the expert did not learn by LwF."""
    autoencoder: Artifact
    relatedness: Artifact
    expert: Artifact


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Who did a stage and for how long; kept beside the records, never hashed."""

    stage: str
    worker: str
    seconds: float


def write_statistics(storage: Storage, record: StatisticsRecord) -> Artifact:
    """Seal the statistics record."""
    return storage.write_record(layout.STATISTICS, asdict(record))


def read_statistics(storage: Storage) -> StatisticsRecord | None:
    """The statistics record, or None where the run has none yet."""
    if not storage.exists(layout.STATISTICS):
        return None
    raw = storage.read_record(layout.STATISTICS)
    with _as_written(storage, layout.STATISTICS):
        root = raw["root_autoencoder"]
        return StatisticsRecord(Artifact(**raw["artifact"]), raw["num_samples"], root and Artifact(**root))


def write_task(storage: Storage, record: TaskRecord) -> Artifact:
    """Note what arrived as a task."""
    return storage.write_record(layout.task_file(record.task, "task"), asdict(record))


def read_task(storage: Storage, task: TaskId) -> TaskRecord | None:
    """What arrived as a task, or None where nothing did yet."""
    raw = _read_task_record(storage, task, "task")
    if raw is None:
        return None
    with _as_written(storage, layout.task_file(task, "task")):
        return TaskRecord(**{**raw, "classes": tuple(raw["classes"]), "versions": tuple(raw["versions"])})


def write_autoencoder(storage: Storage, record: AutoencoderRecord) -> Artifact:
    """Seal a task's autoencoder record."""
    return storage.write_record(layout.task_file(record.task, "autoencoder"), asdict(record))


def read_autoencoder(storage: Storage, task: TaskId) -> AutoencoderRecord | None:
    """A task's autoencoder record, or None where there is none yet."""
    raw = _read_task_record(storage, task, "autoencoder")
    if raw is None:
        return None
    with _as_written(storage, layout.task_file(task, "autoencoder")):
        return AutoencoderRecord(**{**raw, "artifact": Artifact(**raw["artifact"])})


def write_relatedness(storage: Storage, record: RelatednessRecord) -> Artifact:
    """Seal a task's relatedness record."""
    return storage.write_record(layout.task_file(record.task, "relatedness"), asdict(record))


def read_relatedness(storage: Storage, task: TaskId) -> RelatednessRecord | None:
    """A task's relatedness record, or None where there is none yet."""
    raw = _read_task_record(storage, task, "relatedness")
    if raw is None:
        return None
    with _as_written(storage, layout.task_file(task, "relatedness")):
        rows = tuple(RelatednessRow(**row) for row in raw["rows"])
        return RelatednessRecord(**{**raw, "choice": TransferChoice(**raw["choice"]), "rows": rows})


def relatedness_artifact(storage: Storage, task: TaskId) -> Artifact:
    """What a task's relatedness record hashes to."""
    path = layout.task_file(task, "relatedness")
    return artifact_of(path, storage.read(path))


def write_manifest(storage: Storage, manifest: TaskManifest) -> Artifact:
    """Seal a task."""
    return storage.write_record(layout.task_file(manifest.task, "manifest"), asdict(manifest))


def read_manifest(storage: Storage, task: TaskId) -> TaskManifest | None:
    """A task's manifest, or None where the task is not sealed."""
    raw = _read_task_record(storage, task, "manifest")
    if raw is None:
        return None
    with _as_written(storage, layout.task_file(task, "manifest")):
        artifacts = {name: Artifact(**raw[name]) for name in ("autoencoder", "relatedness", "expert")}
        return TaskManifest(
            **{**raw, **artifacts, "classes": tuple(raw["classes"]), "versions": tuple(raw["versions"])}
        )


def write_timings(storage: Storage, task: TaskId, timings: list[StageTiming]) -> None:
    """Note who did what for how long."""
    storage.write_record(layout.task_file(task, "timings"), {"stages": [asdict(timing) for timing in timings]})


def read_timings(storage: Storage, task: TaskId) -> list[StageTiming]:
    """Who did what for how long; empty where nothing was noted."""
    raw = _read_task_record(storage, task, "timings")
    if raw is None:
        return []
    with _as_written(storage, layout.task_file(task, "timings")):
        return [StageTiming(**timing) for timing in raw["stages"]]


def stored_tasks(storage: Storage) -> list[TaskId]:
    """Tasks that have any record, in order."""
    return sorted(int(name) for name in storage.list(layout.TASKS) if name.isdigit())


@contextmanager
def _as_written(storage: Storage, path: str) -> Iterator[None]:
    """Tell a record that lacks a field, or has another, as damaged."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"The record {path!r} in {storage.uri!r} is damaged: {error!r}.") from error


def _read_task_record(storage: Storage, task: TaskId, name: str) -> dict[str, Any] | None:
    path = layout.task_file(task, name)
    if not storage.exists(path):
        return None
    raw = storage.read_record(path)
    if raw.setdefault("task", task) != task:
        raise DamagedFileError(f"The record {path!r} in {storage.uri!r} belongs to task {raw['task']}.")
    if name == "timings":
        del raw["task"]
    return raw
