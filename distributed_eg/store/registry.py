"""The gate registry and the relatedness table as one value: what the run's records add up to."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa

from distributed_eg.config import MethodConfig
from distributed_eg.errors import DamagedFileError, InputError
from distributed_eg.store import records
from distributed_eg.store.record_text import REPAIR
from distributed_eg.store.records import (
    AutoencoderRecord,
    R,
    Record,
    RecordOfTask,
    RelatednessRecord,
    RetirementRecord,
    RunRecord,
    StatisticsRecord,
    StreamRecord,
    TaskManifest,
    TaskRecord,
    TaskTimings,
)
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.tables import registry_table, relatedness_table
from distributed_eg.types import AutoencoderKind, TaskId, Unknown

logger = logging.getLogger(__name__)


def read_run_record(storage: Storage) -> RunRecord:
    """What the run is.

    Raises:
        InputError: there is no run.
        StorageError: its record is damaged, was written by another version, or cannot be read.
    """
    record = records.read(storage, RunRecord)
    if record is None:
        raise InputError(f"There is no run at {storage.shown!r}: it has no {RunRecord.path_of(None)!r}.")
    return record


_PLACES: dict[type[Record], str] = {
    StatisticsRecord: "statistics",
    StreamRecord: "stream",
    TaskRecord: "arrivals",
    AutoencoderRecord: "autoencoders",
    RelatednessRecord: "relatedness",
    TaskManifest: "manifests",
    TaskTimings: "timings",
    RetirementRecord: "retirements",
}
"""The field of ``Registry`` that each kind of record is in."""


@dataclass(frozen=True, slots=True)
class ExpertRef:
    """Where an expert is, and which dataset class ids its outputs stand for."""

    source: Artifact | TaskId
    """A sealed file, or the number of the task whose expert is in memory: what the reader's ``load`` takes."""
    classes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GateRef:
    """Where everything that a gate needs is."""

    kind: AutoencoderKind
    statistics: StatisticsRecord
    autoencoders: tuple[tuple[TaskId, Artifact], ...]
    temp: float | None
    confidence_threshold: float | None
    summaries: tuple[Artifact, ...] = ()
    """Of the same tasks, where it goes by the shared score."""
    held_out: tuple[Artifact, ...] = ()
    """What held-out images said of the gate."""
    unknown: Unknown = "expert"
    limits: tuple[float, ...] = ()
    """Of each autoencoder, the error above which an image is strange to it; empty where one's is not known."""


@dataclass
class Registry:
    """Every record of a run, by task. The coordinator's is the one that is written down; a driver keeps a copy."""

    statistics: StatisticsRecord | None = None
    stream: StreamRecord | None = None
    arrivals: dict[TaskId, TaskRecord] = field(default_factory=dict)
    autoencoders: dict[TaskId, AutoencoderRecord] = field(default_factory=dict)
    relatedness: dict[TaskId, RelatednessRecord] = field(default_factory=dict)
    manifests: dict[TaskId, TaskManifest] = field(default_factory=dict)
    timings: dict[TaskId, TaskTimings] = field(default_factory=dict)
    retirements: dict[TaskId, RetirementRecord] = field(default_factory=dict)

    @staticmethod
    def read(storage: Storage, *, without_damaged: bool = False) -> Registry:
        """Rebuild the registry from a run directory.

        Args:
            storage: the run directory.
            without_damaged: leave damaged records out, and say so in the log; whoever resumes makes them again.

        Raises:
            DamagedFileError: a record is damaged.
        """
        found = records.read_all(storage, _PLACES)
        registry = Registry()
        for record in found.records.values():
            registry.add(record)
        for manifest in list(registry.manifests.values()):
            own = registry.autoencoders.get(manifest.task)
            fits = without_damaged if own is None else own.artifact == manifest.autoencoder
            if not fits or found.artifacts.get(manifest.relatedness.path) != manifest.relatedness:
                del registry.manifests[manifest.task]
                found.errors[manifest.path] = DamagedFileError(
                    f"The record {manifest.path!r} in {storage.shown!r} does not fit the autoencoder or the "
                    "relatedness record of its task, which is missing or another one than when the task was sealed. "
                    f"{REPAIR}"
                )
        for error in found.errors.values():
            if not without_damaged or not isinstance(error, DamagedFileError):
                raise error
            logger.warning("%s", error)
        return registry

    def add(self, record: Record) -> None:
        """Take a record in, instead of the one that was in its place."""
        if isinstance(record, RecordOfTask):
            getattr(self, _PLACES[type(record)])[record.task] = record
        else:
            setattr(self, _PLACES[type(record)], record)

    def find(self, like: R) -> R | None:
        """The record in whose place ``like`` belongs."""
        place: Any = getattr(self, _PLACES[type(like)])
        found: R | None = place.get(like.task) if isinstance(like, RecordOfTask) else place
        return found

    def snapshot(self) -> Registry:
        """The same records, untouched by what is recorded later."""
        tables = {f.name: dict(getattr(self, f.name)) for f in fields(self) if f.name not in ("statistics", "stream")}
        return Registry(self.statistics, self.stream, **tables)

    def of_sealed(self) -> Registry:
        """The same without what was done for tasks that are not sealed."""
        own = self.snapshot()
        for place in (own.autoencoders, own.relatedness, own.timings):
            for task in place.keys() - own.manifests.keys():
                del place[task]
        return own

    @property
    def newest(self) -> dict[TaskId, TaskManifest]:
        """The newest version of each sealed task, by the number that users see."""
        return {self.manifests[task].versions[0]: self.manifests[task] for task in sorted(self.manifests)}

    @property
    def active(self) -> dict[TaskId, TaskManifest]:
        """``newest``, but for the tasks that are retired: those that the gate chooses among."""
        gone = {task for task, record in self.retirements.items() if record.is_retired}
        return {task: manifest for task, manifest in self.newest.items() if task not in gone}

    def is_hidden(self, task: TaskId, of: TaskId) -> bool:
        """Whether a sealed task, in whatever version, was retired when task ``of`` came."""
        record = self.retirements.get(self.arrivals[task].versions[0])
        return record is not None and record.hides_from(of)

    def is_swept(self, task: TaskId) -> bool:
        """Whether a task's weights, in whatever version, may be gone."""
        record = self.retirements.get(self.arrivals[task].versions[0])
        return record is not None and record.is_swept

    def of_label(self, label: int) -> TaskManifest | None:
        """The newest sealed version of the task with that label."""
        return next((manifest for manifest in self.newest.values() if manifest.label == label), None)

    @property
    def num_ended(self) -> int:
        """Tasks below this number came in calls that ended; runs of before this was noted: up to the first that is not
        sealed."""
        if self.stream is not None:
            return self.stream.num_tasks
        unsealed = self.arrivals.keys() - self.manifests.keys()
        return min(unsealed, default=max(self.arrivals, default=-1) + 1)

    def number(self, label: int) -> TaskId:
        """The next number for that label: a new one, or the one that a failed attempt left behind."""
        begun = {record.label: task for task, record in self.arrivals.items() if task not in self.manifests}
        return begun.get(label, max(self.arrivals, default=-1) + 1)

    def weights_of(self, task: TaskId) -> list[Artifact]:
        """The sealed files of a sealed task's autoencoder, of what goes with it, and of its expert."""
        named = (*self.autoencoders[task].artifacts, self.relatedness[task].held_out, self.manifests[task].expert)
        return [artifact for artifact in named if artifact is not None]

    def expert_ref(self, task: TaskId) -> ExpertRef:
        """Where a sealed task's expert is."""
        manifest = self.manifests[task]
        return ExpertRef(manifest.expert, manifest.classes)

    def expert_refs(self) -> dict[TaskId, ExpertRef]:
        """Where the newest expert of each task is that is not retired, by the number that users see."""
        return {task: self.expert_ref(manifest.task) for task, manifest in self.active.items()}

    def gate_ref(self, method: MethodConfig) -> GateRef:
        """Where everything is that the gate over all sealed tasks that are not retired, in their newest versions,
        needs."""
        assert self.statistics is not None
        autoencoders = tuple((task, manifest.autoencoder) for task, manifest in sorted(self.active.items()))
        newest = [manifest.task for _, manifest in sorted(self.active.items())]
        summaries = [self.autoencoders[task].summary for task in newest if method.gate_score == "shared"]
        held_out = [self.relatedness[task].held_out for task in newest]
        limits = [self.autoencoders[task].limit(method.unknown_quantile) for task in newest]
        return GateRef(
            method.autoencoder.kind,
            self.statistics,
            autoencoders,
            method.temp,
            method.confidence_threshold,
            tuple(filter(None, summaries)),
            tuple(filter(None, held_out)),
            method.unknown,
            tuple(limit for limit in limits if limit is not None) if None not in limits else (),
        )

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """The registry and the relatedness table, over the sealed tasks."""
        manifests = list(self.manifests.values())
        sealed = [self.relatedness[task] for task in sorted(self.manifests)]
        return registry_table(manifests, self.timings), relatedness_table(sealed, manifests)
