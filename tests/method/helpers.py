"""Rows, feature distributions and a small network that the tests of the method share."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from distributed_eg.method.autoencoder import Autoencoder, stack_autoencoders
from distributed_eg.method.backbone import build_network
from distributed_eg.method.linear_autoencoder import LinearAutoencoder, fit_linear

IMAGE = (3, 12, 12)


class Rows:
    """Feature rows in memory; ``asked`` records the block sizes that were asked for."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, indices: Sequence[int]) -> Tensor:
        return self.data[list(indices)]

    def blocks(self, size: int) -> Iterator[Tensor]:
        self.asked.append(size)
        return iter(self.data.split(size))


class Net(nn.Module):
    """A network with a feature layer, batch normalisation and a linear head; ``dropout`` draws when it trains."""

    def __init__(self, num_classes: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.pool(self.body(x)).flatten(1)))


def net(seed: int = 0, num_classes: int = 5, dropout: float = 0.0) -> Net:
    """A Net in eval mode with weights and running statistics from ``seed``; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Net(num_classes, dropout)
        norm = network.body[1]
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return network.eval()


@functools.cache
def network_of(arch: str, seed: int = 0) -> nn.Module:
    """A named network with random weights, built once; read only: copy it to change it."""
    return build_network(arch, pretrained=False, weights=None, seed=seed)


def images(count: int, seed: int = 0, shape: tuple[int, int, int] = IMAGE) -> Tensor:
    """Random images (count, *shape)."""
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def subspace_rows(count: int, features: int, *, domain: int, seed: int, rank: int = 3, noise: float = 0.0) -> Tensor:
    """Standardized features of one domain: sigmoid of a random ``rank``-dimensional subspace that the domain fixes."""
    directions = np.random.default_rng(1000 + domain).normal(size=(rank, features))
    generator = np.random.default_rng([domain, seed])
    values = generator.normal(size=(count, rank)) @ directions * (2 / rank**0.5)
    values += noise * generator.normal(size=values.shape)
    return torch.from_numpy(1 / (1 + np.exp(-values))).float()


def decaying_rows(count: int, features: int, *, seed: int, decay: float = 1.0) -> Tensor:
    """Rows whose singular values fall as k^−decay, in a mean of its own, as convolutional features have."""
    generator = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(generator.normal(size=(features, features)))
    scales = np.arange(1, features + 1.0) ** -decay
    values = (generator.normal(size=(count, features)) * scales) @ directions.T
    return torch.from_numpy(0.5 + 0.2 * generator.normal(size=features) + values).float()


def fitted_linear(data: Tensor, latent_dim: int) -> LinearAutoencoder:
    """A linear autoencoder of ``data``."""
    return fit_linear(Rows(data).blocks, latent_dim)


def float64(tensor: Tensor) -> np.ndarray:
    """The values in float64, for computations that owe nothing to the package."""
    return tensor.detach().numpy().astype(np.float64)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes."""
    content = hashlib.sha256()
    for name, tensor in tensors.items():
        content.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        content.update(tensor.detach().contiguous().numpy().tobytes())
    return content.hexdigest()


def reconstruction_errors(autoencoders: Sequence[Autoencoder], features: Tensor) -> Tensor:
    """Errors of one batch, through the stack that the gate uses."""
    return stack_autoencoders(autoencoders).errors(features)
