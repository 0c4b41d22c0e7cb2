"""Reading experiences: which task one is, what travels for it, and how a worker builds it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from avalanche.benchmarks import DatasetExperience
from avalanche.benchmarks.scenarios import CLStream
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience

from distributed_eg.errors import InputError
from distributed_eg.runtime.requests import ExperienceInfo, TaskData
from distributed_eg.types import TaskId, derive_seed

_ATTRIBUTES = (
    "task_label",
    "task_labels",
    "classes_in_this_experience",
    "previous_classes",
    "classes_seen_so_far",
    "future_classes",
)


class WorkerExperience(DatasetExperience):
    """An experience as a worker knows it: its data and its plain attributes, without the benchmark behind it."""

    @property
    def benchmark(self) -> Any:
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
    everywhere = _labels_of_stream(experience)
    return None if everywhere is not None and len(everywhere) > 1 and all(e == own for e in everywhere) else own


def label_of(experience: CLExperience) -> int:
    """The label of the experience's task: its only task label, or its index where it has none or several."""
    labels = task_labels_of(experience)
    if labels is None or len(labels) != 1:
        return int(experience.current_experience)
    return labels[0]


def classes_of(experience: CLExperience) -> tuple[int, ...]:
    """The dataset class ids that the experience declares, ascending.

    Raises:
        InputError: there are no samples, no targets, or a class id is negative.
    """
    index = experience.current_experience
    if len(experience.dataset) == 0:
        raise InputError(f"Experience {index} has no samples; leave it out of the stream.")
    targets = getattr(experience.dataset, "targets", None)
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
    attributes = {name: getattr(experience, name) for name in _ATTRIBUTES if hasattr(experience, name)}
    return ExperienceInfo(int(experience.current_experience), experience.origin_stream.name, attributes)


def task_data(
    experience: CLExperience,
    task: TaskId,
    seed: int,
    validation_fraction: float,
    eval_experiences: Sequence[CLExperience] | None,
) -> TaskData:
    """The experience's dataset, split into a training and a validation part by the run's seed and the task.

    ``eval_experiences`` are what the expert is measured on while it trains; None stands for the validation part.
    """
    dataset = experience.dataset
    num_samples = len(dataset)
    num_valid = min(max(1, round(validation_fraction * num_samples)), num_samples - 1)
    generator = torch.Generator().manual_seed(derive_seed(seed, task, "validation split"))
    order = torch.randperm(num_samples, generator=generator)
    # A task of a single sample has nothing else to be measured on.
    train = dataset.subset(sorted(order[num_valid:].tolist())) if num_valid else dataset
    valid = dataset.subset(sorted(order[:num_valid].tolist())) if num_valid else dataset
    evaluations: tuple[tuple[ExperienceInfo, Any], ...]
    if eval_experiences is None:
        evaluations = ((replace(info_of(experience), stream="valid"), valid),)
    else:
        evaluations = tuple((info_of(other), other.dataset) for other in eval_experiences)
    return TaskData(gate_train=train.eval(), gate_valid=valid.eval(), train=train, evaluations=evaluations)


def rebuild(info: ExperienceInfo, dataset: Any) -> WorkerExperience:
    """The experience on the worker, around ``dataset``."""
    experience = WorkerExperience(dataset=dataset, current_experience=info.index)
    experience.origin_stream = CLStream(info.stream, [experience], set_stream_info=False)
    for name, value in info.attributes.items():
        setattr(experience, name, value)
    return experience


def _labels_of_stream(experience: CLExperience) -> list[list[int]] | None:
    """Labels of every experience of the same stream, where they can be told without making the experiences."""
    stream = experience._origin_stream
    stream = getattr(stream, "value", stream)
    made = getattr(stream, "_exps", None)
    if made is not None:
        labels = [getattr(other, "task_labels", None) for other in made]
        return None if None in labels else [sorted({int(label) for label in own or []}) for own in labels]
    definitions = getattr(getattr(stream, "benchmark", None), "stream_definitions", {})
    definition = definitions.get(getattr(stream, "name", None))
    if definition is None:
        return None
    return [sorted({int(label) for label in own}) for own in definition.exps_task_labels]
