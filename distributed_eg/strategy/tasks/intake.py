"""From a stream of experiences to the tasks that the session works on: numbers, versions, data, what travels."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from avalanche.benchmarks.scenarios.generic_scenario import CLExperience

from distributed_eg.config import MethodConfig
from distributed_eg.errors import InputError
from distributed_eg.runtime.messages import TaskInput
from distributed_eg.runtime.run import OpenRun
from distributed_eg.store.records import TaskManifest
from distributed_eg.strategy.tasks.experiences import (
    Part,
    parts_of,
    task_data,
    validation_in,
    validation_of,
    with_label,
)
from distributed_eg.strategy.tasks.settings_identity import DataIdentities
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
    """Makes task inputs one by one; holds an experience, and the leaves that it ships, until its task is released.

    Args:
        run: where the tasks are trained.
        method: the run's numbers.
        on_repeat: what a label that comes again means.
        evaluations: what experts are measured on while they train; None: their validation parts.
        valid_stream: validation parts by index; None: the benchmark's own, else split off.
        settings: what else the tasks are recognised by when a run is resumed.
        identities: what their datasets are recognised by; it remembers those that it knows.
    """

    def __init__(
        self,
        run: OpenRun,
        method: MethodConfig,
        on_repeat: OnRepeat,
        evaluations: Sequence[Part] | None,
        valid_stream: Iterable[CLExperience] | None,
        settings: Mapping[str, Any],
        identities: DataIdentities,
    ) -> None:
        self._run = run
        self._method = method
        self._on_repeat = on_repeat
        self._evaluations = evaluations
        self._valid_stream = valid_stream
        self._held: dict[TaskId, tuple[CLExperience, object]] = {}
        newest = run.session.registry.newest.values()
        self._versions = {manifest.label: manifest.versions for manifest in newest}
        self._classes = {manifest.label: manifest.classes for manifest in newest}
        self._last = -1
        self._identities = identities
        self._settings = settings

    def inputs(self, experiences: Iterable[CLExperience]) -> Iterator[TaskInput]:
        """The tasks of ``experiences``, in order, each shipped when it is asked for."""
        for experience in experiences:
            if self._valid_stream is None:
                validation = validation_of(experience)
            else:
                validation = validation_in(self._valid_stream, experience)
            parts = parts_of(experience)
            for part in parts:
                valid = with_label(validation, part.label) if len(parts) > 1 else validation
                yield self._input(experience, part, valid)

    def release(self, task: TaskId) -> CLExperience:
        """The experience of a committed task, which is not held any more."""
        return self._held.pop(task)[0]

    def _input(self, experience: CLExperience, part: Part, valid: object) -> TaskInput:
        before = self._versions.get(part.label, ())
        if before and self._on_repeat == "error":
            check_experiences([experience], self._run.session.registry.newest, self._on_repeat)
        task = self._last = max(self._run.session.registry.number(part.label), self._last + 1)
        continues = before[-1] if before and self._on_repeat == "continue" else None
        known = () if continues is None else self._classes[part.label]
        classes = tuple(sorted({*part.classes, *known}))
        self._versions[part.label], self._classes[part.label] = (*before, task), classes
        measured = None
        if self._evaluations is not None:
            measured = [other for other in self._evaluations if other.label == part.label]
        method = self._method
        data = task_data(part, task, method.seed, method.validation_fraction, valid=valid, evaluations=measured)
        identity = {"data": self._identities.of(part.dataset), **self._settings}
        if valid is not None:
            identity["validation"] = self._identities.of(valid)
        if measured is not None:  # plugins may act on what is measured: early stopping does
            identity["evaluations"] = [self._identities.of(other.dataset) for other in measured]
        shipped, leaves = self._run.engine.shipper.ship(data, f"the dataset of experience {part.info.index}")
        self._held[task] = (experience, leaves)
        return TaskInput(
            task,
            part.label,
            classes,
            shipped,
            part.info,
            uuid.uuid4().hex,
            (*before, task),
            continues,
            identity=identity,
        )


def _flat(streams: Streams) -> Iterator[CLExperience]:
    for stream in streams:
        if isinstance(stream, Iterable):
            yield from stream
        else:
            yield stream
