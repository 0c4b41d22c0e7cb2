"""The coordinator: single writer of the gate registry and the relatedness table.

Every change is sealed in the run directory before it is answered. Its memory is a cache of that: a new coordinator on
the same directory knows the same. It writes for one driver only, and for none any more once a later one drives the run.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

from distributed_eg.errors import RunInUseError, StorageError
from distributed_eg.store import records
from distributed_eg.store.lease import superseded
from distributed_eg.store.records import (
    AutoencoderRecord,
    RelatednessRecord,
    StageTiming,
    StatisticsRecord,
    TaskManifest,
    TaskRecord,
)
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.tables import export_tables
from distributed_eg.types import TaskId

Record: TypeAlias = StatisticsRecord | TaskRecord | AutoencoderRecord | RelatednessRecord | TaskManifest


class CoordinatorApi(Protocol):
    """What a driver asks of the coordinator, wherever that lives."""

    def registry(self) -> Registry:
        """Everything recorded so far."""

    def record(self, record: Record) -> Artifact:
        """Seal a record; sealing the same one again changes nothing, and what a failed task left may be replaced.

        Raises:
            StorageError: the run directory cannot be written, or holds another record for a sealed task.
            RunInUseError: a later driver has taken the run over.
        """

    def note_timings(self, task: TaskId, timings: list[StageTiming]) -> None:
        """Keep who did what for how long, beside the records."""

    def export(self) -> None:
        """Write the tables as Parquet."""


class Coordinator:
    """The coordinator as a plain class; ``ray_backend`` makes it an actor.

    Args:
        storage_uri: the run directory.
        generation: the driver's number in the run's lease.
    """

    def __init__(self, storage_uri: str, generation: int) -> None:
        self._storage = Storage(storage_uri)
        self._generation = generation
        self._registry: Registry | None = None

    def registry(self) -> Registry:
        """Everything recorded so far."""
        if self._registry is None:
            self._registry = Registry.read(self._storage, without_damaged=True)
        return self._registry

    def record(self, record: Record) -> Artifact:
        """Seal a record, then keep it."""
        self._refuse_if_superseded()
        registry = self.registry()
        if isinstance(record, TaskRecord):
            if record.task in registry.manifests:
                _same_or_new(f"the arrival of task {record.task}", registry.arrivals.get(record.task), record)
            artifact = records.write_task(self._storage, record)
            registry.arrivals[record.task] = record
        elif isinstance(record, StatisticsRecord):
            if registry.manifests:
                _same_or_new("statistics", registry.statistics, record)
            artifact = records.write_statistics(self._storage, record)
            registry.statistics = record
        elif isinstance(record, AutoencoderRecord):
            if record.task in registry.manifests:
                _same_or_new(f"the autoencoder of task {record.task}", registry.autoencoders.get(record.task), record)
            artifact = records.write_autoencoder(self._storage, record)
            registry.autoencoders[record.task] = record
        elif isinstance(record, RelatednessRecord):
            if record.task in registry.manifests:
                _same_or_new(f"the relatedness of task {record.task}", registry.relatedness.get(record.task), record)
            artifact = records.write_relatedness(self._storage, record)
            registry.relatedness[record.task] = record
            registry.relatedness_artifacts[record.task] = artifact
        else:
            _same_or_new(f"task {record.task}", registry.manifests.get(record.task), record)
            artifact = records.write_manifest(self._storage, record)
            registry.manifests[record.task] = record
        return artifact

    def note_timings(self, task: TaskId, timings: list[StageTiming]) -> None:
        """Keep who did what for how long."""
        self._refuse_if_superseded()
        records.write_timings(self._storage, task, timings)
        self.registry().timings[task] = timings

    def export(self) -> None:
        """Write the tables as Parquet."""
        self._refuse_if_superseded()
        export_tables(self._storage, *self.registry().tables())

    def _refuse_if_superseded(self) -> None:
        if superseded(self._storage, self._generation):
            raise RunInUseError(
                f"Another driver has taken over the run in {self._storage.uri!r}: this one gave no sign of life for "
                "too long. Nothing more is written; what it had recorded is kept."
            )


def _same_or_new(what: str, known: Record | None, offered: Record) -> None:
    if known is not None and known != offered:
        raise StorageError(f"The run directory already holds another record for {what}: {known}; offered: {offered}.")
