"""Evaluations of a run: what each one measured, as a numbered record that no later one replaces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from distributed_eg.errors import StorageError
from distributed_eg.store import layout, records
from distributed_eg.store.record_text import fields_of, record_bytes
from distributed_eg.store.records import Record, StoredRecords, artifact_of_record
from distributed_eg.store.storage import Storage
from distributed_eg.types import TaskId


@dataclass(frozen=True, slots=True)
class EvaluatedExperience:
    """What an experience came to; accuracies between 0 and 1, as the metrics of the same names."""

    index: int
    """Its number in its stream."""
    stream: str
    """Empty where the experience came without one."""
    labels: tuple[int, ...]
    """Task labels of its samples."""
    num_samples: int
    gate_accuracy: float
    expert_accuracy: float
    end_to_end_accuracy: float
    unknown_share: float | None
    """Of samples that are strange to every task; None where that cannot be told."""


@dataclass(frozen=True, slots=True)
class Route:
    """How many samples of one task went to the expert of another, or of the same."""

    right: TaskId
    """The task that they belong to; −1: to none that is trained."""
    chosen: TaskId
    """The task whose expert answered; −1: nobody's."""
    num_samples: int


@dataclass(frozen=True, slots=True)
class EvaluationRecord(Record):
    """One evaluation; tasks by the numbers that users see."""

    name: ClassVar[str] = "evaluation"
    number: int
    finished: str
    """UTC, ISO 8601."""
    version: str
    """Of this package."""
    seed: int
    """The run's."""
    tasks: tuple[TaskId, ...]
    """Those that the gate chose among."""
    experiences: tuple[EvaluatedExperience, ...]
    routes: tuple[Route, ...]
    """Those that were taken."""

    @classmethod
    def path_of(cls, task: int | None = None) -> str:
        """Where evaluation number ``task`` is."""
        assert task is not None
        return layout.evaluation_file(task)

    @property
    def path(self) -> str:
        """Where this record is, relative to the run directory."""
        return layout.evaluation_file(self.number)


def seal_next(storage: Storage, record: EvaluationRecord) -> EvaluationRecord:
    """Write an evaluation under the next number, by what is there, whatever its own says: it as it was written.

    Raises:
        StorageError: the run directory cannot be written.
    """
    record = replace(record, number=max(_numbers(storage), default=-1) + 1)
    while not storage.create(record.path, record_bytes(fields_of(record))):
        record = replace(record, number=record.number + 1)  # somebody else's came first
    return record


def read_all(storage: Storage) -> StoredRecords:
    """Every evaluation that is there, by path; ``StorageError`` where the run directory does not answer."""
    found = StoredRecords({}, {}, {})
    for number in _numbers(storage):
        path = EvaluationRecord.path_of(number)
        try:
            record = records.read(storage, EvaluationRecord, number)
        except StorageError as error:
            found.errors[path] = error
            continue
        if record is not None:  # it may have been removed meanwhile
            found.records[path], found.artifacts[path] = record, artifact_of_record(record)
    return found


def _numbers(storage: Storage) -> list[int]:
    stems = [name.removesuffix(".json") for name in storage.list(layout.EVALUATIONS) if name.endswith(".json")]
    return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit() and stem == f"{int(stem):05d}")
