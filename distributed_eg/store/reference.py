"""What every task of a run is measured by, statistics and the root's autoencoder: sealed, or in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distributed_eg.errors import InputError, StorageError
from distributed_eg.method.standardize import Statistics
from distributed_eg.store.records import StatisticsRecord
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.weights import load_tensors, save_tensors
from distributed_eg.types import AutoencoderKind


def save_statistics(storage: Storage, statistics: Statistics) -> Artifact:
    """Seal the run's standardization statistics."""
    return save_tensors(storage, "statistics", {"mean": statistics.mean, "std": statistics.std})


@dataclass(frozen=True)
class Reference:
    """Statistics for a run, from elsewhere, and the root's autoencoder where there is one."""

    statistics: Statistics
    root_autoencoder: Mapping[str, Tensor] | None

    @staticmethod
    def of_run(storage: Storage, record: StatisticsRecord) -> Reference:
        """What a run stored."""
        tensors = load_tensors(storage, record.artifact)
        root = record.root_autoencoder and load_tensors(storage, record.root_autoencoder)
        return Reference(Statistics(tensors["mean"], tensors["std"], record.num_samples), root or None)

    def save(self, path: str | Path, kind: AutoencoderKind) -> None:
        """Write a file of its own.

        Raises:
            StorageError: the file cannot be written.
        """
        tensors = {"mean": self.statistics.mean, "std": self.statistics.std}
        tensors |= {f"root.{name}": tensor for name, tensor in (self.root_autoencoder or {}).items()}
        # A tensor, for entries of the metadata are written in any order, and a run knows its reference by its bytes.
        tensors["num_samples"] = torch.tensor(self.statistics.num_samples)
        try:
            save_file(tensors, path, metadata={"kind": kind})
        except (OSError, SafetensorError) as error:
            raise StorageError(f"The reference cannot be written to {str(path)!r}: {error}") from error

    @staticmethod
    def load(path: str | Path, kind: AutoencoderKind) -> Reference:
        """Read a file of ``save``.

        Raises:
            InputError: it cannot be read, or its root autoencoder is of another kind than the run's.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"The reference {str(path)!r} cannot be read: {error}") from error
        root = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("root.")}
        if root and metadata.get("kind") != kind:
            raise InputError(f"The reference {str(path)!r} holds a {metadata.get('kind')!r} autoencoder, not {kind!r}.")
        if "mean" not in tensors or "std" not in tensors:
            raise InputError(f"The reference {str(path)!r} holds no statistics; write one by save_reference().")
        num_samples = tensors.get("num_samples", metadata.get("num_samples", 0))  # the latter in older files
        statistics = Statistics(tensors["mean"], tensors["std"], int(num_samples))
        return Reference(statistics, root or None)

    def store(self, storage: Storage) -> StatisticsRecord:
        """Seal it in a run directory."""
        root = self.root_autoencoder and save_tensors(storage, "root-autoencoder", self.root_autoencoder)
        return StatisticsRecord(save_statistics(storage, self.statistics), self.statistics.num_samples, root or None)
