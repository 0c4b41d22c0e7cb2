"""The coordinator: single writer of the gate registry and the relatedness table.

Every change is sealed in the run directory before it is answered. Its memory is a cache of that: a new coordinator on
the same directory knows the same. It writes for one driver only, and for none any more once a later one drives the run.
"""

from __future__ import annotations

from typing import Protocol

from distributed_eg.errors import RunInUseError, StorageError
from distributed_eg.store import records
from distributed_eg.store.lease import superseded
from distributed_eg.store.records import Record, RecordOfTask, artifact_of_record
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.tables import export_tables


class CoordinatorApi(Protocol):
    """What a driver asks of the coordinator, wherever that lives."""

    def registry(self) -> Registry:
        """Everything recorded so far."""

    def record(self, record: Record) -> Artifact:
        """Seal a record of a kind that the registry keeps. What ``is_replaced``, and what a failed task left, may be
        replaced; other records of a sealed task, and the statistics once any task is sealed, may only be offered again
        unchanged.

        Raises:
            StorageError: the run directory cannot be written, or holds another record that may not be replaced.
            RunInUseError: a later driver has taken the run over.
        """

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
        known = None if record.is_replaced else registry.find(record)
        sealed = record.task in registry.manifests if isinstance(record, RecordOfTask) else bool(registry.manifests)
        # Compared by what they are sealed as, where NaN equals NaN and a tuple a list.
        if sealed and known is not None and artifact_of_record(known) != artifact_of_record(record):
            raise StorageError(
                f"The run directory already holds another {record.path!r}, on which a sealed task rests: {known}; "
                f"offered: {record}."
            )
        artifact = records.seal(self._storage, record)
        registry.add(record)
        return artifact

    def export(self) -> None:
        """Write the tables as Parquet."""
        self._refuse_if_superseded()
        export_tables(self._storage, *self.registry().tables())

    def _refuse_if_superseded(self) -> None:
        if superseded(self._storage, self._generation):
            raise RunInUseError(
                f"Another driver has taken over the run in {self._storage.shown!r}: this one gave no sign of life for "
                "too long. Nothing more is written; what it had recorded is kept."
            )
