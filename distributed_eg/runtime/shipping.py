"""How datasets reach workers: every leaf dataset once, however many experiences view it.

A leaf is a ``torch.utils.data.Dataset`` that is not itself a view (``Subset``, ``ConcatDataset``); Avalanche's own
datasets are views, and no torch datasets. The view is pickled around its leaves and travels with each request; a leaf
lies in the object store as pickled bytes. Every stage unpickles its own writable copy, so that a transform that works
in place, or a dataset that counts its reads, changes nothing for another stage, wherever that runs.
"""

from __future__ import annotations

import io
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from distributed_eg.runtime import pickling

_INLINE_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Shipped:
    """A pickled value around references to its leaves; ``leaves`` mean something to the engine that made them.

    ``view`` is the pickle itself where it is small, else a reference to it, so that what many requests share travels
    once.
    """

    view: Any
    leaves: tuple[tuple[str, Any], ...]
    """Class and reference of each."""
    what: str
    """What errors call it."""

    def load(self, fetch: Callable[[Any], Any]) -> Any:
        """A new copy of the value; ``fetch`` gives the bytes behind a reference.

        Raises:
            InputError: it cannot be made here, such as where a module is missing.
        """
        view = self.view if isinstance(self.view, bytes) else fetch(self.view)
        leaves = [
            pickling.load(partial(pickle.loads, fetch(reference)), f"{self.what} ({name})")
            for name, reference in self.leaves
        ]
        return pickling.load(_ViewUnpickler(io.BytesIO(view), leaves).load, self.what)


class LeafStore(Protocol):
    """Where an engine keeps the bytes of leaves."""

    def put(self, data: bytes) -> Any:
        """Keep ``data``; return what a worker's ``fetch`` finds it by."""

    def get(self, reference: Any) -> Any:
        """The bytes that ``put`` kept, on this process."""


class _Leaf:
    """A leaf and where its bytes are; alive as long as any shipment that contains it."""

    def __init__(self, dataset: Dataset[Any], reference: Any) -> None:
        self.dataset = dataset
        self.reference = reference


class Shipper:
    """Ships values; a leaf that several of them contain is stored once while any of them is held."""

    def __init__(self, store: LeafStore) -> None:
        self._store = store
        # By id(), which is safe: the leaf that the entry holds keeps its id from being used again.
        self._leaves: weakref.WeakValueDictionary[int, _Leaf] = weakref.WeakValueDictionary()

    def ship(self, value: Any, what: str) -> tuple[Shipped, object]:
        """Pickle ``value``; also return what must be held while others may share its leaves.

        Raises:
            InputError: something in it cannot be pickled; the message names ``what``.
        """
        buffer = io.BytesIO()
        pickler = _ViewPickler(buffer)
        pickling.dump(pickler, value, what)
        leaves = tuple(self._leaf(dataset, what) for dataset in pickler.datasets)
        data = buffer.getvalue()
        view = data if len(data) < _INLINE_BYTES else self._store.put(data)
        return Shipped(view, tuple((type(leaf.dataset).__name__, leaf.reference) for leaf in leaves), what), leaves

    def copy(self, value: Any, what: str) -> Any:
        """A copy of ``value`` as a worker would get it: whatever is read from it changes nothing of the caller's.

        Raises:
            InputError: as in ``ship``.
        """
        shipped, _held = self.ship(value, what)
        return shipped.load(self._store.get)

    def _leaf(self, dataset: Dataset[Any], what: str) -> _Leaf:
        leaf = self._leaves.get(id(dataset))
        if leaf is None:
            leaf = _Leaf(dataset, self._store.put(pickling.dumps(dataset, what)))
            self._leaves[id(dataset)] = leaf
        return leaf


def hollow(network: nn.Module, what: str) -> nn.Module:
    """A copy of a network, as a worker would get it, whose parameters have no values and take no memory.

    Raises:
        InputError: as in ``Shipper.ship``.
    """
    copy: nn.Module = pickling.load(partial(pickle.loads, pickling.dumps(network, what, _HollowPickler)), what)
    return copy


class _HollowPickler(pickling.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, nn.Parameter):
            return _empty_parameter, (type(obj), obj.shape, obj.stride(), obj.dtype, obj.requires_grad)
        return super().reducer_override(obj)


def _empty_parameter(
    kind: type[nn.Parameter], shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, requires_grad: bool
) -> nn.Parameter:
    return kind(torch.empty_strided(shape, stride, dtype=dtype, device="meta"), requires_grad)


class _ViewPickler(pickling.Pickler):
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        self._positions: dict[int, int] = {}
        self.datasets: list[Dataset[Any]] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Dataset) or isinstance(obj, Subset | ConcatDataset):
            return None
        if id(obj) not in self._positions:
            self._positions[id(obj)] = len(self.datasets)
            self.datasets.append(obj)
        return self._positions[id(obj)]


class _ViewUnpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, leaves: list[Any]) -> None:
        super().__init__(buffer)
        self._leaves = leaves

    def persistent_load(self, pid: Any) -> Any:
        return self._leaves[pid]
