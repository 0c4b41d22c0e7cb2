"""Reading experiences: which task one is, what travels for it, and how a worker builds it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from avalanche.benchmarks import DatasetExperience
from avalanche.benchmarks.scenarios import CLStream
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience

from distributed_eg.errors import InputError
from distributed_eg.runtime.messages import ExperienceInfo, TaskData
from distributed_eg.strategy.avalanche_types import LabelledDataset
from distributed_eg.types import TaskId, derive_seed

_ATTRIBUTES = "task_label task_labels classes_in_this_experience previous_classes classes_seen_so_far future_classes"


class WorkerExperience(DatasetExperience[LabelledDataset]):
    """An experience as a worker knows it: its data and its plain attributes, without the benchmark behind it."""

    @property
    def benchmark(self) -> NoReturn:
        """Not there: raises."""
        raise InputError(
            "experience.benchmark is not available where an expert trains: a worker holds this task's data only. "
            "Give your plugin what it needs when you make it."
        )


def task_labels_of(experience: CLExperience) -> list[int] | None:
    """The experience's task labels; None where the benchmark has none.

    Avalanche's older scenarios give every experience the label 0 where they have no labels; a stream of several
    experiences that all carry the same single label therefore counts as one without labels.
    """
    labels = getattr(experience, "task_labels", None)
    if labels is None:
        return None
    own = sorted({int(label) for label in labels})
    stream = getattr(experience._origin_stream, "value", experience._origin_stream)
    if (made := getattr(stream, "_exps", None)) is not None:
        everywhere = [getattr(other, "task_labels", None) for other in made]
    else:  # older scenarios tell labels without making the experiences
        definitions = getattr(getattr(stream, "benchmark", None), "stream_definitions", {})
        everywhere = getattr(definitions.get(getattr(stream, "name", None)), "exps_task_labels", [])
    same = all(other is not None and {int(label) for label in other} == {*own} for other in everywhere)
    return None if len(everywhere) > 1 and same else own


def label_of(experience: CLExperience) -> int:
    """The label of the experience's task: its only task label, or its index where it has none or several."""
    labels = task_labels_of(experience)
    return int(experience.current_experience) if labels is None or len(labels) != 1 else labels[0]


@dataclass(frozen=True)
class Part:
    """What one task takes from an experience: all of it, or the samples of one of its labels."""

    label: int
    dataset: LabelledDataset
    classes: tuple[int, ...]
    info: ExperienceInfo


def parts_of(experience: CLExperience) -> list[Part]:
    """The tasks in an experience: one, or one for each label where it carries several, in ascending order.

    Raises:
        InputError: there are no samples, no targets, or a class id that is negative or not declared.
    """
    labels, info = task_labels_of(experience), info_of(experience)
    dataset = experience.dataset
    declared = _classes(experience, dataset)
    if labels is None or len(labels) < 2:
        return [Part(label_of(experience), dataset, declared, info)]
    positions = dataset.targets_task_labels.val_to_idx
    parts = []
    for label in labels:
        mine = dataset.subset(list(positions[label]))
        attributes = {**info.attributes, "task_label": label, "task_labels": [label]}
        classes = tuple(sorted(int(target) for target in mine.targets.uniques))
        parts.append(Part(label, mine, classes, replace(info, attributes=attributes)))
    return parts


def _classes(experience: CLExperience, dataset: LabelledDataset) -> tuple[int, ...]:
    index = experience.current_experience
    if len(dataset) == 0:
        raise InputError(f"Experience {index} has no samples; leave it out of the stream.")
    targets = getattr(dataset, "targets", None)
    if targets is None:
        raise InputError(f"The dataset of experience {index} has no targets; wrap it by as_classification_dataset.")
    found = {int(target) for target in targets.uniques}
    declared = {int(c) for c in getattr(experience, "classes_in_this_experience", None) or found}
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
    attributes = {name: getattr(experience, name) for name in _ATTRIBUTES.split() if hasattr(experience, name)}
    if experience._origin_stream is None:
        raise InputError("The experience belongs to no stream: set its origin_stream, such as CLStream('train', ()).")
    return ExperienceInfo(int(experience.current_experience), experience.origin_stream.name, attributes)


def validation_of(experience: CLExperience, valid_stream: Iterable[CLExperience] | None) -> LabelledDataset | None:
    """The dataset of the experience with the same index in ``valid_stream``, or, where that is None, in the benchmark's
    own "valid" stream; None without either.

    Raises:
        InputError: the stream has no such experience.
    """
    if valid_stream is None:
        benchmark = getattr(experience, "benchmark", None) or getattr(experience._origin_stream, "benchmark", None)
        valid_stream = getattr(benchmark, "streams", {}).get("valid")
    if valid_stream is None:
        return None
    for other in valid_stream:
        if other.current_experience == experience.current_experience:
            found: LabelledDataset = other.dataset
            return found
    raise InputError(f"The validation stream has no experience {experience.current_experience}.")


def with_label(dataset: LabelledDataset | None, label: int) -> LabelledDataset | None:
    """The samples of ``dataset`` with that task label; None where there is no dataset.

    Raises:
        InputError: there are none.
    """
    if dataset is None:
        return None
    labels = getattr(dataset, "targets_task_labels", None)
    if labels is None or label not in labels.uniques:
        raise InputError(f"The validation part of an experience with several labels has no samples of label {label}.")
    samples: LabelledDataset = dataset.subset(list(labels.val_to_idx[label]))
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
