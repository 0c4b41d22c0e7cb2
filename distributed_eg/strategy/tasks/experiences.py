"""From experiences to tasks: the task of each, or the tasks where it has several labels, and their data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience

from distributed_eg.errors import InputError
from distributed_eg.runtime.messages import ExperienceInfo, TaskData
from distributed_eg.strategy.avalanche_types import LabelledDataset
from distributed_eg.strategy.tasks.task_labels import index_of, read, task_labels_of, whole
from distributed_eg.strategy.tasks.worker_experience import info_of
from distributed_eg.types import TaskId, derive_seed

logger = logging.getLogger(__name__)


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
        classes = tuple(sorted({whole(target, "class id") for target in mine.targets.uniques}))
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
    found = {whole(target, "class id") for target in targets}
    told = read(experience, "classes_in_this_experience")
    declared = found if told is None or len(told) == 0 else {whole(c, "class id") for c in told}
    strangers = sorted(found - declared)
    if strangers:
        raise InputError(
            f"Experience {index} declares the classes {sorted(declared)}, but its targets hold {strangers}; correct "
            "one of them."
        )
    if min(declared) < 0:
        raise InputError(f"Experience {index} has the negative class id {min(declared)}; class ids start at 0.")
    return tuple(sorted(declared))


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
        if gone := sorted({*part.classes} - {whole(target, "class id") for target in train.targets.uniques}):
            logger.warning(
                "Task %d (label %d) has no image of the classes %s to learn from: all of theirs are held out. Give "
                "more, or a validation stream.",
                *(task, part.label, gone),
            )
    measured = [Part(part.label, valid, part.classes, replace(part.info, stream="valid"))]
    kept = tuple((other.info, other.dataset) for other in (measured if evaluations is None else evaluations))
    return TaskData(gate_train=train.eval(), gate_valid=valid.eval(), train=train, evaluations=kept)
