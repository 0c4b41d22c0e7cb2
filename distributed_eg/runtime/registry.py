"""The gate registry and the relatedness table as one value: what the run's records add up to."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from distributed_eg.config import MethodConfig
from distributed_eg.errors import StorageError
from distributed_eg.store import records
from distributed_eg.store.reading import ExpertRef, GateRef
from distributed_eg.store.records import (
    AutoencoderRecord,
    RelatednessRecord,
    StageTiming,
    StatisticsRecord,
    TaskManifest,
)
from distributed_eg.store.sealing import Artifact, Storage
from distributed_eg.store.tables import registry_table, relatedness_table
from distributed_eg.types import TaskId


@dataclass
class Registry:
    """Every record of a run, by task. The coordinator's is the one that is written down; a driver keeps a copy."""

    statistics: StatisticsRecord | None = None
    autoencoders: dict[TaskId, AutoencoderRecord] = field(default_factory=dict)
    relatedness: dict[TaskId, RelatednessRecord] = field(default_factory=dict)
    relatedness_artifacts: dict[TaskId, Artifact] = field(default_factory=dict)
    manifests: dict[TaskId, TaskManifest] = field(default_factory=dict)
    timings: dict[TaskId, list[StageTiming]] = field(default_factory=dict)

    @staticmethod
    def read(storage: Storage) -> Registry:
        """Rebuild the registry from a run directory.

        Raises:
            StorageError: a record is damaged.
        """
        registry = Registry(statistics=records.read_statistics(storage))
        for task in records.stored_tasks(storage):
            autoencoder = records.read_autoencoder(storage, task)
            relatedness = records.read_relatedness(storage, task)
            manifest = records.read_manifest(storage, task)
            if autoencoder is not None:
                registry.autoencoders[task] = autoencoder
            if relatedness is not None:
                registry.relatedness[task] = relatedness
            if manifest is not None:
                registry.manifests[task] = manifest
                registry.relatedness_artifacts[task] = manifest.relatedness
                if autoencoder is None or autoencoder.artifact != manifest.autoencoder:
                    raise StorageError(f"The manifest of task {task} in {storage.uri!r} names another autoencoder.")
                storage.read_artifact(manifest.relatedness)
            registry.timings[task] = records.read_timings(storage, task)
        return registry

    @property
    def newest(self) -> dict[TaskId, TaskManifest]:
        """The newest version of each sealed task, by the number that users see."""
        return {self.manifests[task].versions[0]: self.manifests[task] for task in sorted(self.manifests)}

    def of_label(self, label: int) -> TaskManifest | None:
        """The newest sealed version of the task with that label."""
        return next((manifest for manifest in self.newest.values() if manifest.label == label), None)

    def number(self, label: int) -> TaskId:
        """The next number for that label: a new one, or the one that a failed attempt left behind."""
        begun = {record.label: task for task, record in self.autoencoders.items() if task not in self.manifests}
        return begun.get(label, max([*self.autoencoders, *self.manifests], default=-1) + 1)

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
