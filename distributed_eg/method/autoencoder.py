"""Autoencoders behind one small interface: what a kind must offer, and how one is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from torch import Tensor

from distributed_eg.config import AutoencoderConfig
from distributed_eg.method.linear_autoencoder import LinearAutoencoder, LinearStack, fit_linear
from distributed_eg.method.sgd_autoencoder import FeatureRows, SgdAutoencoder, SgdStack, fit_sgd
from distributed_eg.types import AutoencoderKind, RelatednessUnit

Autoencoder = LinearAutoencoder | SgdAutoencoder
"""A fitted autoencoder: a frozen value that holds its tensors."""


class AutoencoderStack(Protocol):
    """Several autoencoders of one kind, laid out once for the batched pass."""

    def errors(self, features: Tensor) -> Tensor:
        """Squared Euclidean distance of each standardized sample to each reconstruction, per sample: (n, number of
        autoencoders) float32."""


def fit_autoencoder(
    config: AutoencoderConfig, features: FeatureRows, seed: int, *, start: Autoencoder | None = None
) -> Autoencoder:
    """The autoencoder of one task's standardized ``features``; "linear" needs neither seed nor epochs.

    ``start``, of the same kind, is what a task that comes again goes on from, without its old data.
    """
    if config.kind == "linear":
        return fit_linear(features.blocks, config.latent_dim, start=cast("LinearAutoencoder | None", start))
    return fit_sgd(config, features, seed, start=cast("SgdAutoencoder | None", start))


def stack_autoencoders(autoencoders: Sequence[Autoencoder]) -> AutoencoderStack:
    """Lay ``autoencoders``, all of one kind, out for the batched pass."""
    if isinstance(autoencoders[0], LinearAutoencoder):
        return LinearStack(cast("Sequence[LinearAutoencoder]", autoencoders))
    return SgdStack(cast("Sequence[SgdAutoencoder]", autoencoders))


def relatedness_unit(kind: AutoencoderKind) -> RelatednessUnit:
    """What differences of errors are divided by: the paper's Er_k for "sgd"; the task's own variance for "linear",
    whose Er_k is so small that 0.85 would never be reached."""
    return "own_error" if kind == "sgd" else "variance"


def autoencoder_from_tensors(kind: AutoencoderKind, tensors: Mapping[str, Tensor]) -> Autoencoder:
    """The inverse of ``Autoencoder.tensors``."""
    cls = LinearAutoencoder if kind == "linear" else SgdAutoencoder
    return cls(**tensors)
