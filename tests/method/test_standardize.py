"""Standardization: the streamed statistics are the plain ones, and nothing saturates or turns into NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distributed_eg.errors import InputError
from distributed_eg.method.standardize import Statistics, compute_statistics, standardize
from tests.method.helpers import float64


def features(count: int = 70, width: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * torch.linspace(0.5, 3, width) + torch.arange(width)


@pytest.mark.parametrize("size", [1, 7, 32, 70, 1000])
def test_streamed_statistics_equal_those_of_the_whole(size: int) -> None:
    data = features()
    statistics = compute_statistics(data.split(size))
    whole = float64(data)
    # Computed in float64, kept in float32: half a unit in the last place, 6e-8 relative.
    np.testing.assert_allclose(statistics.mean.numpy(), whole.mean(0), rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(statistics.std.numpy(), whole.std(0), rtol=2e-7)
    assert statistics.num_samples == 70
    assert statistics.mean.dtype == statistics.std.dtype == torch.float32


def test_a_large_mean_does_not_swallow_the_spread() -> None:
    """Σx² − n·μ² in float32 would lose all of the variance here."""
    data = features() + 1e5
    whole = float64(data)
    statistics = compute_statistics(data.split(16))
    np.testing.assert_allclose(statistics.std.numpy(), whole.std(0), rtol=1e-6)


def test_deviation_of_a_constant_feature_is_a_tenth_of_the_mean_deviation() -> None:
    """A feature that is constant on the first task varies on later ones: it must not saturate there."""
    data = features()
    data[:, 4] = 2.5
    raw = float64(data).std(0)
    assert raw[4] == 0
    statistics = compute_statistics([data])
    assert float(statistics.std[4]) == pytest.approx(0.1 * raw.mean(), rel=1e-6)
    others = [i for i in range(9) if i != 4]
    np.testing.assert_allclose(statistics.std.numpy()[others], raw[others], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 6])
def test_constant_features_stay_finite(count: int) -> None:
    """One sample, or the same sample again and again: no deviation to divide by."""
    data = features(1).repeat(count, 1)
    statistics = compute_statistics([data])
    assert statistics.num_samples == count
    assert bool((statistics.std > 0).all())
    z = standardize(torch.cat([data[:1], data[:1] + 1, data[:1] - 1]), statistics)
    assert bool(torch.isfinite(z).all())
    # σ is tiny here, so the float32 rounding of μ shows: only "near the middle" can be asked.
    assert bool(((z[0] > 0.2) & (z[0] < 0.8)).all())


def test_no_row_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="at least one sample"):
        compute_statistics([])


def test_standardize_is_the_sigmoid_of_the_standard_score() -> None:
    data = features(5)
    statistics = Statistics(torch.full((9,), 1.5), torch.linspace(0.1, 2, 9), 10)
    scores = (float64(data) - 1.5) / np.linspace(0.1, 2, 9)
    z = standardize(data, statistics)
    # The score carries a few float32 roundings, the sigmoid's slope is at most 1/4.
    np.testing.assert_allclose(z.numpy(), 1 / (1 + np.exp(-scores)), rtol=2e-5, atol=1e-7)
    assert z.dtype == torch.float32


def test_a_samples_standard_score_does_not_depend_on_the_other_samples() -> None:
    data = features(20)
    statistics = compute_statistics([data])
    together = standardize(data, statistics)
    assert torch.equal(together[7:8], standardize(data[7:8], statistics))


def test_features_are_not_changed_in_place() -> None:
    data = features(8)
    before = data.clone()
    standardize(data, compute_statistics([data]))
    assert torch.equal(data, before)
