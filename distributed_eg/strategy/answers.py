"""Evaluation on workers: what is asked of them for a stream, and how their answers reach Avalanche's own loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from torch import Tensor

from distributed_eg.config import MethodConfig
from distributed_eg.errors import InputError
from distributed_eg.method.gate import ABSENT_LOG_PROBABILITY
from distributed_eg.method.image_transform import ImageReader
from distributed_eg.runtime.messages import EvaluateRequest, EvaluateResult, GateAndExperts
from distributed_eg.runtime.run import Run
from distributed_eg.runtime.shipping import Shipped
from distributed_eg.store.registry import Registry
from distributed_eg.strategy.avalanche_types import LabelledDataset, Template
from distributed_eg.strategy.metrics import RoutedBatch
from distributed_eg.strategy.predictions import ImageFiles, Prediction, notes_of, predictions
from distributed_eg.strategy.tasks.task_labels import index_of, label_in_samples, task_labels_of


def right_tasks(experience: CLExperience, dataset: LabelledDataset, registry: Registry) -> list[int]:
    """The task that each sample of ``dataset`` belongs to, by its label; −1 where no trained task has it.

    The dataset may be read: whatever has to see it unread has been given it.
    """
    labels = task_labels_of(experience)
    if labels is not None and len(labels) > 1:
        of_sample = [int(label) for label in dataset.targets_task_labels]
    else:
        label = label_in_samples(dataset) if labels is None else labels[0]
        of_sample = [index_of(experience) if label is None else label] * len(dataset)
    tasks = {manifest.label: task for task, manifest in registry.active.items()}
    return [tasks.get(label, -1) for label in of_sample]


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
    shards = max(1, -(-max(1, len(run.workers())) // max(1, len(asked))))
    highest = max(max(manifest.classes) for manifest in registry.active.values())
    gate = GateAndExperts(registry.gate_ref(method), registry.expert_refs())
    gate_and_experts, _ = run.shipper.ship(gate, "The gate")
    plans: list[list[EvaluateRequest]] = []
    held = []  # the leaves that were shipped, until they are read
    for experience, dataset in asked:
        if len(dataset) == 0:
            raise InputError(f"Experience {experience.current_experience} has no samples to evaluate; leave it out.")
        shipped, leaves = run.shipper.ship(dataset, "The evaluation dataset")
        held.append(leaves)
        right = right_tasks(experience, dataset, registry)
        plans.append(_plan(shipped, right, batch_size, shards, gate_and_experts))
        highest = max(highest, *(int(c) for c in dataset.targets.uniques))
    results = iter(run.evaluate([request for plan in plans for request in plan]))
    return [Answers(plan, [next(results) for _ in plan], highest + 1) for plan in plans]


def ask_about_files(
    run: Run, registry: Registry, files: Sequence[str], reader: ImageReader, batch_size: int, method: MethodConfig
) -> Iterator[Prediction | None]:
    """Have the workers predict image files; None for those that cannot be read."""
    gate = GateAndExperts(registry.gate_ref(method), registry.expert_refs())
    gate_and_experts, _ = run.shipper.ship(gate, "The gate")
    shipped, _held = run.shipper.ship(ImageFiles(files, reader), "The image files")
    shards = max(1, len(run.workers()))
    notes = notes_of(registry)
    for result in run.evaluate(_plan(shipped, [-1] * len(files), batch_size, shards, gate_and_experts)):
        said = predictions(result.tasks, result.confidences, result.classes, result.log_probabilities, notes)
        for prediction, is_none in zip(said, result.targets.tolist(), strict=True):
            yield None if is_none else prediction


def _plan(
    shipped: Shipped, right: Sequence[int], batch_size: int, num_shards: int, gate_and_experts: Shipped
) -> list[EvaluateRequest]:
    """Requests for one experience: at most ``num_shards`` runs of whole batches, so that the batches, hence the
    bytes, do not depend on how many there are."""
    num_batches = -(-len(right) // batch_size)
    per_shard = -(-num_batches // num_shards) * batch_size
    plan = []
    for first in range(0, len(right), per_shard):
        mine = tuple(right[first : first + per_shard])
        plan.append(EvaluateRequest(shipped, first, first + len(mine), batch_size, gate_and_experts, mine))
    return plan


class Answers:
    """The workers' answers for one experience, handed out in the order of its samples."""

    def __init__(self, plan: Sequence[EvaluateRequest], results: Sequence[EvaluateResult], width: int) -> None:
        self._results = results
        self._width = width
        self._position = 0
        columns = [[r.targets, r.tasks, r.confidences, r.expert_predictions] for r in results]
        self._targets, tasks, confidences, predictions = (torch.cat(column) for column in zip(*columns, strict=True))
        right = torch.tensor([task for request in plan for task in request.right_tasks])
        self._routed = RoutedBatch(tasks, right, confidences, predictions)

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
        outputs = torch.full((len(targets), self._width), ABSENT_LOG_PROBABILITY)
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
        return outputs, RoutedBatch(*(column[rows] for column in self._routed))
