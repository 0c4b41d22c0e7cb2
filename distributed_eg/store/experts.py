"""Reading a run back: experts on demand, at most so many in memory at a time, and the gate over all tasks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distributed_eg.errors import InputError, StorageError
from distributed_eg.method.autoencoder import Autoencoder, autoencoder_from_tensors
from distributed_eg.method.expert import with_head_size
from distributed_eg.method.gate import Expert, Gate, make_gate
from distributed_eg.method.standardize import Statistics
from distributed_eg.store.records import StatisticsRecord
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.weights import load_tensors, save_tensors
from distributed_eg.types import AutoencoderKind, TaskId


@dataclass(frozen=True, slots=True)
class ExpertRef:
    """Where a sealed expert is, and which dataset class ids its outputs stand for."""

    artifact: Artifact
    classes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GateRef:
    """Where everything that a gate needs is."""

    kind: AutoencoderKind
    statistics: StatisticsRecord
    autoencoders: tuple[tuple[TaskId, Artifact], ...]
    temp: float
    confidence_threshold: float | None


LoadTensors = Callable[[Artifact], dict[str, Tensor]]


class ExpertReader:
    """Reads experts and gates of a run; the least recently used expert goes first.

    Args:
        load: gives the tensors behind an artifact: from a run directory, or from memory.
        root: the network that experts are copies of; never changed.
        capacity: experts in memory at a time.
        device: where they are put.
    """

    def __init__(self, load: LoadTensors, root: nn.Module, capacity: int, device: torch.device | str) -> None:
        self.load = load
        self._root = root
        self._capacity = capacity
        self._device = torch.device(device)
        self._experts: OrderedDict[tuple[str, tuple[int, ...]], Expert] = OrderedDict()
        self._autoencoders: dict[str, Autoencoder] = {}
        self._statistics: dict[str, Statistics] = {}
        self._gate: tuple[GateRef, Gate] | None = None

    def to(self, device: torch.device, root: nn.Module) -> ExpertReader:
        """A reader of the same run for another device, with nothing in memory yet."""
        return ExpertReader(self.load, root, self._capacity, device)

    def expert(self, ref: ExpertRef) -> Expert:
        """The expert in eval mode; shared, so that callers that train must copy it.

        Raises:
            StorageError: its file is missing, damaged or of another architecture.
        """
        key = (ref.artifact.sha256, ref.classes)
        if key in self._experts:
            self._experts.move_to_end(key)
            return self._experts[key]
        while len(self._experts) >= self._capacity:
            self._experts.popitem(last=False)
        network = with_head_size(self._root, len(ref.classes))
        try:
            network.load_state_dict(self.load(ref.artifact))
        except RuntimeError as error:
            raise StorageError(f"The expert {ref.artifact.path!r} does not fit this run's backbone: {error}") from error
        expert = Expert(network.to(self._device).eval().requires_grad_(False), ref.classes)
        self._experts[key] = expert
        return expert

    def autoencoder(self, kind: AutoencoderKind, artifact: Artifact) -> Autoencoder:
        """A sealed autoencoder; all of them stay in memory, as the gate asks every one for every sample."""
        if artifact.sha256 not in self._autoencoders:
            loaded = autoencoder_from_tensors(kind, self.load(artifact))
            self._autoencoders[artifact.sha256] = loaded.to(self._device)
        return self._autoencoders[artifact.sha256]

    def statistics(self, record: StatisticsRecord) -> Statistics:
        """The run's standardization statistics."""
        key = record.artifact.sha256
        if key not in self._statistics:
            tensors = self.load(record.artifact)
            mean, std = tensors["mean"].to(self._device), tensors["std"].to(self._device)
            self._statistics[key] = Statistics(mean, std, record.num_samples)
        return self._statistics[key]

    def gate(self, ref: GateRef) -> Gate:
        """The gate over all tasks that ``ref`` names; the last one stays in memory, laid out for its batched pass."""
        if self._gate is None or self._gate[0] != ref:
            autoencoders = {task: self.autoencoder(ref.kind, artifact) for task, artifact in ref.autoencoders}
            gate = make_gate(autoencoders, self.statistics(ref.statistics), ref.temp, ref.confidence_threshold)
            self._gate = (ref, gate)
        return self._gate[1]


def save_statistics(storage: Storage, statistics: Statistics) -> Artifact:
    """Seal the run's standardization statistics."""
    tensors: Mapping[str, Tensor] = {"mean": statistics.mean, "std": statistics.std}
    return save_tensors(storage, "statistics", tensors)


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
        try:
            save_file(tensors, path, metadata={"kind": kind, "num_samples": str(self.statistics.num_samples)})
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
        statistics = Statistics(tensors["mean"], tensors["std"], int(metadata.get("num_samples", 0)))
        return Reference(statistics, root or None)

    def store(self, storage: Storage) -> StatisticsRecord:
        """Seal it in a run directory."""
        root = self.root_autoencoder and save_tensors(storage, "root-autoencoder", self.root_autoencoder)
        return StatisticsRecord(save_statistics(storage, self.statistics), self.statistics.num_samples, root or None)
