"""Tensors as sealed safetensors files, named by their own hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distributed_eg.errors import StorageError
from distributed_eg.store.storage import Artifact, Storage

_HASH_DIGITS = 16


def save_tensors(storage: Storage, prefix: str, tensors: Mapping[str, Tensor]) -> Artifact:
    """Seal ``tensors`` as ``<prefix>-<hash>.safetensors``; the same tensors always give the same bytes.

    Raises:
        StorageError: the run directory cannot be written.
    """
    return storage.write(*pack_tensors(prefix, tensors))


def pack_tensors(prefix: str, tensors: Mapping[str, Tensor]) -> tuple[str, bytes]:
    """Path and bytes of the file that ``save_tensors`` writes."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        # Tensors that share memory are refused by safetensors: only the first is stored without a copy of its own.
        own[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    data = save(own)
    return f"{prefix}-{hashlib.sha256(data).hexdigest()[:_HASH_DIGITS]}.safetensors", data


def load_tensors(storage: Storage, artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of a sealed file, on the CPU.

    Raises:
        StorageError: it is missing or damaged.
    """
    data = storage.read_artifact(artifact)
    try:
        return load(data)
    except SafetensorError as error:
        raise StorageError(f"The file {artifact.path!r} in {storage.shown!r} holds no tensors: {error}") from error
