"""From a stream of experiences to the tasks that are trained: numbers, versions, data, what travels."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from avalanche.benchmarks.scenarios.generic_scenario import CLExperience

from distributed_eg.config import MethodConfig
from distributed_eg.errors import InputError
from distributed_eg.runtime.messages import TaskInput
from distributed_eg.runtime.run import Run
from distributed_eg.store.records import TaskManifest, TaskRecord
from distributed_eg.strategy.avalanche_types import LabelledDataset, Template
from distributed_eg.strategy.tasks.data_identity import identity_of
from distributed_eg.strategy.tasks.experiences import (
    Part,
    parts_of,
    task_data,
    validation_in,
    validation_of,
    with_label,
)
from distributed_eg.strategy.training.recording import KEPT, RecordedCallback, replay
from distributed_eg.types import OnRepeat, TaskId

Streams = Sequence[CLExperience | Iterable[CLExperience]]


def check_experiences(
    experiences: Iterable[CLExperience], sealed: Mapping[TaskId, TaskManifest], on_repeat: OnRepeat
) -> None:
    """Find what cannot be used before anything is begun.

    Raises:
        InputError: an experience cannot be used, or brings a label again where that is refused.
    """
    known = {manifest.label: f"as task {task}" for task, manifest in sealed.items()}
    for part in (part for experience in experiences for part in parts_of(experience)):
        if part.label in known and on_repeat == "error":
            raise InputError(
                f"Label {part.label} was trained already, {known[part.label]}, and on_repeat='error' refuses it; "
                "on_repeat='continue' goes on with its expert."
            )
        known[part.label] = "in the same stream"


def evaluation_parts(eval_streams: Streams | None) -> list[Part] | None:
    """The parts of every experience in ``eval_streams``; None where it is None.

    Raises:
        InputError: an experience cannot be used.
    """
    if eval_streams is None:
        return None
    return [part for experience in _flat(eval_streams) for part in parts_of(experience)]


class Intake:
    """One call's source of tasks: makes each when it is asked for, and replays its log once it is committed.

    Args:
        strategy: whose evaluator is told of committed tasks.
        run: where the tasks are trained.
        method: the run's numbers.
        on_repeat: what a label that comes again means.
        settings: what else the tasks are recognised by when a run is resumed.
        experiences: the stream.
        evaluations: what experts are measured on while they train; None: their validation parts.
        valid_stream: validation parts by index; None: the benchmark's own, else split off.
    """

    def __init__(
        self,
        strategy: Template,
        run: Run,
        *,
        method: MethodConfig,
        on_repeat: OnRepeat,
        settings: Mapping[str, object],
        experiences: Iterable[CLExperience],
        evaluations: Sequence[Part] | None,
        valid_stream: Iterable[CLExperience] | None,
    ) -> None:
        self._strategy = strategy
        self._run = run
        self._method = method
        self._on_repeat = on_repeat
        self._settings = settings
        self._evaluations = evaluations
        self._valid_stream = valid_stream
        self._inputs = self._read(experiences)
        # An experience, and the leaves that it ships, are held until its task is committed.
        self._held: dict[TaskId, tuple[CLExperience, object]] = {}
        newest = run.registry.newest.values()
        self._versions = {manifest.label: manifest.versions for manifest in newest}
        self._classes = {manifest.label: manifest.classes for manifest in newest}
        self._last = -1

    def next_task(self) -> TaskInput | None:
        """The stream's next task; None at its end.

        Raises:
            InputError: its experience cannot be used, or brings a label again where that is refused.
        """
        return next(self._inputs, None)

    def committed(self, manifest: TaskManifest, log: Sequence[RecordedCallback] | None) -> None:
        """Replay what its expert's training logged, through the strategy's evaluator."""
        experience, _leaves = self._held.pop(manifest.task)
        self._strategy.experience = experience.logging()
        replay(self._strategy, self._strategy.evaluator, KEPT if log is None else log)

    def _read(self, experiences: Iterable[CLExperience]) -> Iterator[TaskInput]:
        for experience in experiences:
            if self._valid_stream is None:
                validation = validation_of(experience)
            else:
                validation = validation_in(self._valid_stream, experience)
            parts = parts_of(experience)
            for part in parts:
                valid = with_label(validation, part.label) if len(parts) > 1 else validation
                yield self._input(experience, part, valid)

    def _input(self, experience: CLExperience, part: Part, valid: LabelledDataset | None) -> TaskInput:
        before = self._versions.get(part.label, ())
        if before and self._on_repeat == "error":
            check_experiences([experience], self._run.registry.newest, self._on_repeat)
        task = self._last = max(self._run.registry.number(part.label), self._last + 1)
        continues = before[-1] if before and self._on_repeat == "continue" else None
        known = () if continues is None else self._classes[part.label]
        classes = tuple(sorted({*part.classes, *known}))
        versions = (*before, task)
        self._versions[part.label], self._classes[part.label] = versions, classes
        measured = None
        if self._evaluations is not None:
            measured = [other for other in self._evaluations if other.label == part.label]
        data = task_data(
            part, task, self._method.seed, self._method.validation_fraction, valid=valid, evaluations=measured
        )
        shipped, leaves = self._run.shipper.ship(data, f"the dataset of experience {part.info.index}")
        self._held[task] = (experience, leaves)
        identity = {**self._settings, "data": self._identity(part.dataset)}
        if valid is not None:
            identity["validation"] = self._identity(valid)
        if measured is not None:  # plugins may act on what is measured: early stopping does
            identity["evaluations"] = [self._identity(other.dataset) for other in measured]
        record = TaskRecord(task, part.label, classes, versions, continues, identity)
        return TaskInput(record, shipped, part.info, uuid.uuid4().hex)

    def _identity(self, dataset: object) -> dict[str, str | int]:
        """What ``dataset`` is recognised by, read from a copy: the caller's may count what is read, or draw."""
        copy = self._run.shipper.copy(dataset, "a dataset")
        return identity_of(copy.eval() if hasattr(copy, "eval") else copy)


def _flat(streams: Iterable[Any]) -> Iterator[CLExperience]:
    for stream in streams:
        yield from stream if isinstance(stream, Iterable) else [stream]
