"""Checkpoints inside the expert stage: where a retried stage goes on, and how its state becomes JSON and tensors."""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_eg.errors import DamagedFileError, StorageError
from distributed_eg.store import layout, records
from distributed_eg.store.records import CheckpointRecord, RivalCheckpointRecord
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import load_tensors, save_tensors
from distributed_eg.types import TaskId

logger = logging.getLogger(__name__)

_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
_DICTS: dict[str, type[dict[Any, Any]]] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}
_ARRAY_KINDS = "biufcSUmM"
"""Kinds of numpy values that are nothing but their bytes."""


CHECKPOINTS = (CheckpointRecord, RivalCheckpointRecord)


@dataclass(frozen=True)
class Checkpoint:
    """A stage's state after ``epochs`` epochs: ``values`` and ``tensors`` are what ``encode`` gave, ``key`` is of
    everything that makes the stage what it is."""

    key: str
    epochs: int
    values: Any
    tensors: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class CheckpointSlot:
    """Where one training keeps its checkpoint: the newest one, under the training's own key."""

    storage: Storage
    task: TaskId
    key: str
    kind: type[CheckpointRecord] = CheckpointRecord

    @property
    def path(self) -> str:
        """Of the record."""
        return self.kind.path_of(self.task)

    def load(self) -> Checkpoint | None:
        """The stage's checkpoint; None where there is none, where it is of another stage, or, with a warning, damaged.

        Raises:
            StorageError: the run directory does not answer.
        """
        if not self.storage.exists(self.path):
            return None
        try:
            record = records.read(self.storage, self.kind, self.task)
            if record is None or record.key != self.key:
                return None
            return Checkpoint(self.key, record.epochs, record.values, load_tensors(self.storage, record.tensors))
        except StorageError as error:
            says = "The checkpoint of task %d cannot be used, and its expert is trained from the beginning: %s"
            logger.warning(says, self.task, error)
            return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Seal the tensors, then the record that names them; earlier weights go last.

        Raises:
            StorageError: the run directory cannot be written.
        """
        weights = layout.task_weights(self.task, self.kind.name)
        tensors = save_tensors(self.storage, weights, checkpoint.tensors)
        record = self.kind(self.task, checkpoint.key, checkpoint.epochs, checkpoint.values, tensors)
        records.seal(self.storage, record)
        _delete_weights(self.storage, weights, but=tensors.path)

    def delete(self) -> None:
        """Remove the checkpoint: the record, then all weights, those of killed writers included.

        Raises:
            StorageError: a file may not be removed.
        """
        if self.storage.exists(self.path):
            self.storage.delete(self.path)
        _delete_weights(self.storage, layout.task_weights(self.task, self.kind.name))


def delete_checkpoints(storage: Storage, task: TaskId) -> None:
    """Remove a task's checkpoints where there are any.

    Raises:
        StorageError: a file may not be removed.
    """
    for kind in CHECKPOINTS:
        CheckpointSlot(storage, task, "", kind).delete()


def encode(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree of plain values, tensors and arrays as JSON and tensors; ``decode`` gives back the same, bit for bit.

    Trees are made of dicts with int or str keys (their order is kept), OrderedDicts, Counters, lists, tuples, None,
    bool, int, float, str, numpy arrays and scalars, and dense tensors (detached). Parameters are refused: what trains
    one would not train the tensor that came back.

    Raises:
        TypeError: there is anything else; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(value, tensors, ""), tensors


def decode(value: Any, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> Any:
    """What ``encode`` was given; what was on a device of that type is on ``device``.

    Raises:
        DamagedFileError: that did not come from ``encode``.
    """
    try:
        return _decode(value, tensors, torch.device(device))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"The values of a checkpoint are damaged: {error!r}.") from error


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [_encode(item, tensors, f"{path}[{i}]") for i, item in enumerate(value)]
    if kind is tuple:
        return {"tuple": [_encode(item, tensors, f"{path}[{i}]") for i, item in enumerate(value)]}
    if kind in _DICTS.values() and all(type(key) in (int, str) for key in value):
        items = [[key, _encode(item, tensors, f"{path}[{key!r}]")] for key, item in value.items()]
        return {next(name for name, known in _DICTS.items() if known is kind): items}
    name = str(len(tensors))
    is_parameter = kind is Tensor and value.requires_grad and value.is_leaf
    if kind is Tensor and not is_parameter and value.layout is torch.strided and value.dtype in _DTYPES:
        tensors[name] = value.detach()
        return {"tensor": name} if value.device.type == "cpu" else {"tensor": name, "device": value.device.type}
    if (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in _ARRAY_KINDS:
        tensors[name] = torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
        tag = "array" if kind is np.ndarray else "scalar"
        return {tag: name, "dtype": value.dtype.str, "shape": list(value.shape)}
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__} at {path or 'the root'} cannot be stored in a checkpoint")


def _decode(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors, device) for item in value]
    if not isinstance(value, dict):
        return value
    if name := value.get("array") or value.get("scalar"):
        data = tensors[name].numpy().tobytes()
        array = np.frombuffer(data, np.dtype(value["dtype"])).reshape(value["shape"]).copy()
        return array if "array" in value else array[()]
    if "tensor" in value:
        kind = value.get("device", "cpu")
        return tensors[value["tensor"]].to(device if device.type == kind else kind)
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decode(item, tensors, device) for item in content)
    return _DICTS[kind]({key: _decode(item, tensors, device) for key, item in content})


def _delete_weights(storage: Storage, prefix: str, but: str = "") -> None:
    folder = prefix.rpartition("/")[0]
    for path in [f"{folder}/{name}" for name in storage.list(folder)]:
        if path.startswith(f"{prefix}-") and path != but:
            storage.delete(path)
