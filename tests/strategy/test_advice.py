"""Advice fits the run that it is given to: no warning tells to do what was done, or what cannot help."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from distributed_eg import ExpertGate
from tests.helpers import SHAPE, tiny_benchmark, tiny_net, tiny_strategy


def warnings_of(caplog: pytest.LogCaptureFixture, train: int, kind: str, **settings: Any) -> str:
    """What a task of that many images is told."""
    caplog.set_level(logging.WARNING, "distributed_eg")
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder=kind)  # type: ignore[arg-type]
    with tiny_strategy(model=model, train_epochs=1, **settings) as strategy:
        strategy.train(tiny_benchmark((0,), train=train).train_stream)
    return caplog.text


@pytest.mark.parametrize(
    ("kind", "settings", "fits", "unfit"),
    [
        ("linear", {}, ["more training images", "ae_latent_dim"], ["linear", "ae_lr", "epochs", "adagrad"]),
        ("sgd", {"ae_lr": 1e-9}, ["autoencoder='linear'", "larger ae_lr", "'adagrad'"], ["more training images of it"]),
        ("sgd", {"ae_lr": 1e-9, "ae_optimizer": "adagrad"}, ["autoencoder='linear'", "larger ae_lr"], ["adagrad"]),
    ],
)
def test_an_autoencoder_that_has_hardly_learnt(
    kind: str, settings: dict[str, Any], fits: list[str], unfit: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    told = warnings_of(caplog, 6, kind, **{"validation_fraction": 0.5, "ae_latent_dim": 1, **settings})
    assert "has hardly learnt" in told
    assert all(word in told for word in fits), told
    assert not any(word in told for word in unfit), told


def test_one_validation_image_is_no_fault_of_the_autoencoder(caplog: pytest.LogCaptureFixture) -> None:
    told = warnings_of(caplog, 10, "linear")
    assert "its validation part holds 1 image(s)" in told
    assert "validation_fraction" in told
    assert "hardly learnt" not in told
