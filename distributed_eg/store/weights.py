"""Tensors as sealed safetensors files, named by their own hash."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from distributed_eg.errors import StorageError
from distributed_eg.store.storage import Artifact, Storage, hashed_path, sha256_of

_SUFFIX = ".safetensors"


def save_tensors(storage: Storage, prefix: str, tensors: Mapping[str, Tensor]) -> Artifact:
    """Seal ``tensors`` as ``<prefix>-<hash>.safetensors``; the same tensors always give the same bytes.

    Raises:
        StorageError: the run directory cannot be written.
    """
    if storage.local_folder is None:
        data = save(_apart(tensors))
        return storage.write(hashed_path(prefix, hashlib.sha256(data).hexdigest(), _SUFFIX), data)
    # Straight from the tensors: bytes in between take as long as all the rest.
    return storage.write_file(prefix, _SUFFIX, partial(save_file, _apart(tensors)))


def hash_tensors(prefix: str, tensors: Mapping[str, Tensor]) -> Artifact:
    """What ``save_tensors`` gives, without a run directory: through a temporary file, for the same reason.

    Raises:
        StorageError: the temporary folder cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="distributed-eg-") as folder:
            file = Path(folder) / "tensors"
            save_file(_apart(tensors), file)
            sha256, size_bytes = sha256_of(file), file.stat().st_size
    except (OSError, SafetensorError) as error:
        raise StorageError(f"The temporary folder {tempfile.gettempdir()!r} cannot be written: {error}") from error
    return Artifact(hashed_path(prefix, sha256, _SUFFIX), sha256, size_bytes)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them, in an order that is always the same."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        # Tensors that share memory are refused by safetensors: only the first is stored without a copy of its own.
        own[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return own


def load_tensors(storage: Storage, artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of a sealed file, on the CPU, in memory of their own.

    Raises:
        StorageError: it is missing or damaged.
    """
    return _load(storage, artifact, "pread")


def map_tensors(storage: Storage, artifact: Artifact) -> dict[str, Tensor]:
    """What ``load_tensors`` gives, for who copies it at once and lets go of it: a file of a local run directory is only
    mapped, which takes a third of the time, and lies as it does in the file. A file that shrinks would end the process.
    """
    return _load(storage, artifact, "mmap")


def _load(storage: Storage, artifact: Artifact, backend: str) -> dict[str, Tensor]:
    try:
        if storage.local_folder is None:
            return load(storage.read_artifact(artifact))
        return load_file(storage.verified_file(artifact), backend=backend)
    except SafetensorError as error:
        raise StorageError(f"The file {artifact.path!r} in {storage.shown!r} holds no tensors: {error}") from error
