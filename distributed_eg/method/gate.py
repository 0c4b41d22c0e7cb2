"""The gate: which expert each sample goes to, and what the experts' answers add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distributed_eg.method.autoencoder import Autoencoder, AutoencoderStack, stack_autoencoders
from distributed_eg.method.expert import logits_of
from distributed_eg.method.standardize import Statistics, standardize
from distributed_eg.types import TaskId

ABSENT_LOG_PROBABILITY = -16.11809565095832  # log(1e-7)
"""Log-probability of a class that no answering expert knows: small, but finite, so that losses stay finite."""


class Routing(NamedTuple):
    """Where samples go, one row a sample."""

    tasks: Tensor
    """(n,) int64: the task whose expert is the most confident choice."""
    confidences: Tensor
    """(n, num_tasks): softmax(−error / temp), columns in the gate's order of tasks."""
    errors: Tensor
    """(n, num_tasks): squared reconstruction errors."""


@dataclass(frozen=True)
class Gate:
    """All autoencoders of a run, with the statistics that make their errors comparable (section 3.2 of the paper).

    It routes where its statistics are; the autoencoders may lie elsewhere, such as on the CPU.
    """

    tasks: tuple[TaskId, ...]
    autoencoders: tuple[Autoencoder, ...]
    statistics: Statistics
    temp: float
    confidence_threshold: float | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without the stack, which is made again from the autoencoders."""
        return {name: value for name, value in self.__dict__.items() if name != "_stack"}

    @cached_property
    def _stack(self) -> AutoencoderStack:
        device = self.statistics.mean.device
        return stack_autoencoders([autoencoder.to(device) for autoencoder in self.autoencoders])

    def route(self, features: Tensor) -> Routing:
        """Route each of ``features`` (n, num_features), raw as the backbone gives them, by itself."""
        errors = self._stack.errors(standardize(features, self.statistics))
        confidences = torch.softmax(-errors / self.temp, dim=1)
        # The smallest error, not the largest confidence: softmax rounds several to 0 or 1 when errors are large.
        tasks = torch.tensor(self.tasks, device=errors.device)[errors.argmin(1)]
        return Routing(tasks, confidences, errors)

    def answering(self, routing: Routing) -> dict[TaskId, Tensor]:
        """Weights (n,) of each expert that answers for some sample.

        Without a threshold the chosen expert answers alone; with one, every expert at least that confident answers
        too, weighted by confidence.
        """
        chosen = routing.tasks[:, None] == torch.tensor(self.tasks, device=routing.tasks.device)
        weights = chosen.to(routing.confidences)
        if self.confidence_threshold is not None:
            weights = torch.where(routing.confidences >= self.confidence_threshold, routing.confidences, weights)
            weights = weights / weights.sum(1, keepdim=True)
        answers = (weights > 0).any(0).tolist()
        return {task: weights[:, i] for i, task in enumerate(self.tasks) if answers[i]}


@dataclass(frozen=True)
class Expert:
    """A task's network; its outputs stand for ``classes``, the task's dataset class ids in ascending order."""

    network: nn.Module
    classes: tuple[int, ...]


class Mixture:
    """What the experts that answer for a batch of images add up to; they are added one after the other, in ascending
    order of their tasks.

    Args:
        images: (n, channels, height, width).
        width: number of columns, above every class id of an answering expert.
    """

    def __init__(self, images: Tensor, width: int) -> None:
        self._images = images
        self._probabilities = images.new_zeros(len(images), width, dtype=torch.float32)

    def add(self, expert: Expert, weights: Tensor) -> None:
        """Have an expert answer, with the ``weights`` (n,) that ``Gate.answering`` gives it; it sees the samples that
        it answers for, in their order."""
        rows = weights.nonzero().flatten()
        answers = torch.softmax(logits_of(expert.network, self._images[rows]), dim=1) * weights[rows, None]
        columns = torch.tensor(expert.classes, device=self._images.device)
        self._probabilities[rows[:, None], columns] += answers

    def log_probabilities(self) -> Tensor:
        """(n, width) over dataset class ids; ``ABSENT_LOG_PROBABILITY`` for classes that no answering expert knows."""
        floor = torch.tensor(ABSENT_LOG_PROBABILITY, device=self._images.device)
        return self._probabilities.log().maximum(floor)


def combine_experts(
    images: Tensor, weights: Mapping[TaskId, Tensor], expert_of: Callable[[TaskId], Expert], width: int
) -> Tensor:
    """Log-probabilities (n, width) of a batch, as a ``Mixture`` of the experts that answer.

    Args:
        images: (n, channels, height, width).
        weights: of each answering expert (n,), as ``Gate.answering`` gives them.
        expert_of: loads an expert; called once a task.
        width: number of columns, above every class id of an answering expert.
    """
    mixture = Mixture(images, width)
    for task, weight in weights.items():
        mixture.add(expert_of(task), weight)
    return mixture.log_probabilities()


def make_gate(
    autoencoders: Mapping[TaskId, Autoencoder], statistics: Statistics, temp: float, threshold: float | None
) -> Gate:
    """A gate over ``autoencoders``, in ascending order of tasks."""
    tasks: Sequence[TaskId] = sorted(autoencoders)
    return Gate(tuple(tasks), tuple(autoencoders[task] for task in tasks), statistics, temp, threshold)
