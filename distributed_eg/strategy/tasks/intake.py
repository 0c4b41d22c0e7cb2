"""From a stream of experiences to the tasks that are trained: numbers, versions, data, what travels."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from torch.utils.data import default_collate

from distributed_eg.config import MethodConfig
from distributed_eg.errors import InputError
from distributed_eg.runtime.messages import TaskInput
from distributed_eg.runtime.resuming import differences
from distributed_eg.runtime.run import Run
from distributed_eg.runtime.worker.contract import require_shape
from distributed_eg.store.records import TaskManifest, TaskRecord
from distributed_eg.strategy.avalanche_types import LabelledDataset, Template
from distributed_eg.strategy.tasks.data_identity import first_shape, identity_of
from distributed_eg.strategy.tasks.experiences import Part, parts_of, task_data, validation_of, with_label
from distributed_eg.strategy.tasks.task_labels import label_in_samples
from distributed_eg.strategy.tasks.told_of_images import Told
from distributed_eg.strategy.tasks.worker_experience import WorkerExperience
from distributed_eg.strategy.training.recording import KEPT, RecordedCallback, replay
from distributed_eg.types import ImageTransform, OnRepeat, TaskId

logger = logging.getLogger(__name__)

Streams = Sequence[CLExperience | Iterable[CLExperience]]


def check_experiences(
    experiences: Iterable[CLExperience],
    sealed: Mapping[TaskId, TaskManifest],
    on_repeat: OnRepeat,
    retired: Collection[int] = (),
) -> None:
    """Find what cannot be used before anything is begun; ``retired`` are labels of tasks that the gate does without.

    Raises:
        InputError: an experience cannot be used, or brings a label again where that is refused.
    """
    known = {manifest.label: f"as task {task}" for task, manifest in sealed.items()}
    for part in (part for experience in experiences for part in parts_of(experience)):
        if part.label in retired:
            raise _retired(part.label)
        if part.label in known and on_repeat == "error":
            raise _repeated(part.label, known[part.label])
        known[part.label] = "in the same stream"


def evaluation_parts(eval_streams: Streams | None) -> list[Part] | None:
    """The parts of every experience in ``eval_streams``; None where it is None.

    Raises:
        InputError: an experience cannot be used.
    """
    if eval_streams is None:
        return None
    streams = ((stream if isinstance(stream, Iterable) else [stream]) for stream in eval_streams)
    return [part for experience in chain.from_iterable(streams) for part in parts_of(experience)]


@dataclass(eq=False)
class Intake:
    """One call's source of tasks: makes each when it is asked for, and replays its log once it is committed."""

    strategy: Template
    """Its evaluator is told of committed tasks."""
    run: Run
    method: MethodConfig
    on_repeat: OnRepeat
    settings: Mapping[str, object]
    """What else tasks are recognised by when a run is resumed."""
    experiences: Iterable[CLExperience]
    evaluations: Sequence[Part] | None
    """What experts are measured on while they train; None: their validation parts."""
    valid_stream: Iterable[CLExperience] | None
    """Validation parts by index; None: the benchmark's own, else split off."""
    told: Told
    """What the user says of all images."""

    def __post_init__(self) -> None:
        self._inputs = self._read()
        # An experience, what its expert is measured on, and the leaves that it ships, until its task is committed.
        self._held: dict[TaskId, tuple[CLExperience, list[WorkerExperience], object]] = {}
        newest = self.run.registry.newest.values()
        self._versions = {manifest.label: manifest.versions for manifest in newest}
        self._interrupted = self.run.life.interrupted()
        self._last = -1
        self._has_told = False
        self._evaluations = None if self.evaluations is None else list(self.evaluations)

    def next_task(self) -> TaskInput | None:
        """The stream's next task; None at its end.

        Raises:
            InputError: its experience cannot be used, or brings a label again where that is refused.
        """
        return next(self._inputs, None)

    def committed(self, manifest: TaskManifest, log: Sequence[RecordedCallback] | None) -> None:
        """Replay what its expert's training logged, through the strategy's evaluator."""
        experience, evaluations, _leaves = self._held.pop(manifest.task)
        measured = [evaluation.logging() for evaluation in evaluations]
        replay(self.strategy, KEPT if log is None else log, experience.logging(), measured)

    def _read(self) -> Iterator[TaskInput]:
        for experience in self.experiences:
            validation = validation_of(experience, self.valid_stream)
            parts = parts_of(experience)
            for part in parts:
                valid = validation
                if validation is not None and len(parts) > 1:
                    valid = with_label(validation, part.label, f"The validation part of experience {part.info.index}")
                yield self._input(experience, part, valid)

    def _input(self, experience: CLExperience, part: Part, valid: LabelledDataset | None) -> TaskInput:
        what = f"The dataset of experience {part.info.index}"
        _, held = self.run.shipper.ship(part.dataset, what)  # so that each leaf is stored once
        copy = self._copy(part.dataset, what)
        identity = {**self.settings, "data": identity_of(copy)}
        self._check_shape(copy, what)
        part = self._labelled(part, copy)
        names = dict(zip(part.classes, self.told.names_of(copy, part.classes), strict=True))
        transform = self.told.transform_of(copy, what)
        del copy
        given = self._evaluations
        measured = None if given is None else [other for other in given if other.label == part.label]
        if valid is not None:
            identity["validation"] = identity_of(
                self._copy(valid, f"The validation part of experience {part.info.index}")
            )
        if measured is not None:  # plugins may act on what is measured: early stopping does
            identity["evaluations"] = [identity_of(self._copy(other.dataset, _measured(other))) for other in measured]
        record = self._number(part, identity, names, transform)
        seed, fraction = self.method.seed, self.method.validation_fraction
        data = task_data(part, record.task, seed, fraction, valid=valid, evaluations=measured)
        shipped, leaves = self.run.shipper.ship(data, what)
        measures = [WorkerExperience(info, dataset) for info, dataset in data.evaluations]
        self._held[record.task] = (experience, measures, leaves)
        del held
        return TaskInput(record, shipped, part.info, uuid.uuid4().hex)

    def _check_shape(self, copy: LabelledDataset, what: str) -> None:
        """Refuse images that the network cannot take before anything is noted of them. What only a collate function
        makes images of, or cannot be read, is left to the stage that reads all of them.

        Raises:
            InputError: the first image has another shape.
        """
        shape, is_trained = first_shape(copy), bool(self.run.registry.manifests)
        if shape is not None and getattr(copy, "collate_fn", None) in (None, default_collate):
            require_shape(shape, self.strategy.model.shape, f"{what[0].lower()}{what[1:]}", is_trained=is_trained)

    def _number(
        self, part: Part, identity: dict[str, Any], names: Mapping[int, str | None], transform: ImageTransform | None
    ) -> TaskRecord:
        """What arrives: under a number of its own, or under that which a call gave it that was cut off.

        Raises:
            InputError: it brings a label again where that is refused, or that of a retired task.
        """
        again = self._brought_before(part.label, identity)
        before = self._versions.get(part.label, ()) if again is None else again.versions[:-1]
        if again is not None:
            task = again.task
        elif before and self.on_repeat == "error":
            raise _repeated(part.label, f"as task {before[0]}")
        else:
            task = max(self.run.registry.number(part.label), self._last + 1)
        retirement = self.run.registry.retirements.get(before[0]) if before else None
        if retirement is not None and retirement.is_retired and task not in self.run.recorded.manifests:
            raise _retired(part.label)
        self._last = max(self._last, task)
        continues = before[-1] if before and self.on_repeat == "continue" else None
        if continues is not None:
            names = {**self.run.registry.arrivals[continues].names, **names}
        versions = (*before, task)
        self._versions[part.label] = max(versions, self._versions.get(part.label, ()), key=len)
        classes = tuple(sorted(names))
        class_names = tuple(names[c] for c in classes)
        return TaskRecord(task, part.label, classes, versions, continues, identity, class_names, transform)

    def _brought_before(self, label: int, identity: dict[str, Any]) -> TaskRecord | None:
        """What a call that was cut off had brought and that this is again: sealed, and the same in all that it is
        recognised by; or begun, and not to be passed by what comes after it."""
        for record in self._interrupted:
            is_sealed = record.task in self.run.registry.manifests
            if record.label == label and (
                not differences(record.identity, identity) if is_sealed else record.task > self._last
            ):
                self._interrupted.remove(record)
                return record
        return None

    def _labelled(self, part: Part, copy: LabelledDataset) -> Part:
        """A part that nobody gave a label, with the one that its samples carry, if they do.

        Raises:
            InputError: it has a label, and its samples carry another one.
        """
        index, label = part.info.index, label_in_samples(copy)
        if part.is_labelled:
            if label not in (None, part.label):
                raise InputError(
                    f"Experience {index} contradicts itself on its task labels: it is of {part.label} but its samples "
                    f"carry {label}, third."
                )
            return part
        if label is None:
            if not self._has_told:
                logger.info("Experience %d has no task labels: its index is taken, as for all like it.", index)
            self._has_told = True
            return part
        logger.warning("The task label %d of experience %d is the one that its samples carry third.", label, index)
        for i, other in enumerate(self._evaluations or ()):  # what is measured is found by the same labels
            if not other.is_labelled:
                found = label_in_samples(self._copy(other.dataset, _measured(other)))
                self._evaluations[i] = replace(other, label=found or other.label, is_labelled=True)  # type: ignore[index]
        return replace(part, label=label)

    def _copy(self, dataset: object, what: str) -> Any:
        """A copy to read from, with evaluation transforms: the caller's may count what is read, or draw."""
        copy = self.run.shipper.copy(dataset, what)
        return copy.eval() if hasattr(copy, "eval") else copy


def _measured(part: Part) -> str:
    return f"The dataset of experience {part.info.index} of the stream {part.info.stream!r}"


def _retired(label: int) -> InputError:
    return InputError(f"Label {label} is of a retired task: strategy.restore({label}) comes before training on it.")


def _repeated(label: int, where: str) -> InputError:
    return InputError(
        f"Label {label} was trained already, {where}, and on_repeat='error' refuses it; on_repeat='continue' goes on "
        "with its expert."
    )
