"""The gate: which expert each sample goes to, and what the experts' answers add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distributed_eg.method.autoencoder import Autoencoder, AutoencoderStack, stack_autoencoders
from distributed_eg.method.calibration import Calibration
from distributed_eg.method.expert import logits_of
from distributed_eg.method.shared_score import SharedStack
from distributed_eg.method.standardize import Statistics, standardize
from distributed_eg.method.summary import TaskSummary
from distributed_eg.types import NOBODY, TaskId, Unknown

ABSENT_LOG_PROBABILITY = -16.11809565095832  # log(1e-7)
"""Log-probability of a class that no answering expert knows: small, but finite, so that losses stay finite."""
_ROUNDING = 1e-6
"""Of an error, for each feature: sums of float32 squares around 0.5 are off by less."""


class Routing(NamedTuple):
    """Where samples go, one row a sample."""

    tasks: Tensor
    """(n,) int64: the task whose expert is the most confident choice; ``NOBODY`` (−1) where the image is unknown and
    the nearest expert is not to answer for it."""
    confidences: Tensor
    """(n, num_tasks): softmax(−error / temp), columns in the gate's order of tasks."""
    errors: Tensor
    """(n, num_tasks): squared reconstruction errors; with the shared score squared distances, less what is the same
    for all tasks of a sample."""
    strangeness: Tensor
    """(n,) the least reconstruction error, each in units of what the chosen quantile of its task's held-out images
    stays below; with the shared score that of the nearest task. NaN where no images were held out."""

    @property
    def unknown(self) -> Tensor:
        """(n,) bool: stranger than the chosen quantile of every task's held-out images; with the shared score, of those
        of the nearest task, which alone is asked."""
        return self.strangeness > 1


@dataclass(frozen=True)
class Gate:
    """All autoencoders of a run, with the statistics that make their errors comparable (section 3.2 of the paper).

    It routes where its statistics are; the autoencoders may lie elsewhere, such as on the CPU. Where it has
    ``summaries`` of all tasks it goes by the shared score instead of the autoencoders' errors.
    """

    tasks: tuple[TaskId, ...]
    autoencoders: tuple[Autoencoder, ...]
    statistics: Statistics
    temp: float
    confidence_threshold: float | None = None
    summaries: tuple[TaskSummary, ...] = ()
    calibration: Calibration | None = None
    """What is known of the temperature."""
    limits: tuple[float, ...] = ()
    """Of each task's autoencoder, the error above which an image is strange to it; empty where it is not known."""
    unknown: Unknown = "expert"
    """Who answers for images that are strange to all."""

    def __getstate__(self) -> dict[str, object]:
        """Without the stack, which is made again from the autoencoders."""
        return {name: value for name, value in self.__dict__.items() if name != "_stack"}

    @cached_property
    def _stack(self) -> AutoencoderStack:
        if self.summaries:
            return SharedStack(self.summaries)
        device = self.statistics.mean.device
        return stack_autoencoders([autoencoder.to(device) for autoencoder in self.autoencoders])

    def route(self, features: Tensor) -> Routing:
        """Route each of ``features`` (n, num_features), raw as the backbone gives them, by itself."""
        standardized = standardize(features, self.statistics)
        errors = self._stack.errors(standardized)
        confidences = torch.softmax(-errors / self.temp, dim=1)
        # The smallest error, not the largest confidence: softmax rounds several to 0 or 1 when errors are large.
        nearest = errors.argmin(1)
        routing = Routing(
            torch.tensor(self.tasks, device=errors.device)[nearest],
            confidences,
            errors,
            self._strangeness(standardized, errors, nearest),
        )
        if self.unknown == "expert":
            return routing
        return routing._replace(tasks=routing.tasks.where(~routing.unknown, NOBODY))

    def _strangeness(self, standardized: Tensor, errors: Tensor, nearest: Tensor) -> Tensor:
        if not self.limits:
            return torch.full_like(errors[:, 0], torch.nan)
        # Below, an error is rounding, which depends on the batch: of one image in training, or of many alike.
        least = _ROUNDING * standardized.shape[1]
        limits = torch.tensor(self.limits, device=errors.device).clamp_min(least)
        if not self.summaries:
            return (errors / limits).amin(1)
        # Only the nearest task's autoencoder is asked: the cost does not grow with the number of tasks.
        residuals = torch.zeros_like(errors[:, 0])
        for place in nearest.unique().tolist():
            rows = (nearest == place).nonzero().flatten()
            own = stack_autoencoders([self.autoencoders[place].to(errors.device)])
            residuals[rows] = own.errors(standardized[rows])[:, 0]
        return residuals / limits[nearest]

    def answering(self, routing: Routing) -> dict[TaskId, Tensor]:
        """Weights (n,) of each expert that answers for some sample.

        Without a threshold the chosen expert answers alone; with one, every expert at least that confident answers
        too, weighted by confidence. Where it chose ``NOBODY`` nobody answers, or the root, under that number.
        """
        chosen = routing.tasks[:, None] == torch.tensor(self.tasks, device=routing.tasks.device)
        weights = chosen.to(routing.confidences)
        if self.confidence_threshold is not None:
            weights = torch.where(routing.confidences >= self.confidence_threshold, routing.confidences, weights)
            weights = weights / weights.sum(1, keepdim=True)
        nobody = routing.tasks == NOBODY
        weights = weights.masked_fill(nobody[:, None], 0)
        of_root = {NOBODY: nobody.to(weights)} if self.unknown == "root" and bool(nobody.any()) else {}
        answers = (weights > 0).any(0).tolist()
        return of_root | {task: weights[:, i] for i, task in enumerate(self.tasks) if answers[i]}


@dataclass(frozen=True)
class Expert:
    """A task's network; its outputs stand for ``classes``, the task's dataset class ids in ascending order."""

    network: nn.Module
    classes: tuple[int, ...]


@torch.no_grad()
def expert_of_root(root: nn.Module, shape: Sequence[int]) -> Expert:
    """The pretrained root as an expert: it answers for its own outputs, numbered from 0, whatever they stand for."""
    image = torch.zeros(1, *shape, device=next(root.parameters()).device)
    return Expert(root, tuple(range(logits_of(root, image).shape[1])))


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


def with_abstentions(log_probabilities: Tensor, tasks: Tensor) -> Tensor:
    """Log-probabilities with a last column for none of the classes: certain where the gate chose ``NOBODY``."""
    absent = torch.full_like(log_probabilities[:, 0], ABSENT_LOG_PROBABILITY)
    return torch.cat([log_probabilities, absent.where(tasks != NOBODY, 0.0)[:, None]], dim=1)


def make_gate(
    autoencoders: Mapping[TaskId, Autoencoder],
    statistics: Statistics,
    temp: float,
    threshold: float | None,
    summaries: Mapping[TaskId, TaskSummary] | None = None,
    **known: Any,
) -> Gate:
    """A gate over ``autoencoders``, in ascending order of tasks; by the shared score where there are ``summaries``;
    ``known`` is what else a ``Gate`` holds."""
    tasks: Sequence[TaskId] = sorted(autoencoders)
    of_tasks = tuple(summaries[task] for task in tasks) if summaries else ()
    ordered = tuple(autoencoders[task] for task in tasks)
    return Gate(tuple(tasks), ordered, statistics, temp, threshold, of_tasks, **known)
