"""The paper's autoencoder: what it learns, what a step is, and when it must give up."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_eg.config import AutoencoderConfig
from distributed_eg.errors import DivergedError
from distributed_eg.method import sgd_autoencoder
from distributed_eg.method.sgd_autoencoder import SgdAutoencoder, fit_sgd
from tests.method.helpers import Rows, digest, float64, reconstruction_errors, subspace_rows

PAPER = AutoencoderConfig(latent_dim=24, lr=1e-2, epochs=20, batch_size=12, optimizer="adagrad")


def config(**changes: Any) -> AutoencoderConfig:
    return AutoencoderConfig(**({"latent_dim": 5, "lr": 0.01, "epochs": 1, "batch_size": 4} | changes))


def given(features: int, hidden: int, seed: int = 0, scale: float = 0.4) -> SgdAutoencoder:
    """Weights to start from, so that a step can be computed by hand."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) * scale

    return SgdAutoencoder(draw(hidden, features), draw(hidden), draw(features, hidden), draw(features))


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def as_arrays(autoencoder: SgdAutoencoder) -> dict[str, np.ndarray]:
    return {name: float64(tensor) for name, tensor in autoencoder.tensors().items()}


class Centred:
    """The documented parametrisation in training: the encoder sees (z − m) / s, with s the root mean square distance
    of the samples to their mean m; what is stored takes z itself."""

    def __init__(self, data: Tensor) -> None:
        z = float64(data)
        self.mean = z.mean(0)
        self.length = np.sqrt(((z - self.mean) ** 2).sum(1).mean())
        self.inputs, self.targets = (z - self.mean) / self.length, z

    def weights(self, autoencoder: SgdAutoencoder) -> dict[str, np.ndarray]:
        """W·z + b = (s·W)·(z − m) / s + (b + W·m)."""
        w = as_arrays(autoencoder)
        bias = w["encoder_bias"] + w["encoder_weight"] @ self.mean
        return w | {"encoder_weight": w["encoder_weight"] * self.length, "encoder_bias": bias}

    def gradients(self, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Back-propagation by hand of Σ_features cross-entropy, averaged over the samples."""
        before = self.inputs @ w["encoder_weight"].T + w["encoder_bias"]
        hidden = np.maximum(before, 0)
        delta_out = sigmoid(hidden @ w["decoder_weight"].T + w["decoder_bias"]) - self.targets
        delta_out /= len(self.targets)
        delta_in = (delta_out @ w["decoder_weight"]) * (before > 0)
        return {
            "encoder_weight": delta_in.T @ self.inputs,
            "encoder_bias": delta_in.sum(0),
            "decoder_weight": delta_out.T @ hidden,
            "decoder_bias": delta_out.sum(0),
        }


def test_fitting_warns_of_nothing() -> None:
    """Not even once a process, as torch does: a user who turns warnings into errors could not train."""
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit_sgd(config(), Rows(subspace_rows(8, 10, domain=1, seed=0)), seed=0)
    finally:
        torch.set_warn_always(False)
    assert [str(warning.message) for warning in told] == []


def test_own_task_is_reconstructed_and_another_is_not() -> None:
    """AdaGrad 1e-2, batch 12, 20 epochs: the setting that separates tasks."""
    data = {domain: subspace_rows(200, 120, domain=domain, seed=0) for domain in (1, 2)}
    unseen = {domain: subspace_rows(60, 120, domain=domain, seed=1) for domain in (1, 2)}
    fitted = {domain: fit_sgd(PAPER, Rows(data[domain]), seed=domain) for domain in (1, 2)}
    for own, other in ((1, 2), (2, 1)):
        errors = float64(reconstruction_errors([fitted[own], fitted[other]], unseen[own])).mean(0)
        features = float64(unseen[own])
        variance = ((features - features.mean(0)) ** 2).sum(1).mean()
        assert errors[0] < 0.3 * variance
        assert errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_weights_depend_on_the_seed_only(optimizer: str) -> None:
    data = subspace_rows(30, 20, domain=1, seed=0)
    setting = config(optimizer=optimizer, epochs=2)
    first, again, other = (digest(fit_sgd(setting, Rows(data), seed).tensors()) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_caller_s_random_state_does_not_matter() -> None:
    data = Rows(subspace_rows(30, 20, domain=1, seed=0))
    digests = set()
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            digests.add(digest(fit_sgd(config(), data, 7).tensors()))
    assert len(digests) == 1


def test_samples_come_in_another_order_every_epoch() -> None:
    """Each epoch visits every sample once; the order is not the file's."""
    seen: list[int] = []

    class Watched(Rows):
        def rows(self, indices: Any) -> Tensor:
            seen.extend(indices)
            return super().rows(indices)

    fit_sgd(config(epochs=2, batch_size=4), Watched(subspace_rows(30, 10, domain=1, seed=0)), seed=3)
    visited = seen[-60:]  # before the first epoch one sample may be read for its shape
    assert sorted(visited[:30]) == sorted(visited[30:]) == list(range(30))
    assert visited[:30] != visited[30:]
    assert visited[:30] != list(range(30))


def test_sgd_steps_are_those_computed_by_hand() -> None:
    """Three whole-batch steps: summed over features, averaged over samples, momentum 0.9, weight decay 5e-4 on the
    weights and none on the biases."""
    start = given(12, 5)
    data = subspace_rows(6, 12, domain=1, seed=0)
    centred = Centred(data)
    fitted = fit_sgd(config(lr=0.05, epochs=3, batch_size=6), Rows(data), seed=0, start=start)
    weights = centred.weights(start)
    velocity: dict[str, np.ndarray] = {name: np.zeros_like(value) for name, value in weights.items()}
    for _ in range(3):
        for name, gradient in centred.gradients(weights).items():
            decay = 5e-4 if name.endswith("weight") else 0.0
            velocity[name] = 0.9 * velocity[name] + gradient + decay * weights[name]
        weights = {name: value - 0.05 * velocity[name] for name, value in weights.items()}
    for name, value in weights.items():
        # float32 against float64, three steps of numbers around 1.
        np.testing.assert_allclose(centred.weights(fitted)[name], value, atol=3e-6, err_msg=name)


def test_weight_decay_shrinks_weights_and_not_biases() -> None:
    """Dead units, and a decoder bias at the mean: no gradient but rounding, so decay is all that moves anything."""
    data = subspace_rows(6, 8, domain=1, seed=0)
    centred = Centred(data)
    start = given(8, 4)
    start = SgdAutoencoder(
        start.encoder_weight,
        torch.full((4,), -100.0),
        start.decoder_weight,
        torch.from_numpy(np.log(centred.mean / (1 - centred.mean))).float(),
    )
    fitted = fit_sgd(config(lr=0.1, batch_size=6), Rows(data), seed=0, start=start)
    before, after = centred.weights(start), centred.weights(fitted)
    for name in ("encoder_weight", "decoder_weight"):
        # The factor differs from 1 by 5e-5, 200 times float32 rounding.
        np.testing.assert_allclose(after[name], before[name] * (1 - 0.1 * 5e-4), rtol=5e-6, atol=1e-8)
    # Decay would move the encoder's by 100 · 0.1 · 5e-4 = 5e-3, the decoder's by up to 1e-4.
    np.testing.assert_allclose(after["encoder_bias"], before["encoder_bias"], atol=5e-5)
    np.testing.assert_allclose(after["decoder_bias"], before["decoder_bias"], atol=1e-6)


def test_first_adagrad_step_has_the_gradient_s_sign_and_the_learning_rate_s_size() -> None:
    start = given(12, 5)
    data = subspace_rows(6, 12, domain=1, seed=0)
    centred = Centred(data)
    fitted = centred.weights(
        fit_sgd(config(lr=0.01, batch_size=6, optimizer="adagrad"), Rows(data), seed=0, start=start)
    )
    before = centred.weights(start)
    for name, gradient in centred.gradients(before).items():
        # Where decay (5e-4 of about 1) or rounding cannot turn the sign.
        clear = np.abs(gradient) > (5e-3 if name.endswith("weight") else 1e-5)
        assert clear.any()
        # The step is found as the difference of two float32 numbers around 1.
        np.testing.assert_allclose(
            (fitted[name] - before[name])[clear], -0.01 * np.sign(gradient)[clear], rtol=1e-3, err_msg=name
        )


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_a_step_does_not_grow_with_the_batch(optimizer: str) -> None:
    """The same 4 samples once, or 4 times each in one batch, are one step; a summed loss would go 4 times as far."""
    start = given(12, 5)
    data = subspace_rows(4, 12, domain=1, seed=0)
    once = fit_sgd(config(lr=0.05, optimizer=optimizer), Rows(data), 0, start=start)
    often = fit_sgd(config(lr=0.05, optimizer=optimizer, batch_size=16), Rows(data.repeat(4, 1)), 0, start=start)
    moved = 0.0
    for name, tensor in once.tensors().items():
        # Means over 4 and over 16 round differently; AdaGrad and Adam divide a gradient by itself.
        torch.testing.assert_close(tensor, often.tensors()[name], atol=1e-4, rtol=0)
        moved = max(moved, float((tensor - start.tensors()[name]).abs().max()))
    assert moved > 5e-3, "nothing moved: the test would show nothing"


def test_going_on_keeps_the_function_of_the_earlier_weights() -> None:
    """At a learning rate of nothing the continued autoencoder answers as the earlier one, on any task's features."""
    start = fit_sgd(PAPER, Rows(subspace_rows(60, 30, domain=1, seed=0)), seed=0)
    other = subspace_rows(20, 30, domain=2, seed=0)
    continued = fit_sgd(config(lr=1e-30), Rows(other), seed=0, start=start)
    for features in (other, subspace_rows(20, 30, domain=1, seed=1)):
        # Folding the centre in and out again: a few float32 roundings of weights around 1.
        expected = reconstruction_errors([start], features)
        torch.testing.assert_close(reconstruction_errors([continued], features), expected, rtol=1e-4, atol=1e-5)


def test_documented_defaults_learn_something() -> None:
    """Stochastic gradients at 1e-3 for 2 epochs: short of the own task's variance, and of another task's error."""
    fitted = [fit_sgd(AutoencoderConfig(), Rows(subspace_rows(200, 120, domain=d, seed=0)), seed=d) for d in (1, 2)]
    features = subspace_rows(60, 120, domain=1, seed=1)
    own, other = float64(reconstruction_errors(fitted, features)).mean(0)
    variance = ((float64(features) - float64(features).mean(0)) ** 2).sum(1).mean()
    assert own < 0.8 * variance
    assert own < 0.8 * other


@pytest.mark.parametrize("count", [1, 5])
def test_identical_samples_give_a_finite_autoencoder_that_knows_them(count: int) -> None:
    """No spread to divide by, only the rounding of one."""
    sample = subspace_rows(1, 400, domain=1, seed=0)
    fitted = fit_sgd(PAPER, Rows(sample.repeat(count, 1)), seed=0)
    # A spread of rounding noise (1e-7) is none: dividing by it would give weights of 1e8; one sample's are below 30.
    assert max(float(tensor.abs().max()) for tensor in fitted.tensors().values()) < 1e3
    others = subspace_rows(20, 400, domain=2, seed=0)
    errors = reconstruction_errors([fitted], torch.cat([sample, others]))[:, 0]
    assert bool(torch.isfinite(errors).all())
    assert float(errors[0]) < 0.1 * float(errors[1:].min())


def test_a_last_batch_that_is_smaller_counts() -> None:
    """5 samples in batches of 4: the fifth alone is a step too."""
    start = given(6, 3)
    data = subspace_rows(5, 6, domain=1, seed=0)
    sizes: list[int] = []

    class Watched(Rows):
        def rows(self, indices: Any) -> Tensor:
            sizes.append(len(indices))
            return super().rows(indices)

    fit_sgd(config(batch_size=4), Watched(data), seed=0, start=start)
    assert sizes[-2:] == [4, 1]


def test_going_on_from_earlier_weights_leaves_them_as_they_are() -> None:
    data = subspace_rows(40, 30, domain=1, seed=0)
    first = fit_sgd(PAPER, Rows(data), seed=0)
    before = digest(first.tensors())
    second = fit_sgd(PAPER, Rows(data), seed=1, start=first)
    assert digest(first.tensors()) == before
    fresh, continued = (
        float(reconstruction_errors([first], data).mean()),
        float(reconstruction_errors([second], data).mean()),
    )
    assert continued < fresh
    assert not any(tensor.requires_grad for tensor in second.tensors().values())


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_a_diverging_learning_rate_is_refused_with_its_value(optimizer: str) -> None:
    data = Rows(subspace_rows(40, 30, domain=1, seed=0))
    with pytest.raises(DivergedError, match=r"ae_lr=1e\+20") as caught:
        fit_sgd(config(lr=1e20, epochs=2, batch_size=8, optimizer=optimizer), data, seed=0)
    assert "\n" not in str(caught.value)


def test_features_that_are_not_finite_are_refused() -> None:
    data = subspace_rows(20, 10, domain=1, seed=0)
    data[11, 2] = torch.nan
    with pytest.raises(DivergedError, match="loss is nan"):
        fit_sgd(config(), Rows(data), seed=0)


def test_error_is_the_distance_to_the_reconstruction() -> None:
    """Several autoencoders in one product, against each written out in float64."""
    fitted = [given(40, 7, seed) for seed in range(5)]
    features = subspace_rows(9, 40, domain=1, seed=0)
    errors = reconstruction_errors(fitted, features)
    assert errors.shape == (9, 5)
    z = float64(features)
    for i, autoencoder in enumerate(fitted):
        w = as_arrays(autoencoder)
        hidden = np.maximum(z @ w["encoder_weight"].T + w["encoder_bias"], 0)
        reconstruction = sigmoid(hidden @ w["decoder_weight"].T + w["decoder_bias"])
        # Sums of 40 float32 squares below 1.
        np.testing.assert_allclose(float64(errors[:, i]), ((z - reconstruction) ** 2).sum(1), rtol=2e-5)


def test_groups_of_autoencoders_give_the_same_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the reconstructions of all do not fit in memory together, groups answer one after the other."""
    fitted = [given(40, 7, seed) for seed in range(7)]
    features = subspace_rows(6, 40, domain=1, seed=0)
    together = reconstruction_errors(fitted, features)
    monkeypatch.setattr(sgd_autoencoder, "_GROUP_BYTES", 3 * features.numel() * 4)
    torch.testing.assert_close(reconstruction_errors(fitted, features), together, rtol=1e-5, atol=0)
    monkeypatch.setattr(sgd_autoencoder, "_GROUP_BYTES", 1)
    torch.testing.assert_close(reconstruction_errors(fitted, features), together, rtol=1e-5, atol=0)


def test_a_samples_error_does_not_depend_on_the_batch() -> None:
    fitted = [given(40, 7, seed) for seed in range(3)]
    features = subspace_rows(10, 40, domain=1, seed=0)
    together = reconstruction_errors(fitted, features)
    for i in range(10):
        # Matrix products of other sizes round differently in the last digits, no more.
        torch.testing.assert_close(
            reconstruction_errors(fitted, features[i : i + 1])[0], together[i], rtol=1e-5, atol=0
        )


def test_features_are_not_changed_in_place() -> None:
    data = subspace_rows(10, 20, domain=1, seed=0)
    before = data.clone()
    reconstruction_errors([fit_sgd(config(), Rows(data), seed=0)], data)
    assert torch.equal(data, before)


def test_no_samples_give_no_rows() -> None:
    assert reconstruction_errors([given(10, 3), given(10, 3, 1)], torch.zeros(0, 10)).shape == (0, 2)


def test_it_holds_its_two_matrices_and_two_biases_and_nothing_else() -> None:
    """No backbone inside: h·D twice, and the biases."""
    fitted = fit_sgd(config(latent_dim=6), Rows(subspace_rows(8, 50, domain=1, seed=0)), seed=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in fitted.tensors().items()}
    assert shapes == {"encoder_weight": (6, 50), "encoder_bias": (6,), "decoder_weight": (50, 6), "decoder_bias": (50,)}
    assert all(math.isfinite(float(tensor.sum())) for tensor in fitted.tensors().values())


class _Readings(TorchDispatchMode):
    """Counts values that Python asks a tensor for: on a card each one waits until all before it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def test_losses_are_not_read_one_by_one() -> None:
    rows = Rows(subspace_rows(300, 12, domain=0, seed=0))
    with _Readings() as readings:
        fit_sgd(config(batch_size=1, epochs=2), rows, 0)
    assert readings.count < 10, "of 600 batches"
