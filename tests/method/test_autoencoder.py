"""Both kinds of autoencoder behind the one interface."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distributed_eg.config import AutoencoderConfig
from distributed_eg.method.autoencoder import (
    autoencoder_from_tensors,
    fit_autoencoder,
    relatedness_unit,
    stack_autoencoders,
)
from distributed_eg.method.linear_autoencoder import LinearAutoencoder
from distributed_eg.method.sgd_autoencoder import SgdAutoencoder
from distributed_eg.types import AutoencoderKind
from tests.method.helpers import Rows, digest, reconstruction_errors, subspace_rows

KINDS: list[AutoencoderKind] = ["sgd", "linear"]
CLASSES = {"sgd": SgdAutoencoder, "linear": LinearAutoencoder}


def config(kind: AutoencoderKind) -> AutoencoderConfig:
    return AutoencoderConfig(kind=kind, latent_dim=6, lr=1e-2, epochs=20, batch_size=12, optimizer="adagrad")


@pytest.mark.parametrize("kind", KINDS)
def test_kind_decides_what_is_fitted(kind: AutoencoderKind) -> None:
    fitted = fit_autoencoder(config(kind), Rows(subspace_rows(20, 15, domain=1, seed=0)), seed=0)
    assert type(fitted) is CLASSES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_hold_all_of_it(kind: AutoencoderKind) -> None:
    """Stored tensors give an autoencoder back that answers bit for bit the same."""
    data = subspace_rows(20, 15, domain=1, seed=0)
    fitted = fit_autoencoder(config(kind), Rows(data), seed=0)
    tensors = {name: tensor.clone() for name, tensor in fitted.tensors().items()}
    back = autoencoder_from_tensors(kind, dict(reversed(tensors.items())))
    assert digest(back.tensors()) == digest(fitted.tensors())
    assert torch.equal(reconstruction_errors([back], data), reconstruction_errors([fitted], data))
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert digest(fitted.to("cpu").tensors()) == digest(fitted.tensors())


@pytest.mark.parametrize("kind", KINDS)
def test_errors_have_a_row_a_sample_and_a_column_an_autoencoder(kind: AutoencoderKind) -> None:
    """A mixed batch: each sample has its least error in its own domain's column."""
    domains = (1, 2, 3)
    setting = replace(config(kind), latent_dim=24)
    fitted = [fit_autoencoder(setting, Rows(subspace_rows(150, 80, domain=d, seed=0)), seed=d) for d in domains]
    batch = torch.cat([subspace_rows(4, 80, domain=d, seed=1) for d in (3, 1, 2, 1)])
    errors = reconstruction_errors(fitted, batch)
    assert errors.shape == (16, 3)
    assert errors.dtype == torch.float32
    assert errors.argmin(1).tolist() == [2] * 4 + [0] * 4 + [1] * 4 + [0] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_answers_batch_after_batch(kind: AutoencoderKind) -> None:
    """What is laid out once is not used up: batches of any size, in any order; the autoencoders stay as they are."""
    fitted = [fit_autoencoder(config(kind), Rows(subspace_rows(30, 20, domain=d, seed=0)), seed=d) for d in (1, 2, 3)]
    before = [digest(autoencoder.tensors()) for autoencoder in fitted]
    stack = stack_autoencoders(fitted)
    data = subspace_rows(11, 20, domain=2, seed=4)
    expected = torch.cat([reconstruction_errors([autoencoder], data) for autoencoder in fitted], dim=1)
    for first, last in ((0, 11), (3, 4), (0, 0), (4, 11), (0, 11)):
        # Products of other sizes round differently in float32: squares of up to 10.
        torch.testing.assert_close(stack.errors(data[first:last]), expected[first:last], rtol=1e-5, atol=2e-5)
    assert [digest(autoencoder.tensors()) for autoencoder in fitted] == before


def test_linear_asks_for_neither_seed_nor_epochs() -> None:
    data = Rows(subspace_rows(40, 15, domain=1, seed=0))
    one = fit_autoencoder(AutoencoderConfig(kind="linear", latent_dim=3, lr=1.0, epochs=1), data, seed=0)
    other = fit_autoencoder(AutoencoderConfig(kind="linear", latent_dim=3, lr=9.0, epochs=7), data, seed=1)
    assert digest(one.tensors()) == digest(other.tensors())


def test_units_of_relatedness() -> None:
    """The paper's Er_k would keep a closed-form autoencoder below the threshold for ever."""
    assert relatedness_unit("sgd") == "own_error"
    assert relatedness_unit("linear") == "variance"
