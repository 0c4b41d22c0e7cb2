"""Reading experiences: which task one is, what travels for it, and how a worker builds it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from avalanche.benchmarks import DatasetExperience
from avalanche.benchmarks.scenarios import CLStream
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience

from distributed_eg.errors import InputError
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.runtime.messages import ExperienceInfo, TaskData
from distributed_eg.runtime.worker.causes import ends_process
from distributed_eg.strategy.avalanche_types import LabelledDataset
from distributed_eg.types import TaskId, derive_seed

_ATTRIBUTES = "task_label task_labels classes_in_this_experience previous_classes classes_seen_so_far future_classes"
_ABSENT = object()


class WorkerExperience(DatasetExperience[LabelledDataset]):
    """An experience as a worker knows it: its data and its plain attributes, without the benchmark behind it."""

    @property
    def benchmark(self) -> NoReturn:
        """Not there: raises."""
        raise InputError(
            "experience.benchmark is not available where an expert trains: a worker holds this task's data only. "
            "Give your plugin what it needs when you make it."
        )


def read(holder: object, name: str, default: object = None) -> Any:
    """An attribute; ``default`` where there is none, or where asking for it raises, as properties of Avalanche's do:
    for several task labels, for what was not set, for what a mode of the experience masks."""
    try:
        with getattr(holder, "no_attribute_masking", nullcontext)():
            return getattr(holder, name)
    except Exception:
        return default


def index_of(experience: CLExperience) -> int:
    """The experience's place in its stream.

    Raises:
        InputError: it has none.
    """
    index = read(experience, "current_experience")
    if index is None:
        raise InputError("An experience has no index: set its current_experience.")
    return int(index)


def task_labels_of(experience: CLExperience) -> list[int] | None:
    """The experience's task labels, ascending; None where there are none.

    They may stand in the experience, in its data, and in the experience that it was cut from. Avalanche puts the label
    0 where there is none: the same single label in every experience of a stream counts as none, and so does a 0 that
    only data carry, unless the stream is known to have others.

    Raises:
        InputError: two of these places have labels that differ, or a label is no integer.
    """
    declared, carried = _declared(experience), _carried(experience)
    found: dict[str, list[int]] = {}
    stream = read(experience, "_origin_stream")
    stream = getattr(stream, "value", stream)
    made = getattr(stream, "_exps", None)
    if declared and not _is_constant(declared, _told(stream) if made is None else [_declared(e) for e in made]):
        found["it declares"] = declared
    if carried and carried != declared:
        everywhere = [_carried(e) for e in made or ()]
        constant = _is_constant(carried, everywhere)
        is_default = carried == [0] and (constant or len(everywhere) < 2)
        if not is_default and (found or not constant):
            found["its data carry"] = carried
    of_origin = task_labels_of(origin) if (origin := read(experience, "origin_experience")) is not None else None
    if of_origin and not (found and {*next(iter(found.values()))} <= {*of_origin}):
        found["it was cut from an experience of"] = of_origin
    (_, labels), *others = found.items() or [("", None)]
    if any(other != labels for _, other in others):
        told = " but ".join(f"{where} {values}" for where, values in found.items())
        raise InputError(f"Experience {index_of(experience)} contradicts itself on its task labels: {told}.")
    return labels


def _declared(experience: CLExperience) -> list[int] | None:
    labels, label = read(experience, "task_labels"), read(experience, "task_label")
    if labels is None and label is not None:
        labels = [label]
    return None if labels is None else sorted({_whole(value, "task label") for value in labels})


def _carried(experience: CLExperience) -> list[int] | None:
    labels = read(read(experience, "dataset"), "targets_task_labels")
    return None if labels is None else sorted({_whole(value, "task label") for value in labels.uniques})


def _told(stream: object) -> list[list[int]]:
    """The labels that older scenarios tell without making the experiences."""
    definitions = read(read(stream, "benchmark"), "stream_definitions") or {}
    labels = getattr(definitions.get(getattr(stream, "name", None)), "exps_task_labels", ())
    return [[int(label) for label in of_one] for of_one in labels]


def _is_constant(labels: list[int], everywhere: Sequence[list[int] | None]) -> bool:
    return len(everywhere) > 1 and all(other is not None and {*other} == {*labels} for other in everywhere)


def label_in_samples(dataset: LabelledDataset) -> int | None:
    """The task label that stands third in the first and the last sample of a dataset that has no labels otherwise; None
    where there is none, or 0. They are read: hand in a copy."""
    labels = []
    with reproducible(seed=0, threads=1):
        for i in (0, len(dataset) - 1) if read(dataset, "targets_task_labels") is None else ():
            try:
                labels.append(_whole(dataset[i][2], "task label"))  # type: ignore[index]  # or it raises
            except BaseException as error:  # no third, or something else; the stage that reads it reports it
                if ends_process(error):
                    raise
                return None
    return labels[0] if labels and labels[0] == labels[1] and labels[0] else None


def _whole(value: Any, what: str) -> int:
    """``value``, which may be of any type that holds an integer, as one."""
    try:
        number = int(value)
        if bool(value == number):
            return number
    except Exception as error:
        raise InputError(f"{value!r:.80} ({type(value).__name__}) is no {what}: it must be an integer.") from error
    raise InputError(f"{value!r:.80} ({type(value).__name__}) is no {what}: it must be an integer.")


@dataclass(frozen=True)
class Part:
    """What one task takes from an experience: all of it, or the samples of one of its labels."""

    label: int
    dataset: LabelledDataset
    classes: tuple[int, ...]
    info: ExperienceInfo
    is_labelled: bool = True
    """Whether anybody gave it that label; it is the experience's index otherwise."""


def parts_of(experience: CLExperience) -> list[Part]:
    """The tasks in an experience: one, or one for each label where it carries several, in ascending order.

    Raises:
        InputError: there are no samples, no targets, or a class id that is negative or not declared; labels contradict
            each other.
    """
    dataset = _dataset_of(experience)
    declared = _classes(experience, dataset)
    labels, info = task_labels_of(experience), info_of(experience)
    if labels is None or len(labels) < 2:
        label = index_of(experience) if labels is None else labels[0]
        return [Part(label, dataset, declared, info, is_labelled=labels is not None)]
    parts = []
    for label in labels:
        mine = with_label(dataset, label, f"Experience {info.index}")
        attributes = {**info.attributes, "task_label": label, "task_labels": [label]}
        classes = tuple(sorted({_whole(target, "class id") for target in mine.targets.uniques}))
        parts.append(Part(label, mine, classes, replace(info, attributes=attributes)))
    return parts


def _dataset_of(experience: CLExperience) -> LabelledDataset:
    try:
        dataset: LabelledDataset = experience.dataset
    except Exception as error:
        raise InputError(
            f"The dataset of experience {index_of(experience)} cannot be had: {type(error).__name__}: {error}"
        ) from error
    return dataset


def _classes(experience: CLExperience, dataset: LabelledDataset) -> tuple[int, ...]:
    index = index_of(experience)
    if len(dataset) == 0:
        raise InputError(f"Experience {index} has no samples; leave it out of the stream.")
    targets = read(read(dataset, "targets"), "uniques")
    if targets is None:
        raise InputError(f"The dataset of experience {index} has no targets; wrap it by as_classification_dataset.")
    found = {_whole(target, "class id") for target in targets}
    told = read(experience, "classes_in_this_experience")
    declared = found if told is None or len(told) == 0 else {_whole(c, "class id") for c in told}
    strangers = sorted(found - declared)
    if strangers:
        raise InputError(
            f"Experience {index} declares the classes {sorted(declared)}, but its targets hold {strangers}; correct "
            "one of them."
        )
    if min(declared) < 0:
        raise InputError(f"Experience {index} has the negative class id {min(declared)}; class ids start at 0.")
    return tuple(sorted(declared))


def info_of(experience: CLExperience) -> ExperienceInfo:
    """What a worker needs to build the experience again."""
    values = {name: read(experience, name, _ABSENT) for name in _ATTRIBUTES.split()}
    attributes = {name: value for name, value in values.items() if value is not _ABSENT}
    if read(experience, "_origin_stream") is None:
        raise InputError("The experience belongs to no stream: set its origin_stream, such as CLStream('train', ()).")
    return ExperienceInfo(index_of(experience), experience.origin_stream.name, attributes)


def validation_of(experience: CLExperience, valid_stream: Iterable[CLExperience] | None) -> LabelledDataset | None:
    """The dataset of the experience with the same index in ``valid_stream``, or, where that is None, in the benchmark's
    own "valid" stream; None without either.

    Raises:
        InputError: the stream has no such experience.
    """
    if valid_stream is None:
        benchmark = read(experience, "benchmark") or read(read(experience, "_origin_stream"), "benchmark")
        valid_stream = (read(benchmark, "streams") or {}).get("valid")
    if valid_stream is None:
        return None
    for other in valid_stream:
        if index_of(other) == index_of(experience):
            return _dataset_of(other)
    raise InputError(f"The validation stream has no experience {index_of(experience)}.")


def with_label(dataset: LabelledDataset, label: int, what: str) -> LabelledDataset:
    """The samples of ``dataset`` with that task label; ``what`` names them in errors.

    Raises:
        InputError: there are none.
    """
    labels = read(dataset, "targets_task_labels")
    mine = [i for i, of_sample in enumerate(() if labels is None else labels) if int(of_sample) == label]
    if not mine:
        raise InputError(f"{what} is of several task labels, but no sample carries the label {label}.")
    samples: LabelledDataset = dataset.subset(mine)
    return samples


def task_data(
    part: Part,
    task: TaskId,
    seed: int,
    validation_fraction: float,
    *,
    valid: LabelledDataset | None = None,
    evaluations: Sequence[Part] | None = None,
) -> TaskData:
    """A task's dataset, with the validation part given, or split off by the run's seed and the task's number.

    ``evaluations`` are what the expert is measured on while it trains; None stands for the validation part.
    """
    train = part.dataset
    if valid is None:
        num_samples = len(train)
        num_valid = min(max(1, round(validation_fraction * num_samples)), num_samples - 1)
        generator = torch.Generator().manual_seed(derive_seed(seed, task, "validation split"))
        order = torch.randperm(num_samples, generator=generator)
        # A task of a single sample has nothing else to be measured on.
        valid = train.subset(sorted(order[:num_valid].tolist())) if num_valid else train
        train = train.subset(sorted(order[num_valid:].tolist())) if num_valid else train
    measured = [Part(part.label, valid, part.classes, replace(part.info, stream="valid"))]
    kept = tuple((other.info, other.dataset) for other in (measured if evaluations is None else evaluations))
    return TaskData(gate_train=train.eval(), gate_valid=valid.eval(), train=train, evaluations=kept)


def rebuild(info: ExperienceInfo, dataset: LabelledDataset) -> WorkerExperience:
    """The experience on the worker, around ``dataset``."""
    experience = WorkerExperience(dataset=dataset, current_experience=info.index)
    experience.origin_stream = CLStream(info.stream, [experience], set_stream_info=False)
    for name, value in info.attributes.items():
        setattr(experience, name, value)
    return experience
