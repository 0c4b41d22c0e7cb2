"""The gate registry and the relatedness table as one value: what the run's records add up to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TypeVar

import pyarrow as pa

from distributed_eg.config import MethodConfig
from distributed_eg.errors import DamagedFileError
from distributed_eg.store import layout, records
from distributed_eg.store.experts import ExpertRef, GateRef
from distributed_eg.store.records import (
    AutoencoderRecord,
    RelatednessRecord,
    StageTiming,
    StatisticsRecord,
    TaskManifest,
    TaskRecord,
)
from distributed_eg.store.storage import REPAIR, Artifact, Storage
from distributed_eg.store.tables import registry_table, relatedness_table
from distributed_eg.types import TaskId

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Registry:
    """Every record of a run, by task. The coordinator's is the one that is written down; a driver keeps a copy."""

    statistics: StatisticsRecord | None = None
    arrivals: dict[TaskId, TaskRecord] = field(default_factory=dict)
    autoencoders: dict[TaskId, AutoencoderRecord] = field(default_factory=dict)
    relatedness: dict[TaskId, RelatednessRecord] = field(default_factory=dict)
    relatedness_artifacts: dict[TaskId, Artifact] = field(default_factory=dict)
    manifests: dict[TaskId, TaskManifest] = field(default_factory=dict)
    timings: dict[TaskId, list[StageTiming]] = field(default_factory=dict)

    @staticmethod
    def read(storage: Storage, *, without_damaged: bool = False) -> Registry:
        """Rebuild the registry from a run directory.

        Args:
            storage: the run directory.
            without_damaged: leave damaged records out, and say so in the log; whoever resumes makes them again.

        Raises:
            DamagedFileError: a record is damaged.
        """

        skip = without_damaged
        registry = Registry(statistics=_whole(lambda: records.read_statistics(storage), skip))
        for task in records.stored_tasks(storage):
            registry._read_task(storage, task, skip)
        return registry

    def _read_task(self, storage: Storage, task: TaskId, skip: bool) -> None:
        arrival = _whole(lambda: records.read_task(storage, task), skip)
        autoencoder = _whole(lambda: records.read_autoencoder(storage, task), skip)
        relatedness = _whole(lambda: records.read_relatedness(storage, task), skip)
        manifest = _whole(lambda: records.read_manifest(storage, task), skip)
        if arrival is not None:
            self.arrivals[task] = arrival
        if autoencoder is not None:
            self.autoencoders[task] = autoencoder
        if relatedness is not None:
            self.relatedness[task] = relatedness
            self.relatedness_artifacts[task] = records.relatedness_artifact(storage, task)
        if manifest is not None and _whole(lambda: self._check(storage, manifest, skip), skip):
            self.manifests[task] = manifest
        self.timings[task] = _whole(lambda: records.read_timings(storage, task), skip) or []

    def _check(self, storage: Storage, manifest: TaskManifest, without_autoencoder: bool) -> bool:
        own = self.autoencoders.get(manifest.task)
        if own is None and not without_autoencoder:
            path = layout.task_file(manifest.task, "autoencoder")
            raise DamagedFileError(f"The record {path!r} in {storage.uri!r} is missing. {REPAIR}")
        if own is not None and own.artifact != manifest.autoencoder:
            raise DamagedFileError(
                f"The manifest of task {manifest.task} in {storage.uri!r} names another autoencoder than its record.",
            )
        storage.read_artifact(manifest.relatedness)
        return True

    def snapshot(self) -> Registry:
        """The same records, untouched by what is recorded later."""
        tables = {f.name: dict(getattr(self, f.name)) for f in fields(self) if f.name != "statistics"}
        return Registry(self.statistics, **tables)

    @property
    def newest(self) -> dict[TaskId, TaskManifest]:
        """The newest version of each sealed task, by the number that users see."""
        return {self.manifests[task].versions[0]: self.manifests[task] for task in sorted(self.manifests)}

    def of_label(self, label: int) -> TaskManifest | None:
        """The newest sealed version of the task with that label."""
        return next((manifest for manifest in self.newest.values() if manifest.label == label), None)

    def number(self, label: int) -> TaskId:
        """The next number for that label: a new one, or the one that a failed attempt left behind."""
        begun = {record.label: task for task, record in self.arrivals.items() if task not in self.manifests}
        return begun.get(label, max(self.arrivals, default=-1) + 1)

    def expert_ref(self, task: TaskId) -> ExpertRef:
        """Where a sealed task's expert is."""
        manifest = self.manifests[task]
        return ExpertRef(manifest.expert, manifest.classes)

    def expert_refs(self) -> dict[TaskId, ExpertRef]:
        """Where each task's newest expert is, by the number that users see."""
        return {task: self.expert_ref(manifest.task) for task, manifest in self.newest.items()}

    def gate_ref(self, method: MethodConfig) -> GateRef:
        """Where everything is that the gate over all sealed tasks, in their newest versions, needs."""
        assert self.statistics is not None
        autoencoders = tuple((task, manifest.autoencoder) for task, manifest in sorted(self.newest.items()))
        kind = method.autoencoder.kind
        return GateRef(kind, self.statistics, autoencoders, method.temp, method.confidence_threshold)

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """The registry and the relatedness table, over the sealed tasks."""
        sealed = [self.relatedness[task] for task in sorted(self.manifests)]
        return (
            registry_table(list(self.manifests.values()), self.timings),
            relatedness_table(sealed, list(self.manifests.values())),
        )


def _whole(read: Callable[[], T], skip: bool) -> T | None:
    """What ``read`` gives; None, said in the log, where that is damaged and ``skip`` says to go on."""
    try:
        return read()
    except DamagedFileError as error:
        if not skip:
            raise
        logger.warning("%s", error)
        return None
