"""Evaluation on workers: what is asked of them for a stream, and how their answers reach Avalanche's own loop."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from torch import Tensor

from distributed_eg.config import MethodConfig
from distributed_eg.errors import InputError
from distributed_eg.method.gate import ABSENT_LOG_PROBABILITY, with_abstentions
from distributed_eg.method.image_transform import ImageReader
from distributed_eg.runtime.messages import EvaluatePart, EvaluateRequest, GateAndExperts, PartAnswer
from distributed_eg.runtime.run import Run
from distributed_eg.store.registry import Registry
from distributed_eg.strategy.avalanche_types import LabelledDataset, Template
from distributed_eg.strategy.metrics import RoutedBatch
from distributed_eg.strategy.predictions import ImageFiles, Prediction, notes_of, predictions
from distributed_eg.strategy.tasks.task_labels import index_of, label_in_samples, task_labels_of
from distributed_eg.types import TaskId

logger = logging.getLogger(__name__)

_MOST_SAMPLES = 1024
"""That one request asks for."""


def labels_of_samples(experience: CLExperience, dataset: LabelledDataset) -> list[int]:
    """The task label of each sample of ``dataset``.

    The dataset may be read: whatever has to see it unread has been given it.
    """
    labels = task_labels_of(experience)
    if labels is not None and len(labels) > 1:
        return [int(label) for label in dataset.targets_task_labels]
    label = label_in_samples(dataset) if labels is None else labels[0]
    return [index_of(experience) if label is None else label] * len(dataset)


def right_tasks(experience: CLExperience, dataset: LabelledDataset, registry: Registry) -> list[int]:
    """The task that each sample of ``dataset`` belongs to, by its label; −1 where no trained task has it."""
    tasks = {manifest.label: task for task, manifest in registry.active.items()}
    return [tasks.get(label, -1) for label in labels_of_samples(experience, dataset)]


def adapt(
    strategy: Template, experiences: Iterable[CLExperience], loader_args: Mapping[str, object]
) -> list[tuple[CLExperience, LabelledDataset]]:
    """Each experience with the dataset that the strategy's own ``eval_dataset_adaptation`` makes of it."""
    adapted: list[tuple[CLExperience, LabelledDataset]] = []
    for strategy.experience in experiences:
        strategy.eval_dataset_adaptation(**loader_args)
        dataset: LabelledDataset = strategy.adapted_dataset  # type: ignore[assignment]  # Avalanche knows it less well
        adapted.append((strategy.experience, dataset))
    strategy.experience = strategy.adapted_dataset = None
    return adapted


def ask_workers(
    run: Run,
    registry: Registry,
    asked: Sequence[tuple[CLExperience, LabelledDataset]],
    batch_size: int,
    method: MethodConfig,
) -> list[Answers]:
    """Have the workers route every sample of ``asked``, experiences with the datasets to read, among the sealed tasks
    of ``registry``, and predict it."""
    highest = max(max(manifest.classes) for manifest in registry.active.values())
    parts: list[EvaluatePart] = []
    held = []  # the leaves that were shipped, until they are read
    for experience, dataset in asked:
        if len(dataset) == 0:
            raise InputError(f"Experience {experience.current_experience} has no samples to evaluate; leave it out.")
        shipped, leaves = run.shipper.ship(dataset, "The evaluation dataset")
        held.append(leaves)
        right = right_tasks(experience, dataset, registry)
        parts.append(EvaluatePart(shipped, 0, len(dataset), tuple(right)))
        classes = {int(c) for c in dataset.targets.uniques}
        highest = max(highest, *classes)
        _warn_of_strangers(experience, classes, set(right), registry)
    requests = _requests(run, registry, parts, batch_size, method)
    answers = iter(run.evaluate(requests))
    told = ((part, next(answers)) for request in requests for part in request.parts)
    found = []
    for whole in parts:
        of_whole = [next(told)]
        while of_whole[-1][0].last < whole.last:
            of_whole.append(next(told))
        found.append(Answers(of_whole, highest + 1, abstains=method.unknown == "abstain"))
    return found


def _warn_of_strangers(experience: CLExperience, classes: set[int], right: set[TaskId], registry: Registry) -> None:
    """Classes that no expert of the samples' own tasks has learnt can only be answered wrongly."""
    learnt = {c for task in right - {-1} for c in registry.active[task].classes}
    if -1 not in right and (strange := sorted(classes - learnt)):
        logger.warning(
            "Experience %d has the classes %s, and its tasks (%s) have learnt %s: every answer to an image of those "
            "counts as wrong. Are labels and class ids those of the training?",
            *(index_of(experience), strange, ", ".join(map(str, sorted(right))), sorted(learnt)),
        )


def ask_about_files(
    run: Run, registry: Registry, files: Sequence[str], reader: ImageReader, batch_size: int, method: MethodConfig
) -> Iterator[Prediction | None]:
    """Have the workers predict image files; None for those that cannot be read."""
    shipped, _held = run.shipper.ship(ImageFiles(files, reader), "The image files")
    whole = EvaluatePart(shipped, 0, len(files), (-1,) * len(files))
    notes = notes_of(registry)
    for result in run.evaluate(_requests(run, registry, [whole], batch_size, method)):
        said = predictions(result.tasks, result.confidences, result.classes, result.log_probabilities, notes)
        for prediction, is_none in zip(said, result.targets.tolist(), strict=True):
            yield None if is_none else prediction


def _requests(
    run: Run, registry: Registry, parts: Sequence[EvaluatePart], batch_size: int, method: MethodConfig
) -> list[EvaluateRequest]:
    """Whole batches in stream order, about as many samples for each worker, and not so many that the loss of one would
    cost much; batches, hence bytes, do not depend on how they are cut."""
    gate = GateAndExperts(registry.gate_ref(method), registry.expert_refs())
    gate_and_experts, _ = run.shipper.ship(gate, "The gate")
    batches = [
        replace(part, first=first, last=last, right_tasks=part.right_tasks[first:last])
        for part in parts
        for first in range(0, part.last, batch_size)
        for last in [min(first + batch_size, part.last)]
    ]
    # Where no worker is up yet, as many come as there are requests.
    share = -(-len(batches) // (len(run.workers()) or len(parts)))
    share = min(share, max(1, _MOST_SAMPLES // batch_size))
    requests = []
    for first in range(0, len(batches), share):
        joined: list[EvaluatePart] = []
        for batch in batches[first : first + share]:
            if batch.first > 0 and joined:  # the same experience goes on
                before = joined.pop()
                batch = replace(before, last=batch.last, right_tasks=before.right_tasks + batch.right_tasks)
            joined.append(batch)
        requests.append(EvaluateRequest(tuple(joined), batch_size, gate_and_experts))
    return requests


class Answers:
    """The workers' answers for one experience, handed out in the order of its samples."""

    def __init__(self, told: Sequence[tuple[EvaluatePart, PartAnswer]], width: int, *, abstains: bool = False) -> None:
        self._results = [answer for _, answer in told]
        # The root's own outputs may be more.
        self._width = max(width, *(1 + max(answer.classes.tolist(), default=0) for answer in self._results))
        self._abstains = abstains
        self._position = 0
        columns = [
            [r.targets, r.tasks, r.confidences, r.expert_predictions, r.strangeness, r.heard] for r in self._results
        ]
        self._targets, tasks, *others = (torch.cat(column) for column in zip(*columns, strict=True))
        right = torch.tensor([task for part, _ in told for task in part.right_tasks])
        self._routed = RoutedBatch(tasks, right, *others)

    def take(self, targets: Tensor) -> tuple[Tensor, RoutedBatch]:
        """Outputs (n, width) and routing of the next samples.

        Raises:
            InputError: their targets are not those that the workers saw.
        """
        rows = slice(self._position, self._position + len(targets))
        if rows.stop > len(self._targets):
            raise InputError("The evaluation loader gives more samples than the experience's dataset holds.")
        if not torch.equal(self._targets[rows], targets.cpu()):
            raise InputError(
                "The evaluation loader gives other samples, or another order, than the experience's dataset: leave "
                "shuffle off in eval, and change samples in eval_dataset_adaptation only."
            )
        outputs = torch.full((len(targets), self._width), ABSENT_LOG_PROBABILITY, dtype=torch.float32)
        start = 0
        for result in self._results:
            first, last = max(rows.start, start), min(rows.stop, start + len(result.targets))
            if first < last:
                # Indexed twice: the first index gives a view, which the second one writes into.
                outputs[first - rows.start : last - rows.start][:, result.classes] = result.log_probabilities[
                    first - start : last - start
                ]
            start += len(result.targets)
        self._position = rows.stop
        routed = RoutedBatch(*(column[rows] for column in self._routed))
        return with_abstentions(outputs, routed.tasks) if self._abstains else outputs, routed
