"""The records of a run: what each stage leaves behind. They know what file they are and what files they name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from distributed_eg.errors import DamagedFileError, StorageError
from distributed_eg.store import layout
from distributed_eg.store.decoding import decode
from distributed_eg.store.record_text import LATER, fields_of, record_bytes, repair_of
from distributed_eg.store.storage import Artifact, Storage, artifact_of
from distributed_eg.types import (
    AutoencoderKind,
    ImageTransform,
    RelatednessRow,
    RelatednessUnit,
    TaskId,
    Transfer,
    TransferChoice,
)

R = TypeVar("R", bound="Record")


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON file of the run directory; its keys are the fields."""

    name: ClassVar[str]
    """Of the file, without its folder and ending."""
    is_replaced: ClassVar[bool] = False
    """Whether another one may take its place though sealed tasks rest on the run's records."""

    @classmethod
    def path_of(cls, task: TaskId | None = None) -> str:
        """Where such a record is, relative to the run directory; ``task`` is None for those of the run itself."""
        return f"{cls.name}.json" if task is None else layout.task_file(task, cls.name)

    @property
    def path(self) -> str:
        """Where this record is, relative to the run directory."""
        return self.path_of(getattr(self, "task", None))

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The sealed files that it names."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if isinstance(value, Artifact))


@dataclass(frozen=True, slots=True)
class RecordOfTask(Record):
    """A record that each task has one of."""

    task: TaskId


@dataclass(frozen=True, slots=True)
class RunRecord(Record):
    """What the run is; values are JSON."""

    name: ClassVar[str] = "run"
    run_id: str
    method: dict[str, Any]
    threads: int
    backbone: dict[str, Any]
    """``root`` names the pretrained root network."""
    settings: dict[str, Any]
    libraries: dict[str, Any]
    machine: dict[str, Any]

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        return (decode(Artifact, self.backbone.get("root"), "root"),)


@dataclass(frozen=True, slots=True)
class StatisticsRecord(Record):
    """The run's standardization statistics, and the root's autoencoder where a reference was given."""

    name: ClassVar[str] = "statistics"
    artifact: Artifact
    num_samples: int
    root_autoencoder: Artifact | None = None


@dataclass(frozen=True, slots=True)
class StreamRecord(Record):
    """How far the run's stream was heard to its end: calls that ended well brought the tasks below ``num_tasks``.

    Those from there on came in a call that was cut off, whose tasks are expected to be brought again.
    """

    name: ClassVar[str] = "stream"
    is_replaced: ClassVar[bool] = True
    num_tasks: int


@dataclass(frozen=True, slots=True)
class TaskRecord(RecordOfTask):
    """What arrived as a task, written before anything is done for it: a resumed run must be given the same again."""

    name: ClassVar[str] = "task"
    label: int
    classes: tuple[int, ...]
    versions: tuple[TaskId, ...]
    continues: TaskId | None
    identity: dict[str, Any]
    """What the data are recognised by: JSON values."""
    class_names: tuple[str | None, ...] = ()
    """Of ``classes``, None where nobody says it; empty in runs of earlier versions."""
    transform: ImageTransform | None = None
    """What images go through before the network; None where it cannot be known."""

    @property
    def names(self) -> dict[int, str | None]:
        """The name of each class."""
        return dict(zip(self.classes, self.class_names or [None] * len(self.classes), strict=True))


@dataclass(frozen=True, slots=True)
class AutoencoderRecord(RecordOfTask):
    """A task's sealed autoencoder, and the summary of its features."""

    name: ClassVar[str] = "autoencoder"
    label: int
    kind: AutoencoderKind
    artifact: Artifact
    num_samples: int
    summary: Artifact | None = field(default=None, metadata=LATER)
    """Of the same features, where the gate goes by the shared score."""
    quantiles: tuple[float, ...] | None = field(default=None, metadata=LATER)
    """Of its errors on the task's held-out images, at equal steps from 0 to 1: how strange its own are to it."""

    def limit(self, share: float) -> float | None:
        """The error that a share of the held-out images stays below; None in runs of earlier versions."""
        if self.quantiles is None:
            return None
        place = share * (len(self.quantiles) - 1)
        low = min(int(place), len(self.quantiles) - 2)
        return self.quantiles[low] + (self.quantiles[low + 1] - self.quantiles[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class RelatednessRecord(RecordOfTask):
    """A task's row of the relatedness table and the parent that follows from it; candidates in order of arrival, None
    standing for the pretrained root, and their errors."""

    name: ClassVar[str] = "relatedness"
    choice: TransferChoice
    own_error: float
    variance: float
    unit: RelatednessUnit
    candidates: tuple[TaskId | None, ...]
    errors: tuple[float, ...]
    held_out: Artifact | None = field(default=None, metadata=LATER)
    """What the task's held-out images said of the gate; None in runs of earlier versions."""
    shared_distances: tuple[float | None, ...] | None = field(default=None, metadata=LATER)
    """How much farther from each candidate than from its own task the held-out images lie by the shared score; None
    for the root, and where the gate does not go by it."""
    known_shares: tuple[float | None, ...] | None = field(default=None, metadata=LATER)
    """The share of them that is no stranger to each candidate than its own images are; None for the root."""


@dataclass(frozen=True, slots=True)
class Contest:
    """Accuracy on a task's held-out images of the experts that both ways of transfer give from one parent; None of one
    that diverged."""

    lwf: float | None
    finetune: float | None


@dataclass(frozen=True, slots=True)
class TaskManifest(RecordOfTask):
    """The seal of a task: it exists when this is written."""

    name: ClassVar[str] = "manifest"
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
    contest: Contest | None = field(default=None, metadata=LATER)
    """Where ``transfer`` is the better of two that were tried."""


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Who did a stage and for how long."""

    stage: str
    worker: str
    seconds: float
    device: str = ""
    """The kind of processor that it computed on; empty in runs of earlier versions."""
    started_s: float | None = field(default=None, metadata=LATER)
    """When it began by the clock of its worker's node, in seconds since 1970; None in runs of earlier versions."""


@dataclass(frozen=True, slots=True)
class TaskTimings(RecordOfTask):
    """Who did a task's stages; kept beside the other records, which never name it."""

    name: ClassVar[str] = "timings"
    is_replaced: ClassVar[bool] = True
    stages: tuple[StageTiming, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Tasks by number: from ``since`` to before ``until``, None: all that follow."""

    since: TaskId
    until: TaskId | None


@dataclass(frozen=True, slots=True)
class RetirementRecord(RecordOfTask):
    """When a task, by the number that users see, was no part of the gate."""

    name: ClassVar[str] = "retirement"
    is_replaced: ClassVar[bool] = True
    spans: tuple[Span, ...]
    """Tasks that arrive in one of them do not know of it."""
    is_swept: bool
    """Whether its weights may be gone: it cannot be restored any more."""

    @property
    def is_retired(self) -> bool:
        """Whether it is no part of the gate now."""
        return bool(self.spans) and self.spans[-1].until is None

    def hides_from(self, task: TaskId) -> bool:
        """Whether ``task`` came while it was retired."""
        return any(span.since <= task and (span.until is None or task < span.until) for span in self.spans)


@dataclass(frozen=True, slots=True)
class CheckpointRecord(RecordOfTask):
    """An expert's training after ``epochs`` epochs; see ``store/checkpoints.py``."""

    name: ClassVar[str] = "checkpoint"
    key: str
    epochs: int
    values: Any
    tensors: Artifact


@dataclass(frozen=True, slots=True)
class RivalCheckpointRecord(CheckpointRecord):
    """The same of the second expert of a contest."""

    name: ClassVar[str] = "rival"


KINDS: tuple[type[Record], ...] = (
    *(RunRecord, StatisticsRecord, StreamRecord),
    *(TaskRecord, AutoencoderRecord, RelatednessRecord, TaskManifest, TaskTimings),
    *(RetirementRecord, CheckpointRecord, RivalCheckpointRecord),
)
"""Every kind of record, in the order in which a task gets them."""


def seal(storage: Storage, record: Record) -> Artifact:
    """Write a record; ``StorageError`` where the run directory cannot be written."""
    return storage.write_record(record.path, fields_of(record))


def artifact_of_record(record: Record) -> Artifact:
    """What ``seal`` gives for a record."""
    return artifact_of(record.path, record_bytes(fields_of(record)))


def read(storage: Storage, kind: type[R], task: TaskId | None = None) -> R | None:
    """The run's record of that kind, or the task's; None where there is none.

    Raises:
        DamagedFileError: it is not what was sealed, lacks a field, has another one or a value of another type, or
            belongs to another task.
        StorageError: it cannot be read, or has another schema version.
    """
    return _read(storage, kind, task)[0] if storage.exists(kind.path_of(task)) else None


def _read(storage: Storage, kind: type[R], task: TaskId | None) -> tuple[R, Artifact]:
    path = kind.path_of(task)
    data = storage.read(path)
    raw = storage.parse_record(path, data)
    if issubclass(kind, TaskTimings):
        raw.setdefault("task", task)  # earlier versions did not write it
    try:
        if kind is RelatednessRecord and "rows" in raw:
            raw |= _columns_of(decode(tuple[RelatednessRow, ...], raw.pop("rows"), "rows"))
        record: R = decode(kind, raw, "it")
        if record.path != path:
            raise ValueError(f"it belongs to task {raw['task']}")
        _ = record.artifacts  # a run's are decoded, too
    except ValueError as error:
        message = f"The record {path!r} in {storage.shown!r} is damaged: {error}. {repair_of(path)}"
        raise DamagedFileError(message) from error
    return record, artifact_of(path, data)


def _columns_of(rows: tuple[RelatednessRow, ...]) -> dict[str, Any]:
    """Earlier versions wrote everything of every candidate."""
    unit = rows[0].unit if rows else "own_error"
    return {"unit": unit, "candidates": [row.candidate for row in rows], "errors": [row.error for row in rows]}


@dataclass(frozen=True, slots=True)
class StoredRecords:
    """Records of a run directory by path: the run's own, then task by task."""

    records: dict[str, Record]
    artifacts: dict[str, Artifact]
    """What they are sealed as."""
    errors: dict[str, StorageError]
    """Why others cannot be read."""


def read_all(storage: Storage, kinds: Collection[type[Record]] = KINDS) -> StoredRecords:
    """Every record of these kinds that is there; ``StorageError`` where the run directory does not answer."""
    found = StoredRecords({}, {}, {})
    for task in (None, *sorted(int(name) for name in storage.list(layout.TASKS) if name.isdigit())):
        # A listing for all that a task has: asking for each is what opening a long run would mostly do.
        there = None if task is None else set(storage.list(layout.task_folder(task)))
        for kind in (kind for kind in kinds if issubclass(kind, RecordOfTask) == (task is not None)):
            path = kind.path_of(task)
            if not storage.exists(path) if there is None else path.rpartition("/")[2] not in there:
                continue
            try:
                found.records[path], found.artifacts[path] = _read(storage, kind, task)
            except StorageError as error:
                if storage.exists(path):  # or else a driver that works on the run has just removed it
                    found.errors[path] = error
    return found
