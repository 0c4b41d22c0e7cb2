"""What the shared score keeps of a task instead of its images: class means, and how samples scatter around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_eg.errors import InputError
from distributed_eg.method.linear_autoencoder import compress

RANK = 100
"""Directions that are kept of a task's scatter: fewer cost accuracy among tasks of equal size, more cost small ones
theirs beside large ones."""
_BLOCK_ROWS = 512


@dataclass(frozen=True)
class TaskSummary:
    """A task's standardized training features, summed up by class.

    ``classes`` (c,) are dataset class ids in ascending order, ``counts`` (c,) their numbers of samples, ``means`` (c,
    num_features). The rows of ``scatter`` (at most 100, num_features) are orthogonal, longest first: their outer
    products add up to the best approximation of that rank to the sum over all samples of the outer products of what
    parts them from their class means; the squared lengths of that add up to ``energy``, a float64 scalar.
    """

    classes: Tensor
    counts: Tensor
    means: Tensor
    scatter: Tensor
    energy: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: every field by its name."""
        return dict(vars(self))

    def to(self, device: torch.device | str) -> TaskSummary:
        """The same value on another device."""
        return TaskSummary(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def cut(self, num_rows: int) -> TaskSummary:
        """The same in memory of its own, with the longest rows of ``scatter`` only."""
        tensors = self.tensors() | {"scatter": self.scatter[:num_rows]}
        return TaskSummary(**{name: tensor.clone() for name, tensor in tensors.items()})


def fit_summary(
    blocks: Callable[[int], Iterator[Tensor]], classes: Tensor, *, start: TaskSummary | None = None
) -> TaskSummary:
    """Class means, then the scatter around them: two passes, in bounded memory, without a seed.

    Args:
        blocks: gives all rows in order, at most the asked number at a time.
        classes: (rows,) int64, the class id of each.
        start: an earlier summary to go on from, whose data are gone.

    Raises:
        InputError: there is no row.
    """
    if not len(classes):
        raise InputError("A summary needs at least one sample, but there is none.")
    found, of_rows = classes.unique(return_inverse=True)
    counts, members = of_rows.bincount(), of_rows.split(_BLOCK_ROWS)
    # Sums as products: rows that are added up by index come in no fixed order on a card.
    sums = [F.one_hot(m, len(found)).double().T @ b.double() for m, b in zip(members, blocks(_BLOCK_ROWS), strict=True)]
    means = (torch.stack(sums).sum(0) / counts[:, None]).float()
    basis, energy = means[:0], torch.zeros((), dtype=torch.float64, device=means.device)
    for own, block in zip(members, blocks(_BLOCK_ROWS), strict=True):
        centred = block - means[own]
        energy = energy + centred.double().square().sum()
        basis = compress(torch.cat([basis, centred]), 2 * RANK)
    new = TaskSummary(found, counts, means, basis, energy)
    summary = new if start is None else _merged(start, new)
    return replace(summary, scatter=summary.scatter[:RANK].contiguous())


def _merged(old: TaskSummary, new: TaskSummary) -> TaskSummary:
    """The summary of two sets of samples; a class that both have gets one mean, and what that moves is scatter."""
    classes = torch.cat([old.classes, new.classes]).unique()
    places = [torch.searchsorted(classes, part.classes) for part in (old, new)]
    counts, sums = torch.zeros_like(classes), old.means.new_zeros(len(classes), old.means.shape[1], dtype=torch.float64)
    for part, place in zip((old, new), places, strict=True):
        counts[place] += part.counts
        sums[place] += part.means.double() * part.counts[:, None]
    means = (sums / counts[:, None]).float()
    moved = torch.cat(
        [(part.means - means[at]) * part.counts[:, None].sqrt() for part, at in zip((old, new), places, strict=True)]
    )
    energy = old.energy + new.energy + moved.double().square().sum()
    return TaskSummary(classes, counts, means, compress(torch.cat([old.scatter, new.scatter, moved]), RANK), energy)
