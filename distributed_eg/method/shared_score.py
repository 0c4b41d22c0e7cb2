"""The shared score: one covariance within classes for all tasks, made from their summaries, and a linear score a class.

Linear discriminant analysis on frozen features, as in Hayes & Kanan (2020, arXiv 1909.01520), but pooled from what each
task stored rather than kept along a stream: whatever the order of the tasks, without data of earlier ones or a seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_eg.method.linear_autoencoder import gram_of
from distributed_eg.method.summary import TaskSummary

_RIDGE = 0.5
"""Of a feature's mean variance, added in every direction; the gate is as good between 0.1 and 1.5."""
MOST_BYTES = 128 * 2**20
"""Of all tasks' directions of scatter together: where there are more, each task gives its longest ones only."""


class SharedStack:
    """All tasks' classes under one metric, so that a batch passes all of them in one product.

    With W the covariance within classes, a sample x is as far from a class of mean m as (x − m)ᵀW⁻¹(x − m); without
    xᵀW⁻¹x, which is the same for all classes, that is linear in x. A task is as far as its nearest classes (a soft
    minimum). W is the tasks' scatter in the directions that they keep, and the mean of what is left in all others.

    A mean of n samples errs by the effective number of dimensions ÷ n in this metric. It is drawn towards the mean of
    all classes as far as that error asks for beside the classes' true distance (empirical Bayes), and what the error
    adds to every distance is taken off: without both, few samples look far from everything.

    It is made on the CPU in float64, and answers on the device of the features.

    Args:
        summaries: of every task, on the CPU.
        most_bytes: of directions of scatter; what is left out counts as the same in all directions.
    """

    def __init__(self, summaries: Sequence[TaskSummary], most_bytes: int = MOST_BYTES) -> None:
        means = torch.cat([summary.means for summary in summaries]).double()
        counts = torch.cat([summary.counts for summary in summaries]).double()
        most = kept_rows(len(summaries), means.shape[1], most_bytes)
        scatter = torch.cat([summary.scatter[:most] for summary in summaries])
        energy = float(torch.stack([summary.energy for summary in summaries]).sum())
        rest = max(0.0, energy - float(scatter.double().square().sum())) / means.shape[1]
        load = rest + _RIDGE * energy / means.shape[1] or 1.0  # 1 where no class varies
        centre = means.mean(0)
        offsets = means - centre
        solved, trace = _solve(scatter, load, offsets)
        freedom = max(1.0, float(counts.sum()) - len(counts))
        solved, dimensions = freedom * solved, means.shape[1] - (load - rest) * trace
        lengths = (solved * offsets).sum(1)
        apart = float((lengths - dimensions / counts).clamp_min(0).mean())
        drawn = counts / (counts + dimensions / apart) if apart > 0 else torch.ones_like(counts)
        self._sizes = [len(summary.classes) for summary in summaries]
        self._centre = centre.float()
        self._weights = (solved * drawn[:, None]).float()
        self._biases = (drawn.square() * (dimensions / counts - lengths) / 2).float()
        self._priors = torch.tensor(self._sizes, device=means.device).float().log()

    def errors(self, features: Tensor) -> Tensor:
        """Squared distance of each standardized sample to each task, less what is the same for all tasks: (n, number of
        tasks) float32, of either sign."""
        centre, weights, biases, priors = self._on(features.device)
        logits = (features - centre) @ weights.T + biases
        likelihoods = [part.logsumexp(1) for part in logits.split(self._sizes, dim=1)]
        return -2 * (torch.stack(likelihoods, dim=1) - priors)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if self._centre.device != device:
            for name in ("_centre", "_weights", "_biases", "_priors"):
                setattr(self, name, getattr(self, name).to(device))
        return self._centre, self._weights, self._biases, self._priors


def kept_rows(num_tasks: int, num_features: int, most_bytes: int = MOST_BYTES) -> int:
    """How many directions of scatter each of so many tasks gives."""
    return max(1, most_bytes // (4 * num_features * num_tasks))


def _solve(scatter: Tensor, load: float, offsets: Tensor) -> tuple[Tensor, float]:
    """``offsets`` (c, num_features) times the inverse of scatterᵀ·scatter + load·I, and the trace of that inverse.

    Through whichever is smaller of scatterᵀ·scatter and scatter·scatterᵀ (Woodbury's identity).
    """
    num_rows, num_features = scatter.shape
    few = num_rows < num_features
    inner = gram_of(scatter if few else scatter.T)
    inner.diagonal().add_(load)
    factor = torch.linalg.cholesky(inner)
    trace = float(torch.cholesky_inverse(factor).diagonal().sum())
    if not few:
        return torch.cholesky_solve(offsets.T, factor).T, trace
    rows = scatter.double()
    seen = torch.cholesky_solve(rows @ offsets.T, factor)
    return (offsets - seen.T @ rows) / load, trace + (num_features - num_rows) / load
