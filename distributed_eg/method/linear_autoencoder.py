"""The closed-form linear autoencoder: mean and top singular vectors, in one pass and bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_eg.errors import InputError

_BLOCK_ROWS = 512
_COLUMNS = 4096
_CENTRE = 0.5
"""Standardized features lie around 0.5; distances are formed around it, where float32 loses fewer digits."""


@dataclass(frozen=True)
class LinearAutoencoder:
    """A linear autoencoder with squared error spans the PCA subspace (section 3.1 of the paper).

    ``components`` (d, num_features) are orthonormal right singular vectors of the centred training features, with
    their ``singular_values`` (d,); ``mean`` (num_features,); ``num_samples`` a scalar int64. Together they are the
    summary from which a task that comes again can be continued without its old data.
    """

    components: Tensor
    singular_values: Tensor
    mean: Tensor
    num_samples: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: every field by its name."""
        return dict(vars(self))

    def to(self, device: torch.device | str) -> LinearAutoencoder:
        """The same value on another device."""
        return LinearAutoencoder(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def fit_linear(
    blocks: Callable[[int], Iterator[Tensor]], latent_dim: int, *, start: LinearAutoencoder | None = None
) -> LinearAutoencoder:
    """Truncated SVD of the centred rows, block by block.

    Each step stacks [S·Vᵀ of rank 2d; the next 512 centred rows; a row that corrects the mean], whose small Gram
    matrix is decomposed in float64 (the incremental PCA of Ross et al. 2008). Memory is (2d + 512) rows of features
    whatever the number of samples.

    Args:
        blocks: gives all rows in order, at most the asked number at a time.
        latent_dim: rank d; fewer components result where there are fewer than d + 1 samples.
        start: an earlier summary to go on from.

    Raises:
        InputError: there is no row.
    """
    count = 0
    mean: Tensor | None = None
    basis: Tensor | None = None
    if start is not None:
        count, mean = int(start.num_samples), start.mean
        basis = start.components * start.singular_values[:, None]
    for block in blocks(_BLOCK_ROWS):
        rows = len(block)
        block_mean = block.mean(0)
        centred = block - block_mean
        if mean is None or basis is None:
            stacked, mean = centred, block_mean
        else:
            shift = (mean - block_mean) * (count * rows / (count + rows)) ** 0.5
            stacked = torch.cat([basis, centred, shift[None]])
            mean = mean + (block_mean - mean) * (rows / (count + rows))
        count += rows
        basis = compress(stacked, min(2 * latent_dim, count - 1))
    if mean is None or basis is None:
        raise InputError("An autoencoder needs at least one sample, but there is none.")
    basis = basis[:latent_dim]
    values = basis.norm(dim=1)
    components = basis / values[:, None]
    # The sign of a singular vector is arbitrary: make its largest entry positive.
    signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    return LinearAutoencoder((components * signs).contiguous(), values, mean.contiguous(), torch.tensor(count))


class LinearStack:
    """Autoencoders laid side by side once, so that a batch passes all of them in one product."""

    def __init__(self, autoencoders: Sequence[LinearAutoencoder]) -> None:
        means = torch.stack([autoencoder.mean - _CENTRE for autoencoder in autoencoders])
        parts = [a.components @ mean for a, mean in zip(autoencoders, means, strict=True)]
        components = [autoencoder.components for autoencoder in autoencoders]
        self._components = torch.cat(components) if len(components) > 1 else components[0]  # alone without a copy
        self._offsets = torch.cat(parts)
        self._ranks = [len(part) for part in parts]
        self._same_ranks = len(set(self._ranks)) == 1
        self._means = means
        self._mean_norms = means.square().sum(1)

    def errors(self, features: Tensor) -> Tensor:
        """‖z − m‖² − ‖V(z − m)‖² for each sample and autoencoder: (n, number of autoencoders)."""
        centred = features - _CENTRE
        distances = centred.square().sum(1, keepdim=True) - 2 * centred @ self._means.T + self._mean_norms
        projected = (centred @ self._components.T).sub_(self._offsets).square_()
        if self._same_ranks:  # one sum instead of one an autoencoder
            explained = torch.unflatten(projected, 1, (len(self._ranks), self._ranks[0])).sum(2)
        else:
            explained = torch.stack([part.sum(1) for part in torch.split(projected, self._ranks, dim=1)], dim=1)
        return (distances - explained).clamp_min(0)


def compress(rows: Tensor, rank: int) -> Tensor:
    """The best rank-``rank`` S·Vᵀ of ``rows``, longest row first, through the eigenvectors of rows·rowsᵀ."""
    values, vectors = torch.linalg.eigh(gram_of(rows))
    # Directions of rounding noise only would be normalised into garbage.
    floor = float(values[-1].clamp_min(0)) * 1e-10
    keep = min(rank, int((values > floor).sum()))
    if keep == 0:
        return rows.new_zeros(0, rows.shape[1])
    top: Tensor = vectors[:, -keep:].flip(1).T.to(rows.dtype)
    return torch.mm(top, rows)


def gram_of(rows: Tensor) -> Tensor:
    """rows·rowsᵀ in float64, without a copy of all of ``rows`` in it."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for first in range(0, rows.shape[1], _COLUMNS):
        part = rows[:, first : first + _COLUMNS].double()
        gram += part @ part.T
    return gram
