"""The closed-form autoencoder against the exact singular value decomposition."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_eg.errors import DivergedError, InputError
from distributed_eg.method.linear_autoencoder import LinearAutoencoder, fit_linear
from distributed_eg.method.relatedness import TaskErrors, choose_transfer
from tests.method.helpers import (
    Rows,
    decaying_rows,
    digest,
    fitted_linear,
    float64,
    reconstruction_errors,
    subspace_rows,
)


def exact(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and right singular vectors of the centred rows, in float64."""
    _, values, vectors = torch.linalg.svd(torch.from_numpy(data - data.mean(0)), full_matrices=False)
    return values.numpy(), vectors.numpy()


def captured(autoencoder: LinearAutoencoder, data: np.ndarray) -> float:
    """Squared length of the centred rows inside the autoencoder's subspace."""
    return float((((data - data.mean(0)) @ float64(autoencoder.components).T) ** 2).sum())


def brute_force(autoencoder: LinearAutoencoder, features: Tensor) -> np.ndarray:
    """Squared distance of each sample to its reconstruction, written out in float64."""
    mean, components = float64(autoencoder.mean), float64(autoencoder.components)
    errors = []
    for sample in float64(features):
        code = components @ (sample - mean)
        reconstruction = mean + code @ components
        errors.append(((sample - reconstruction) ** 2).sum())
    return np.array(errors)


@pytest.mark.parametrize("block", [7, 100, 512])
@pytest.mark.parametrize(("count", "width", "latent_dim"), [(300, 200, 20), (1300, 300, 50)])
def test_captured_variance_equals_the_exact_one(count: int, width: int, latent_dim: int, block: int) -> None:
    """One pass over blocks of any size, against the decomposition of the whole."""
    data = decaying_rows(count, width, seed=1)
    autoencoder = fit_linear(lambda size: iter(data.split(min(size, block))), latent_dim)
    values, _ = exact(float64(data))
    # The project's stated bound: 2e-5 relative.
    assert captured(autoencoder, float64(data)) == pytest.approx((values[:latent_dim] ** 2).sum(), rel=2e-5)
    np.testing.assert_allclose(float64(autoencoder.mean), float64(data).mean(0), atol=2e-6)
    assert int(autoencoder.num_samples) == count
    assert autoencoder.components.shape == (latent_dim, width)


def test_components_are_the_singular_vectors_with_their_values() -> None:
    data = decaying_rows(400, 60, seed=2)
    autoencoder = fitted_linear(data, 8)
    values, vectors = exact(float64(data))
    np.testing.assert_allclose(float64(autoencoder.singular_values), values[:8], rtol=1e-5)
    # Up to sign; the gaps between these singular values amplify float32 rounding (6e-8) by less than 1e3.
    overlap = np.abs((float64(autoencoder.components) * vectors[:8]).sum(1))
    np.testing.assert_allclose(overlap, 1, atol=1e-4)
    np.testing.assert_allclose(
        float64(autoencoder.components) @ float64(autoencoder.components).T, np.eye(8), atol=1e-5
    )


def test_two_runs_give_the_same_bytes() -> None:
    data = decaying_rows(1100, 150, seed=3)
    digests = {digest(fitted_linear(data.clone(), 20).tensors()) for _ in range(2)}
    assert len(digests) == 1


def test_order_of_samples_flips_no_sign() -> None:
    data = decaying_rows(300, 40, seed=4)
    shuffled = data[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    one, other = fitted_linear(data, 5), fitted_linear(shuffled, 5)
    # Well separated singular values: rounding moves the vectors by far less than 1e-3, a flipped sign by 2.
    torch.testing.assert_close(one.components, other.components, atol=1e-3, rtol=0)


def test_rows_are_read_once_in_blocks_of_bounded_size() -> None:
    """The size asked for does not grow with the task, and no more than two blocks are alive at a time."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    asked: list[int] = []

    def blocks(size: int) -> Iterator[Tensor]:
        nonlocal most
        asked.append(size)
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            block = torch.rand(size, 20, generator=generator)
            alive.append(weakref.ref(block))
            most = max(most, sum(reference() is not None for reference in alive))
            yield block

    autoencoder = fit_linear(blocks, 4)
    assert len(asked) == 1
    assert asked[0] <= 1024
    assert most <= 2
    assert int(autoencoder.num_samples) == 10 * asked[0]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("block", [1, 512])
def test_rank_is_below_the_number_of_samples(count: int, block: int) -> None:
    data = decaying_rows(count, 30, seed=5)
    autoencoder = fit_linear(lambda size: iter(data.split(min(size, block))), 10)
    assert autoencoder.components.shape == (min(10, count - 1), 30)
    assert autoencoder.singular_values.shape == (min(10, count - 1),)
    np.testing.assert_allclose(float64(autoencoder.mean), float64(data).mean(0), atol=1e-6)
    errors = reconstruction_errors([autoencoder], data)[:, 0]
    # Up to 11 samples lie in a subspace of rank 10: nothing is left but float32 rounding of squares around 1.
    np.testing.assert_allclose(float64(errors), 0, atol=1e-4)


def test_autoencoder_of_one_sample_measures_the_distance_to_it() -> None:
    data = decaying_rows(1, 30, seed=6)
    other = decaying_rows(4, 30, seed=7)
    expected = ((float64(other) - float64(data)) ** 2).sum(1)
    np.testing.assert_allclose(
        float64(reconstruction_errors([fitted_linear(data, 5)], other)[:, 0]), expected, rtol=1e-5
    )


def test_rank_is_not_above_the_number_of_features() -> None:
    autoencoder = fitted_linear(decaying_rows(50, 6, seed=8), 100)
    assert len(autoencoder.components) <= 6
    np.testing.assert_allclose(float64(reconstruction_errors([autoencoder], decaying_rows(5, 6, seed=9))), 0, atol=1e-4)


def test_constant_features_get_no_weight() -> None:
    data = decaying_rows(200, 30, seed=10)
    data[:, [3, 17]] = torch.tensor([0.1, 0.7])
    autoencoder = fitted_linear(data, 10)
    # 1e-4: rounding of a mean of 0.1s, against singular values that are larger by many orders.
    assert float(autoencoder.components[:, [3, 17]].abs().max()) < 1e-4
    values, _ = exact(float64(data))
    assert captured(autoencoder, float64(data)) == pytest.approx((values[:10] ** 2).sum(), rel=2e-5)


def test_identical_samples_give_a_finite_autoencoder() -> None:
    """Every image of the task is the same: the error is the distance to it."""
    sample = decaying_rows(1, 30, seed=11)
    autoencoder = fit_linear(lambda size: iter(sample.repeat(900, 1).split(size)), 5)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in autoencoder.tensors().values())
    assert float(reconstruction_errors([autoencoder], sample)) < 1e-5
    other = decaying_rows(3, 30, seed=12)
    assert bool((reconstruction_errors([autoencoder], other) > 0.01).all())


@pytest.mark.parametrize("latent_dim", [1, 7, 40])
def test_error_is_the_distance_to_the_reconstruction(latent_dim: int) -> None:
    autoencoder = fitted_linear(subspace_rows(150, 400, domain=1, seed=0, rank=20), latent_dim)
    features = torch.cat([subspace_rows(9, 400, domain=1, seed=1, rank=20), subspace_rows(9, 400, domain=2, seed=1)])
    errors = reconstruction_errors([autoencoder], features)
    assert errors.shape == (18, 1)
    assert errors.dtype == torch.float32
    # A difference of squared lengths (up to 70) in float32: about 1e-7 of them is lost, a few times.
    np.testing.assert_allclose(float64(errors[:, 0]), brute_force(autoencoder, features), rtol=1e-5, atol=2e-4)


def test_errors_are_never_negative() -> None:
    """The difference of two nearly equal numbers may come out below zero by rounding; an error may not."""
    data = subspace_rows(40, 600, domain=3, seed=0, rank=5)
    errors = reconstruction_errors([fitted_linear(data, 60)], data)
    assert float(errors.min()) >= 0
    assert float(errors.max()) < 1e-3


def test_many_autoencoders_at_once_answer_as_one_by_one() -> None:
    """More autoencoders than one batched product takes, of different ranks."""
    fitted = [
        fitted_linear(subspace_rows(1 + i % 9, 50, domain=i, seed=0, rank=10), 6 if i % 2 else 3) for i in range(150)
    ]
    features = subspace_rows(7, 50, domain=2, seed=5, rank=10)
    together = reconstruction_errors(fitted, features)
    assert together.shape == (7, 150)
    for i in (0, 1, 2, 63, 64, 65, 127, 128, 149):
        # Same sums in another order: float32 rounding of squares around 10.
        np.testing.assert_allclose(float64(together[:, i]), brute_force(fitted[i], features), rtol=1e-5, atol=5e-5)


def test_no_samples_give_no_rows() -> None:
    fitted = [fitted_linear(decaying_rows(20, 30, seed=i), 4) for i in range(3)]
    assert reconstruction_errors(fitted, torch.zeros(0, 30)).shape == (0, 3)


def test_going_on_from_a_summary_equals_the_joint_fit_where_the_rank_suffices() -> None:
    """A label comes again: the first part of its data is gone, its summary is not."""
    first = torch.from_numpy(_low_rank(200, 4, seed=1)).float()
    second = torch.from_numpy(_low_rank(90, 4, seed=2)).float()
    start = fitted_linear(first, 12)
    before = digest(start.tensors())
    continued = fit_linear(Rows(second).blocks, 12, start=start)
    joint = np.concatenate([float64(first), float64(second)])
    values, _ = exact(joint)
    assert int(continued.num_samples) == 290
    np.testing.assert_allclose(float64(continued.mean), joint.mean(0), atol=1e-6)
    # Two subspaces of rank 4 and the difference of the means need 9 of the 12 components: nothing is cut off.
    assert captured(continued, joint) == pytest.approx((values[:12] ** 2).sum(), rel=2e-5)
    np.testing.assert_allclose(float64(continued.singular_values)[:9], values[:9], rtol=1e-4)
    np.testing.assert_allclose(float64(reconstruction_errors([continued], first)), 0, atol=1e-4)
    assert digest(start.tensors()) == before, "the summary that was given has changed"


def test_going_on_from_a_summary_is_nearly_the_joint_fit() -> None:
    first, second = decaying_rows(700, 120, seed=1), decaying_rows(300, 120, seed=2)
    continued = fit_linear(Rows(second).blocks, 20, start=fitted_linear(first, 20))
    joint = np.concatenate([float64(first), float64(second)])
    values, _ = exact(joint)
    # A summary of rank d has lost what lies outside it: 1 % of the variance is the most that may be missing here.
    assert captured(continued, joint) > 0.99 * (values[:20] ** 2).sum()
    assert int(continued.num_samples) == 1000
    np.testing.assert_allclose(float64(continued.mean), joint.mean(0), atol=1e-6)


def test_going_on_from_the_summary_of_one_sample() -> None:
    data = decaying_rows(6, 30, seed=3)
    continued = fit_linear(Rows(data[1:]).blocks, 10, start=fitted_linear(data[:1], 10))
    values, _ = exact(float64(data))
    assert captured(continued, float64(data)) == pytest.approx((values**2).sum(), rel=2e-5)


def test_no_row_is_refused() -> None:
    with pytest.raises(InputError, match="at least one sample"):
        fit_linear(lambda size: iter(()), 5)


def test_features_with_nan_stop_at_relatedness_and_name_the_task() -> None:
    """A closed form cannot diverge in an epoch: its NaN error must be refused, never compared."""
    data = decaying_rows(30, 20, seed=1)
    broken = data.clone()
    broken[3, 5] = torch.nan
    own = float(reconstruction_errors([fitted_linear(broken, 4)], data).mean())
    with pytest.raises(DivergedError, match="task 2"):
        choose_transfer(2, TaskErrors(own, 1.0, {0: 1.0}), "variance", 0.85)


def _low_rank(count: int, rank: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (
        0.5
        + generator.normal(size=80) * 0.1
        + generator.normal(size=(count, rank)) @ generator.normal(size=(rank, 80)) * (0.1)
    )
