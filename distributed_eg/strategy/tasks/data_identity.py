"""What tells one task's data from another's, as JSON values: leaves and their rows, targets, and a few samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.flat_data import FlatData
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from distributed_eg.errors import InputError
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.runtime.worker.causes import ends_process
from distributed_eg.strategy.tasks.settings_identity import array_sha256, json_sha256, named, plain

_NUM_SAMPLES = 64


def identity_of(dataset: Dataset[object]) -> dict[str, str | int]:
    """What tells ``dataset``, torch's or Avalanche's, from others; the same in every process.

    ``class``: the leaves' classes in the order of their first rows; ``length``; and by sha256 ``indices``, which row of
    which leaf, ``targets``, where there are any, and ``samples``, at most 64, from the first to the last. These are
    read: hand in a private copy with evaluation transforms, for a dataset may count its reads.

    Raises:
        InputError: a view asks for a row that is not there, or a leaf has no length.
    """
    leaves: dict[int, tuple[int, object]] = {}
    which, rows = rows_of(dataset, leaves)
    numbers, first, inverse = np.unique(which, return_index=True, return_inverse=True)
    # In the order of their rows: Avalanche may keep the parts of a dataset in the order of a set.
    order = np.argsort(first)
    classes = [named(type(leaf)) for _, leaf in leaves.values()]
    identity: dict[str, str | int] = {
        "class": " + ".join(classes[number] for number in numbers[order]),
        "length": len(rows),
        "indices": array_sha256(np.stack([np.argsort(order)[inverse], rows]).astype("<i8")),
        "samples": _samples_sha256(dataset, len(rows)),
    }
    targets = getattr(dataset, "targets", None)
    if targets is not None:
        values = targets.tolist() if hasattr(targets, "tolist") else targets
        lines = "".join(f"{json.dumps(plain(value))}\n" for value in values)
        identity["targets"] = hashlib.sha256(lines.encode()).hexdigest()
    return identity


def first_shape(dataset: Any) -> tuple[int, ...] | None:
    """Shape of the first sample's image; None where it cannot be read, or is none yet: the stage that reads all tells.

    As in ``identity_of``, hand in a private copy.
    """
    with reproducible(seed=0, threads=1):
        try:
            image = dataset[0][0]
        except BaseException as error:
            if ends_process(error):
                raise
            return None
    return tuple(image.shape) if isinstance(image, Tensor) and image.ndim == 3 else None


def reference_identity(reference: Dataset[object] | str | Path | None) -> dict[str, str | int] | str | None:
    """What tells a strategy's reference from others: a dataset's identity, a file's sha256, None for none.

    Raises:
        InputError: the file cannot be read, or the dataset has no identity.
    """
    if not isinstance(reference, str | Path):
        return None if reference is None else identity_of(reference)
    try:
        return hashlib.sha256(Path(reference).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"The reference {str(reference)!r} cannot be read: {error}") from error


def rows_of(dataset: object, leaves: dict[int, tuple[int, object]]) -> npt.NDArray[np.int64]:
    """For each sample its leaf's number and the row in it, [2, samples]; numbers each leaf once, by its id()."""
    children: Sequence[object]
    indices: Iterable[int] | None = None
    if isinstance(dataset, AvalancheDataset):
        return rows_of(dataset._flat_data, leaves)
    if isinstance(dataset, Subset):
        children, indices = [dataset.dataset], dataset.indices
    elif isinstance(dataset, ConcatDataset):
        children = dataset.datasets
    elif isinstance(dataset, FlatData):
        children, indices = dataset._datasets, dataset._indices
    elif isinstance(dataset, Sized):
        number, _ = leaves.setdefault(id(dataset), (len(leaves), dataset))
        rows = np.arange(len(dataset), dtype="<i8")
        return np.stack([np.full_like(rows, number), rows])
    else:
        raise InputError(f"A {named(dataset)} has no length: give it one (__len__), or wrap it by a dataset that has.")
    table = np.concatenate([np.empty((2, 0), "<i8"), *(rows_of(child, leaves) for child in children)], axis=1)
    try:
        return table if indices is None else table[:, np.fromiter((int(index) for index in indices), dtype="<i8")]
    except IndexError as error:
        raise InputError(
            f"A view over {', '.join(named(type(child)) for child in children)} asks for a row that its "
            f"{table.shape[1]} samples do not have ({error}): correct the indices it was made with."
        ) from error


def _samples_sha256(dataset: Dataset[object], length: int) -> str:
    count = min(length, _NUM_SAMPLES)
    samples: list[object] = []
    with reproducible(seed=0, threads=1):
        for i in range(count):
            try:
                samples.append(_described(dataset[i * (length - 1) // max(1, count - 1)]))
            except BaseException as error:  # told by its class; the stage that needs the sample reports it
                if ends_process(error):
                    raise
                samples.append(named(error))
    return json_sha256(samples)


def _described(value: object) -> object:
    if isinstance(value, Image):
        return [value.mode, *value.size, value.getpalette(), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Tensor | np.generic) or (isinstance(value, np.ndarray) and not value.dtype.hasobject):
        return array_sha256(value)
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, Mapping):
        return sorted(([plain(key), _described(item)] for key, item in value.items()), key=json.dumps)
    return plain(value)
