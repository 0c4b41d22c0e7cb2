"""What a report tells of a run, as values: read from its directory, where nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distributed_eg.errors import InputError
from distributed_eg.method.calibration import Calibration, HeldOut, calibrate
from distributed_eg.store import evaluations
from distributed_eg.store.evaluations import EvaluationRecord
from distributed_eg.store.records import RunRecord, TaskManifest
from distributed_eg.store.registry import Registry, read_run_record
from distributed_eg.store.storage import Storage
from distributed_eg.store.tables import first_numbers, relatedness_table
from distributed_eg.store.weights import load_tensors
from distributed_eg.types import NEAR_TIE, TaskId


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """A sealed task: where its first expert came from, and what its newest version is. Tasks have the numbers that
    users see."""

    task: TaskId
    label: int
    classes: tuple[str, ...]
    """Names, or ids where nobody said a name."""
    parent: TaskId | None
    """None: the pretrained root."""
    transfer: str
    relatedness: float | None
    """To the parent; None where there was no choice."""
    ties: tuple[TaskId | None, ...]
    """Other candidates that are as related but for 0.001."""
    num_versions: int
    is_retired: bool
    num_images: int
    """Training images of the newest version, validation part apart."""
    num_bytes: int
    """Of its newest weights."""
    autoencoder_sha256: str
    expert_sha256: str


@dataclass(frozen=True, slots=True)
class StageFacts:
    """Who did a stage of a task, when, and for how long."""

    task: TaskId
    stage: str
    worker: str
    seconds: float
    started_s: float | None
    """Seconds since 1970; None in runs of earlier versions."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Everything that a report tells of a run."""

    shown: str
    """Its directory, without secrets."""
    record: RunRecord
    tasks: tuple[TaskFacts, ...]
    """In order of arrival."""
    relatedness: Mapping[tuple[TaskId, TaskId], float]
    """By task and earlier task, from when the task first came."""
    evaluations: tuple[EvaluationRecord, ...]
    """Oldest first."""
    calibration: Calibration
    stages: tuple[StageFacts, ...]
    """Of all versions."""

    @property
    def newest(self) -> EvaluationRecord | None:
        """The evaluation that the report is about."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def by_label(self) -> dict[int, TaskFacts]:
        """Each task by its label."""
        return {task.label: task for task in self.tasks}


def read_run(uri: str) -> RunFacts:
    """Read a run directory.

    Raises:
        InputError: there is no run, or none of its tasks is finished.
        StorageError: a record is damaged, was written by another version, or cannot be read.
    """
    storage = Storage(uri)
    record = read_run_record(storage)
    registry = Registry.read(storage).of_sealed()
    if not registry.manifests:
        raise InputError(f"The run {storage.shown!r} holds no finished task yet: there is nothing to report.")
    measured = evaluations.read_all(storage)
    for error in measured.errors.values():
        raise error
    first = first_numbers(list(registry.manifests.values()))
    origins: dict[TaskId, TaskManifest] = {}
    for number in sorted(registry.manifests):
        origins.setdefault(first[number], registry.manifests[number])
    table = relatedness_table(
        [registry.relatedness[manifest.task] for manifest in origins.values()], list(registry.manifests.values())
    )
    related: dict[TaskId, dict[TaskId | None, float]] = {task: {} for task in origins}
    columns = (table[name].to_pylist() for name in ("task", "candidate", "relatedness"))
    for task, candidate, value in zip(*columns, strict=True):
        related[task][candidate] = value
    return RunFacts(
        shown=storage.shown,
        record=record,
        tasks=tuple(_task(registry, manifest, first, related[task]) for task, manifest in origins.items()),
        relatedness={
            (task, candidate): value
            for task, row in related.items()
            for candidate, value in row.items()
            if candidate is not None
        },
        evaluations=tuple(r for r in measured.records.values() if isinstance(r, EvaluationRecord)),
        calibration=_calibration(storage, registry, record),
        stages=tuple(
            StageFacts(first[task], stage.stage, stage.worker, stage.seconds, stage.started_s)
            for task, timings in sorted(registry.timings.items())
            for stage in timings.stages
        ),
    )


def _task(
    registry: Registry, origin: TaskManifest, first: Mapping[TaskId, TaskId], related: Mapping[TaskId | None, float]
) -> TaskFacts:
    """The facts of a task whose oldest version is ``origin``, which was ``related`` to each candidate."""
    task = first[origin.task]
    newest = registry.newest[task]
    parent = None if origin.parent is None else first[origin.parent]
    chosen = related.get(parent)
    ties = [c for c, value in related.items() if chosen is not None and c != parent and chosen - value < NEAR_TIE]
    return TaskFacts(
        task=task,
        label=newest.label,
        classes=tuple(name or str(c) for c, name in registry.arrivals[newest.task].names.items()),
        parent=parent,
        transfer=origin.transfer,
        relatedness=chosen,
        ties=tuple(ties),
        num_versions=len(newest.versions),
        is_retired=task not in registry.active,
        num_images=registry.autoencoders[newest.task].num_samples,
        num_bytes=sum(artifact.size_bytes for artifact in registry.weights_of(newest.task)),
        autoencoder_sha256=newest.autoencoder.sha256,
        expert_sha256=newest.expert.sha256,
    )


def _calibration(storage: Storage, registry: Registry, record: RunRecord) -> Calibration:
    """How sure the gate may be, over the tasks that it knows."""
    held_out = [registry.relatedness[manifest.task].held_out for manifest in registry.active.values()]
    tables = [HeldOut(**load_tensors(storage, artifact)) for artifact in held_out if artifact is not None]
    return calibrate(tables, record.method.get("temp"))
