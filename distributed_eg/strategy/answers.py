"""Evaluation on workers: what is asked of them for a stream, and how their answers reach Avalanche's own loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor

from distributed_eg.config import MethodConfig
from distributed_eg.errors import InputError
from distributed_eg.method.gate import ABSENT_LOG_PROBABILITY
from distributed_eg.runtime.messages import EvaluateRequest, EvaluateResult, GateAndExperts
from distributed_eg.runtime.run import OpenRun
from distributed_eg.runtime.shipping import Shipped
from distributed_eg.store.registry import Registry
from distributed_eg.strategy.metrics import RoutedBatch
from distributed_eg.strategy.tasks.experiences import label_of, task_labels_of

_UNKNOWN = -1


def right_tasks(experience: CLExperience, dataset: Any, registry: Registry) -> list[int]:
    """The task that each sample of ``dataset`` belongs to, by its label; −1 where no trained task has it."""
    labels = task_labels_of(experience)
    if labels is not None and len(labels) > 1:
        of_sample = [int(label) for label in dataset.targets_task_labels]
    else:
        of_sample = [label_of(experience)] * len(dataset)
    manifests = {label: registry.of_label(label) for label in set(of_sample)}
    tasks = {label: _UNKNOWN if known is None else known.versions[0] for label, known in manifests.items()}
    return [tasks[label] for label in of_sample]


def adapt(
    strategy: SupervisedTemplate, experiences: Iterable[CLExperience], loader_args: dict[str, Any]
) -> list[tuple[CLExperience, Any]]:
    """Each experience with the dataset that the strategy's own ``eval_dataset_adaptation`` makes of it."""
    adapted: list[tuple[CLExperience, Any]] = []
    for strategy.experience in experiences:
        strategy.eval_dataset_adaptation(**loader_args)
        adapted.append((strategy.experience, strategy.adapted_dataset))
    strategy.experience = None
    strategy.adapted_dataset = None
    return adapted


def ask_workers(
    run: OpenRun, asked: Sequence[tuple[CLExperience, Any]], batch_size: int, method: MethodConfig
) -> list[Answers]:
    """Have the workers route and predict every sample of ``asked``: experiences with the datasets to read."""
    registry = run.session.registry
    shards = max(1, -(-max(1, len(run.engine.workers())) // max(1, len(asked))))
    highest = max(max(manifest.classes) for manifest in registry.newest.values())
    needed = GateAndExperts(registry.gate_ref(method), registry.expert_refs())
    gate_and_experts, _ = run.engine.shipper.ship(needed, "the gate")
    requests: list[EvaluateRequest] = []
    counts, rights, held = [], [], []
    for experience, dataset in asked:
        if len(dataset) == 0:
            raise InputError(f"Experience {experience.current_experience} has no samples to evaluate; leave it out.")
        right = right_tasks(experience, dataset, registry)
        shipped, leaves = run.engine.shipper.ship(dataset, "the evaluation dataset")
        mine = _plan(shipped, right, batch_size, shards, gate_and_experts)
        requests += mine
        counts.append(len(mine))
        rights.append(right)
        held.append(leaves)
        highest = max(highest, *(int(c) for c in dataset.targets.uniques))
    results = iter(run.session.evaluate(requests))
    return [
        Answers([next(results) for _ in range(count)], right, highest + 1)
        for count, right in zip(counts, rights, strict=True)
    ]


def _plan(
    shipped: Shipped, right: Sequence[int], batch_size: int, num_shards: int, gate_and_experts: Shipped
) -> list[EvaluateRequest]:
    """Requests for one experience: at most ``num_shards`` runs of whole batches, so that the batches, hence the
    bytes, do not depend on how many there are."""
    num_batches = -(-len(right) // batch_size)
    per_shard = -(-num_batches // num_shards) * batch_size
    return [
        EvaluateRequest(
            shipped,
            first,
            min(first + per_shard, len(right)),
            batch_size,
            gate_and_experts,
            tuple(right[first : first + per_shard]),
        )
        for first in range(0, len(right), per_shard)
    ]


@dataclass(frozen=True)
class _Answer:
    targets: Tensor
    routed: RoutedBatch
    classes: Tensor
    log_probabilities: Tensor


class Answers:
    """The workers' answers for one experience, handed out in the order of its samples."""

    def __init__(self, results: Sequence[EvaluateResult], right: Sequence[int], width: int) -> None:
        self._parts: Iterator[_Answer] = iter(_parts(results, right))
        self._width = width
        self._left: list[_Answer] = []

    def take(self, targets: Tensor) -> tuple[Tensor, RoutedBatch]:
        """Outputs (n, width) and routing of the next samples.

        Raises:
            InputError: their targets are not those that the workers saw.
        """
        outputs = torch.full((len(targets), self._width), ABSENT_LOG_PROBABILITY)
        routed: list[RoutedBatch] = []
        filled = 0
        while filled < len(targets):
            answer = self._next(len(targets) - filled)
            rows = slice(filled, filled + len(answer.targets))
            if not torch.equal(answer.targets, targets[rows].cpu()):
                raise InputError(
                    "The evaluation loader gives other samples, or another order, than the experience's dataset: "
                    "leave shuffle off in eval, and change samples in eval_dataset_adaptation only."
                )
            outputs[rows, answer.classes] = answer.log_probabilities
            routed.append(answer.routed)
            filled += len(answer.targets)
        return outputs, RoutedBatch(*(torch.cat(column) for column in zip(*routed, strict=True)))

    def _next(self, most: int) -> _Answer:
        answer = self._left.pop() if self._left else next(self._parts, None)
        if answer is None:
            raise InputError("The evaluation loader gives more samples than the experience's dataset holds.")
        if len(answer.targets) > most:
            self._left.append(_rows(answer, slice(most, None)))
            answer = _rows(answer, slice(0, most))
        return answer


def _parts(results: Sequence[EvaluateResult], right: Sequence[int]) -> Iterator[_Answer]:
    first = 0
    for result in results:
        tensors: list[Any] = [torch.from_numpy(a.copy()) for a in (result.tasks, result.confidences)]
        here = torch.tensor(right[first : first + len(result.targets)])
        routed = RoutedBatch(tensors[0], here, tensors[1], torch.from_numpy(result.expert_predictions.copy()))
        yield _Answer(
            torch.from_numpy(result.targets.copy()),
            routed,
            torch.from_numpy(result.classes.copy()),
            torch.from_numpy(result.log_probabilities.copy()),
        )
        first += len(result.targets)


def _rows(answer: _Answer, rows: slice) -> _Answer:
    routed = RoutedBatch(*(column[rows] for column in answer.routed))
    return _Answer(answer.targets[rows], routed, answer.classes, answer.log_probabilities[rows])
