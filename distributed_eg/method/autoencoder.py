"""Autoencoders behind one small interface: what a kind must offer, and how one is fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from distributed_eg.config import AutoencoderConfig
from distributed_eg.method.linear_autoencoder import LinearAutoencoder, fit_linear, linear_errors
from distributed_eg.method.sgd_autoencoder import SgdAutoencoder, fit_sgd, sgd_errors
from distributed_eg.types import AutoencoderKind, RelatednessUnit

Autoencoder = LinearAutoencoder | SgdAutoencoder
"""A fitted autoencoder: a frozen value that holds its tensors."""


class FeatureRows(Protocol):
    """Standardized features of one task's training part, read from wherever they are kept."""

    def __len__(self) -> int:
        """How many samples there are."""

    def rows(self, indices: Sequence[int]) -> Tensor:
        """The rows at ``indices``: (len(indices), num_features) float32."""

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All rows in order, at most ``size`` at a time."""


_UNITS: Mapping[AutoencoderKind, RelatednessUnit] = {"sgd": "own_error", "linear": "variance"}
_ERRORS: Mapping[type, Callable[[Sequence[Autoencoder], Tensor], Tensor]] = {
    LinearAutoencoder: linear_errors,  # type: ignore[dict-item]
    SgdAutoencoder: sgd_errors,  # type: ignore[dict-item]
}


def fit_autoencoder(config: AutoencoderConfig, features: FeatureRows, seed: int) -> Autoencoder:
    """The autoencoder of one task's standardized ``features``; "linear" needs neither seed nor epochs."""
    if config.kind == "linear":
        return fit_linear(features.blocks, config.latent_dim)
    return fit_sgd(config, features, seed)


def reconstruction_errors(autoencoders: Sequence[Autoencoder], features: Tensor) -> Tensor:
    """Squared Euclidean distance of each sample to each autoencoder's reconstruction, in one batched pass.

    Args:
        autoencoders: all of one kind.
        features: standardized features (n, num_features).

    Returns:
        (n, len(autoencoders)) float32 errors, per sample, never averaged over the batch.
    """
    return _ERRORS[type(autoencoders[0])](autoencoders, features)


def relatedness_unit(kind: AutoencoderKind) -> RelatednessUnit:
    """What differences of errors are divided by: the paper's Er_k for "sgd"; the task's own variance for "linear",
    whose Er_k is so small that 0.85 would never be reached."""
    return _UNITS[kind]


def autoencoder_from_tensors(kind: AutoencoderKind, tensors: Mapping[str, Tensor]) -> Autoencoder:
    """The inverse of ``Autoencoder.tensors``."""
    cls = LinearAutoencoder if kind == "linear" else SgdAutoencoder
    return cls(**tensors)
