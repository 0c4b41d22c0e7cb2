"""The paper's autoencoder: linear–ReLU–linear–sigmoid, trained with cross-entropy by stochastic gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_eg.config import AutoencoderConfig
from distributed_eg.errors import DivergedError

_GROUP_BYTES = 256 * 2**20
_BLOCK_ROWS = 256
_MOMENTUM = 0.9
_WEIGHT_DECAY = 5e-4
_READ_EVERY = 256
"""Batches after which their losses are looked at: each reading waits for a card."""


class FeatureRows(Protocol):
    """Standardized features of one task's training part, read from wherever they are kept."""

    def __len__(self) -> int:
        """How many samples there are."""

    def rows(self, indices: Sequence[int]) -> Tensor:
        """The rows at ``indices``: (len(indices), num_features) float32."""

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All rows in order, at most ``size`` at a time."""


@dataclass(frozen=True)
class SgdAutoencoder:
    """Section 3.1 of the paper: ``encoder_weight`` (h, D), ``encoder_bias`` (h,), ``decoder_weight`` (D, h) and
    ``decoder_bias`` (D,), with h hidden units and D features."""

    encoder_weight: Tensor
    encoder_bias: Tensor
    decoder_weight: Tensor
    decoder_bias: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: every field by its name."""
        return dict(vars(self))

    def to(self, device: torch.device | str) -> SgdAutoencoder:
        """The same value on another device."""
        return SgdAutoencoder(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def fit_sgd(
    config: AutoencoderConfig, features: FeatureRows, seed: int, *, start: SgdAutoencoder | None = None
) -> SgdAutoencoder:
    """Minimise the cross-entropy between z and its reconstruction, as the paper does; deterministic in ``seed``.

    The loss is summed over the features and averaged over the batch, so that a step does not depend on the batch
    size. "sgd" has momentum 0.9 as Avalanche's has; weight decay 5e-4 acts on the weights, not on the biases, as in
    the authors' sample code.

    The encoder is trained on (z − m) / s, with m and s the mean and the length of this task's features, and the
    decoder's bias starts at m; both are folded into the weights at the end, so what is stored is the paper's network.
    All of z is positive: uncentred, the first steps push every hidden unit the same way, most ReLUs die, and what is
    left reconstructs the mean.

    Raises:
        DivergedError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    mean, length = _centre(features)
    device = mean.device
    tensors = [tensor.to(device) for tensor in _initial(config, mean, length, generator, start)]
    encoder_weight, encoder_bias, decoder_weight, decoder_bias = (tensor.requires_grad_() for tensor in tensors)
    optimizer = _optimizer(config, tensors)
    losses: list[Tensor] = []
    for epoch in range(config.epochs):
        order = torch.randperm(len(features), generator=generator).tolist()
        for first in range(0, len(order), config.batch_size):
            target = features.rows(order[first : first + config.batch_size])
            hidden = F.relu(F.linear((target - mean) / length, encoder_weight, encoder_bias))
            logits = F.linear(hidden, decoder_weight, decoder_bias)
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(target)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
            if len(losses) == _READ_EVERY or first + config.batch_size >= len(order):
                _require_finite(losses, config, epoch, 1 + first // config.batch_size - len(losses))
                losses.clear()
    weight = encoder_weight.detach() / length
    bias = encoder_bias.detach() - weight @ mean
    return SgdAutoencoder(weight, bias, decoder_weight.detach(), decoder_bias.detach())


class SgdStack:
    """Autoencoders stacked once, so that a batch passes all of them in batched products."""

    def __init__(self, autoencoders: Sequence[SgdAutoencoder]) -> None:
        self._encoder = _side_by_side([a.encoder_weight for a in autoencoders]).mT
        self._encoder_bias = _side_by_side([a.encoder_bias for a in autoencoders])[:, None]
        self._decoder = _side_by_side([a.decoder_weight for a in autoencoders]).mT
        self._decoder_bias = _side_by_side([a.decoder_bias for a in autoencoders])[:, None]

    def errors(self, features: Tensor) -> Tensor:
        """Squared distance of each sample to each reconstruction: (n, number of autoencoders)."""
        # The reconstructions of a group of autoencoders are in memory together.
        size = max(1, _GROUP_BYTES // (4 * features.numel() or 1))
        return torch.cat([self._group(features, slice(i, i + size)) for i in range(0, len(self._encoder), size)]).T

    def _group(self, features: Tensor, group: slice) -> Tensor:
        batch = features.expand(len(self._encoder[group]), *features.shape)
        hidden = torch.baddbmm(self._encoder_bias[group], batch, self._encoder[group]).relu_()
        logits = torch.baddbmm(self._decoder_bias[group], hidden, self._decoder[group])
        return logits.sigmoid_().sub_(batch).square_().sum(2)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """In one tensor; one alone without a copy."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


def _require_finite(losses: list[Tensor], config: AutoencoderConfig, epoch: int, batch: int) -> None:
    """See that no loss diverged; the first is of ``batch``."""
    for i, loss in enumerate(torch.stack(losses).tolist(), batch):
        if not math.isfinite(loss):
            advice = "try a smaller ae_lr" + (" or ae_optimizer='adam'" if config.optimizer != "adam" else "")
            if epoch == i == 0:
                advice = "no step was taken yet, so look for extreme values in the images, or in the backbone"
            raise DivergedError(
                f"The autoencoder's loss is {loss} in epoch {epoch}, batch {i}, at ae_lr={config.lr} "
                f"({config.optimizer}); {advice}."
            )


def _centre(features: FeatureRows) -> tuple[Tensor, float]:
    """Mean of the features, and the root mean square of their distance to it."""
    sums = [(block.double().sum(0), block.double().square().sum()) for block in features.blocks(_BLOCK_ROWS)]
    mean = torch.stack([total for total, _ in sums]).sum(0) / len(features)
    squares = float(torch.stack([square for _, square in sums]).sum()) / len(features)
    spread = squares - float(mean.square().sum())
    # Identical samples have no length to divide by, but for rounding.
    return mean.float(), math.sqrt(spread) if spread > 1e-10 * squares else 1.0


def _initial(
    config: AutoencoderConfig, mean: Tensor, length: float, generator: torch.Generator, start: SgdAutoencoder | None
) -> list[Tensor]:
    """Weights in the centred parametrisation: fresh, or those of ``start``, whose function is kept."""
    if start is not None:
        weight = start.encoder_weight
        bias = start.encoder_bias + weight @ mean
        return [weight * length, bias, start.decoder_weight.clone(), start.decoder_bias.clone()]
    num_features, hidden = len(mean), config.latent_dim
    # Centred samples have length 1: unit normal rows give hidden units of size 1 whatever the number of features.
    encoder = torch.randn(hidden, num_features, generator=generator)
    decoder = (torch.rand(num_features, hidden, generator=generator) * 2 - 1) / math.sqrt(hidden)
    return [encoder, torch.zeros(hidden), decoder, torch.logit(mean.cpu(), eps=1e-3)]


def _optimizer(config: AutoencoderConfig, tensors: list[Tensor]) -> torch.optim.Optimizer:
    weights, biases = tensors[0::2], tensors[1::2]
    groups = [{"params": weights, "weight_decay": _WEIGHT_DECAY}, {"params": biases, "weight_decay": 0.0}]
    if config.optimizer == "adagrad":
        return torch.optim.Adagrad(groups, lr=config.lr)
    if config.optimizer == "adam":
        # Adam scales the decay with the gradient: there it is not the penalty that the paper's setting means.
        return torch.optim.Adam(tensors, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=_MOMENTUM)
