"""Per-feature standardization, the same for every autoencoder of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_eg.errors import InputError

STD_FLOOR = 0.1
"""Floor of σ as a share of its mean over the features: a feature that is nearly constant on the first task would
otherwise saturate on every other one."""


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each feature: two (num_features,) float32 tensors, and how many samples gave
    them."""

    mean: Tensor
    std: Tensor
    num_samples: int

    def to(self, device: torch.device | str) -> Statistics:
        """The same on another device."""
        return Statistics(self.mean.to(device), self.std.to(device), self.num_samples)


def compute_statistics(blocks: Iterable[Tensor]) -> Statistics:
    """Statistics over all rows of ``blocks``, each (rows, num_features), in one streaming pass.

    Sums are kept in float64 and merged block by block (Chan et al. 1983), so nothing but one block is in memory.

    Raises:
        InputError: there is no row.
    """
    count = 0
    mean = torch.zeros(0, dtype=torch.float64)
    squares = torch.zeros(0, dtype=torch.float64)
    for block in blocks:
        rows = block.double().cpu()
        block_mean = rows.mean(0)
        block_squares = (rows - block_mean).square().sum(0)
        if count == 0:
            count, mean, squares = len(rows), block_mean, block_squares
            continue
        total = count + len(rows)
        delta = block_mean - mean
        squares = squares + block_squares + delta.square() * (count * len(rows) / total)
        mean = mean + delta * (len(rows) / total)
        count = total
    if count == 0:
        raise InputError("Standardization needs at least one sample, but there is none.")
    std = (squares / count).sqrt()
    return Statistics(mean.float(), std.clamp_min(max(STD_FLOOR * float(std.mean()), 1e-6)).float(), count)


def standardize(features: Tensor, statistics: Statistics) -> Tensor:
    """z = sigmoid((x − μ) / σ), section 3.1 of the paper: (n, num_features) values in (0, 1)."""
    return torch.sigmoid((features - statistics.mean) / statistics.std)
