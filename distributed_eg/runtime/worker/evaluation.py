"""Evaluation on a worker: batches are routed as they are read, and experts answer for many of them at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distributed_eg.method.expert import logits_of
from distributed_eg.method.gate import Gate, Mixture, Routing
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.runtime.messages import EvaluatePart, EvaluateRequest, EvaluateResult, GateAndExperts, PartAnswer
from distributed_eg.runtime.worker.context import WorkerContext
from distributed_eg.runtime.worker.reading import Reader
from distributed_eg.types import NOBODY, TaskId, derive_seed

_IMAGE_BYTES = 256 * 2**20
"""Of images that wait for their experts: each expert is loaded once for all of them."""


@dataclass
class _Part:
    """What has been answered of a part, batch by batch, and by which tasks' experts."""

    batches: list[tuple[Tensor, ...]] = field(default_factory=list)
    answered: set[TaskId] = field(default_factory=set)

    def answer(self, classes_of: Callable[[TaskId], tuple[int, ...]]) -> PartAnswer:
        """All of it."""
        columns = [torch.cat(column) for column in zip(*self.batches, strict=True)]
        targets, tasks, confidences, strangeness, heard, log_probabilities, predictions = columns
        ids = sorted({c for task in self.answered for c in classes_of(task)})
        classes = torch.tensor(ids, dtype=torch.int64)
        return PartAnswer(
            targets, tasks, confidences, strangeness, heard, classes, log_probabilities[:, classes], predictions
        )


@dataclass(frozen=True)
class _Batch:
    """Images that were routed, and what experts have answered so far."""

    part: _Part
    images: Tensor
    targets: Tensor
    routing: Routing
    weights: dict[TaskId, Tensor]
    right: Tensor
    """The task that each sample belongs to; −1 where no expert knows it."""
    asked: Tensor
    """Whether that task's expert is asked for its own prediction, and not only for its share of the answer."""
    mixture: Mixture
    predictions: Tensor
    """Class ids that the right task's expert predicts; −1 where there is none."""


@torch.no_grad()
def evaluate(context: WorkerContext, request: EvaluateRequest) -> EvaluateResult:
    """Route and predict; each image passes the backbone once, and each chosen expert once."""
    known = context.known(request.gate_and_experts)
    gate = context.reader.gate(known.gate)
    width = 1 + max(max(ref.classes) for ref in known.experts.values())
    if gate.unknown == "root":
        width = max(width, len(context.root_expert().classes))
    parts = [_Part() for _ in request.parts]
    waiting: list[_Batch] = []
    for part, answers in zip(request.parts, parts, strict=True):
        reader = Reader(part.data.load(context.fetch), "the evaluated experience")
        for first in range(part.first, part.last, request.batch_size):
            rows = range(first, min(first + request.batch_size, part.last))
            waiting.append(_route(context, reader, gate, part, rows, answers, width))
            if sum(batch.images.nbytes for batch in waiting) >= _IMAGE_BYTES:
                _answer(context, known, waiting)
    _answer(context, known, waiting)

    def classes_of(task: TaskId) -> tuple[int, ...]:
        return context.root_expert().classes if task == NOBODY else known.experts[task].classes

    return EvaluateResult(tuple(part.answer(classes_of) for part in parts))


def _route(
    context: WorkerContext, reader: Reader, gate: Gate, part: EvaluatePart, rows: range, answers: _Part, width: int
) -> _Batch:
    """Read the samples ``rows`` of a part and route them."""
    # A dataset that draws by itself must draw the same however the experience is cut into requests.
    seed = derive_seed(context.setup.method.seed, -1, f"evaluate {rows[0]}")
    with reproducible(seed, context.setup.cluster.threads, context.device):
        samples = [reader[i] for i in rows]
    images, targets = reader.collate(samples)[:2]
    images = images.to(context.device)
    routing = gate.route(context.features(images, "the evaluated experience", is_trained=True))
    right = torch.tensor(part.right_tasks[rows[0] - part.first : rows[-1] + 1 - part.first], device=context.device)
    # Where the right expert answers alone, its prediction is the answer's.
    asked = (right >= 0) & ((routing.tasks != right) | (gate.confidence_threshold is not None))
    predictions = torch.full_like(right, -1)
    weights, mixture = gate.answering(routing), Mixture(images, width)
    return _Batch(answers, images, targets, routing, weights, right, asked, mixture, predictions)


def _answer(context: WorkerContext, known: GateAndExperts, waiting: list[_Batch]) -> None:
    """Have the experts answer for the batches that wait, each expert for all of them in turn; none waits any more."""
    asked = [{int(task) for task in batch.right[batch.asked].unique()} for batch in waiting]
    chosen = {task for batch in waiting for task in batch.weights}
    for task in sorted(chosen.union(*asked) & {NOBODY, *known.experts}):
        expert = context.root_expert() if task == NOBODY else context.reader.expert(known.experts[task])
        classes = torch.tensor(expert.classes, device=context.device)
        for batch, of_batch in zip(waiting, asked, strict=True):
            if task in batch.weights:
                batch.mixture.add(expert, batch.weights[task])
            if task in of_batch:
                rows = ((batch.right == task) & batch.asked).nonzero().flatten()
                batch.predictions[rows] = classes[logits_of(expert.network, batch.images[rows]).argmax(1)]
    for batch in waiting:
        log_probabilities = batch.mixture.log_probabilities()
        alone = (batch.right >= 0) & ~batch.asked
        batch.predictions[alone] = log_probabilities[alone].argmax(1)
        routing = batch.routing
        heard = torch.zeros_like(batch.asked)
        for task, weights in batch.weights.items():
            heard |= (batch.right == task) & (weights > 0) & (batch.right != NOBODY)
        routed = batch.targets, routing.tasks, routing.confidences.max(1).values, routing.strangeness, heard
        columns = *routed, log_probabilities, batch.predictions
        batch.part.batches.append(tuple(column.cpu() for column in columns))
        batch.part.answered.update(batch.weights)
    waiting.clear()
