"""How sure the gate may be: a temperature fitted to held-out images, how far it is off, and how strange is too strange.

Each task's held-out images are asked once, when the task comes, among the tasks that are there: what is kept is a small
table. Guo et al. (2017, arXiv 1706.04599) fit one temperature, as here, and measure the expected calibration error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TEMPERATURES = tuple(2 ** (step / 4) for step in range(-8, 57))
"""Those that are tried, 0.25 … 16,384: errors are sums over features, hence of any size."""
UNFITTED = 2.0
"""The paper's temperature, where nothing was held out."""
_ALIKE = 0.05
"""Temperatures whose losses over all images differ by less are told apart by nothing. Of those the least sure one is
taken: else some images that are all right would ask for confidences of 1."""
_BINS = 15
_LEVELS = 100


@dataclass(frozen=True)
class HeldOut:
    """What a task's held-out images said of the gate, at each of the ``TEMPERATURES``.

    ``losses`` (65,) float64: −log of the confidence in their own task, summed up. ``bins`` (65, 15, 3) float32: of the
    images whose highest confidence lies in each fifteenth, how many, how many of those in their own task, and the sum
    of the confidences. Both are 0 for a first task, which nothing can be mistaken for.
    """

    losses: Tensor
    bins: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: every field by its name."""
        return dict(vars(self))


@dataclass(frozen=True)
class Calibration:
    """How sure the gate may be.

    ``temp`` is the temperature of its softmax; ``error`` the expected calibration error at it, over 15 bins of
    confidence, on the images that it was fitted to; None where nothing was held out, or the temperature was given and
    is none of those that were tried. ``bins`` are its reliability diagram: of each bin how many held-out images, the
    share that is right, and the mean confidence.
    """

    temp: float
    error: float | None = None
    bins: tuple[tuple[int, float, float], ...] = ()


def quantiles_of(errors: Tensor) -> tuple[float, ...]:
    """Of held-out images' errors by their own autoencoder, at 0, 0.01, …, 1."""
    levels = torch.linspace(0, 1, _LEVELS + 1, dtype=torch.float64)
    return tuple(torch.quantile(errors.double().cpu(), levels).tolist())


def hold_out(own: Tensor, others: Tensor) -> HeldOut:
    """Sum up what the gate says of a task's held-out images.

    Args:
        own: (n,) their errors by their own task, as the gate scores them.
        others: (n, number of others) by the tasks that were there.
    """
    errors = torch.cat([own[:, None], others], dim=1).double().cpu()
    losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    bins = torch.zeros(len(TEMPERATURES), _BINS, 3, dtype=torch.float64)
    for i, temp in enumerate(TEMPERATURES if others.shape[1] else ()):
        confidences = torch.log_softmax(-errors / temp, dim=1)
        losses[i] = -confidences[:, 0].sum()
        highest = confidences.max(1).values.exp()
        columns = torch.stack([torch.ones_like(highest), (errors.argmin(1) == 0).double(), highest], dim=1)
        places = (highest * _BINS).long().clamp_max(_BINS - 1)
        bins[i] = torch.nn.functional.one_hot(places, _BINS).double().T @ columns
    return HeldOut(losses, bins.float())


def calibrate(tables: Sequence[HeldOut], temp: float | None) -> Calibration:
    """The temperature under which the held-out images of all tasks are the least surprising, or the one given, and how
    far its confidences are off."""
    losses = sum((table.losses for table in tables), torch.zeros(len(TEMPERATURES), dtype=torch.float64))
    known = bool(losses.any())
    if temp is None:
        temp = TEMPERATURES[int((losses <= losses.min() + _ALIKE).nonzero().max())] if known else UNFITTED
    if not known or temp not in TEMPERATURES:
        return Calibration(temp)
    at_temp = torch.stack([table.bins[TEMPERATURES.index(temp)] for table in tables])
    counts, right, confidence = at_temp.double().sum(0).unbind(1)
    error = float((right - confidence).abs().sum() / counts.sum())
    shares = zip(counts.tolist(), right.tolist(), confidence.tolist(), strict=True)
    return Calibration(temp, error, tuple((int(n), r / n if n else 0.0, c / n if n else 0.0) for n, r, c in shares))
