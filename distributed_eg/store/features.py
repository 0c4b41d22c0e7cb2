"""Features of one task in node-local scratch: an Arrow IPC file, written as a stream and read by memory map."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distributed_eg.errors import InputError, StorageError
from distributed_eg.method.standardize import Statistics, standardize


def write_features(path: Path, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Write ``batches`` of (rows, num_features) float32 features with their (rows,) int64 class ids; the file appears
    under ``path`` only when it is whole.

    Returns:
        The number of rows.

    Raises:
        InputError: there is no row.
        StorageError: the scratch folder cannot be written or is full.
    """
    # A name of its own for each attempt: two may write the same features on one node.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    rows = 0
    writer: pa.ipc.RecordBatchFileWriter | None = None
    try:
        with contextlib.ExitStack() as opened:
            with _writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                sink = opened.enter_context(pa.OSFile(str(partial), "wb"))
            # What this raises is no fault of the scratch folder, even if it is an OSError.
            for batch, classes in _one_ahead(batches):
                values = batch.cpu().numpy()
                array = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
                columns = [array, pa.array(classes.cpu().numpy(), pa.int64())]
                record = pa.record_batch(columns, names=["features", "classes"])
                with _writing(path):
                    writer = writer or pa.ipc.new_file(sink, record.schema)
                    writer.write_batch(record)
                rows += len(values)
            with _writing(path):
                if writer is not None:
                    writer.close()
                opened.close()
                if rows:
                    partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    if rows == 0:
        raise InputError("There are no images to take features of: a training or validation part is empty.")
    return rows


def _one_ahead(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, each given when the next one has been begun: a card works while the CPU reads and writes."""
    before: tuple[Tensor, Tensor] | None = None
    for batch in batches:
        if before is not None:
            yield before
        before = batch
    if before is not None:
        yield before


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; a card takes it from the CPU while that goes on."""
    if tensor.device.type != "cpu" or torch.device(device).type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"The scratch folder {str(path.parent)!r} cannot be written: {error}") from error


class FeatureFile:
    """Rows of a feature file, memory-mapped; standardized on the way out where ``statistics`` are given."""

    def __init__(self, path: Path, statistics: Statistics | None = None, device: torch.device | str = "cpu") -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._views: list[np.ndarray] = []
        classes: list[np.ndarray] = []
        for i in range(reader.num_record_batches):
            column = reader.get_batch(i).column(0)
            self._views.append(column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), -1))
            classes.append(reader.get_batch(i).column(1).to_numpy())
        self.classes = torch.from_numpy(np.concatenate(classes)).to(device)
        """(rows,) int64 class ids."""
        self._starts = np.cumsum([0, *(len(view) for view in self._views)])
        self._statistics = statistics
        self._device = device

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._starts[-1])

    def rows(self, indices: Sequence[int]) -> Tensor:
        """The rows at ``indices``, copied out of the file: (len(indices), num_features) float32."""
        wanted = np.asarray(indices)
        files = np.searchsorted(self._starts, wanted, side="right") - 1
        offsets = wanted - self._starts[files]
        picked = [self._views[file][offset] for file, offset in zip(files, offsets, strict=True)]
        return self._prepare(np.stack(picked))

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All rows in order, at most ``size`` at a time."""
        for first in range(0, len(self), size):
            yield self.rows(range(first, min(first + size, len(self))))

    def _prepare(self, values: np.ndarray) -> Tensor:
        features = on_device(torch.from_numpy(values), self._device)
        return features if self._statistics is None else standardize(features, self._statistics)
