"""What of a strategy changes while it trains: fingerprints of attributes, and of all that its datasets draw from."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import cloudpickle
import numpy as np
import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.benchmarks.utils.flat_data import LazyIndices
from avalanche.logging import BaseLogger
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from distributed_eg.runtime.shipping import PICKLE_ERRORS

Tokens = Mapping[int, str]
"""What stands for objects, by their id, wherever an attribute refers to them: they are compared on their own."""


def is_plain(value: Any) -> bool:
    """Whether a value can never change itself, so that it can be put back without asking who else holds it."""
    if type(value) is tuple:
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, np.generic)


def fingerprint(value: Any, tokens: Tokens) -> str | None:
    """A hash of what ``value`` would be pickled to; None where it cannot be pickled, and so cannot be compared."""
    if is_plain(value):
        return f"{type(value).__name__} {value!r}"
    digest = hashlib.sha256()
    try:
        _Fingerprinter(digest, tokens).dump(value)
    except (*PICKLE_ERRORS, OSError, RecursionError):
        return None
    return digest.hexdigest()


def parts_of_data(value: Any) -> list[Any]:
    """The leaf datasets, transforms, samplers and generators that ``value`` reads from: every object behind Avalanche's
    views and torch's loaders, which themselves only cache.

    Raises:
        pickle.PicklingError: and others of ``PICKLE_ERRORS``, where ``value`` cannot be looked through.
    """
    finder = _PartFinder()
    finder.dump(value)
    return finder.parts


class _Hash:
    """A file that forgets what is written to it, but for its hash."""

    def __init__(self, digest: Any) -> None:
        self._digest = digest

    def write(self, data: Any) -> int:
        if self._digest is not None:
            self._digest.update(data)
        return len(data)


class _Fingerprinter(cloudpickle.Pickler):
    """Hashes instead of writing; large arrays are hashed where they lie."""

    def __init__(self, digest: Any, tokens: Tokens) -> None:
        super().__init__(_Hash(digest), protocol=5, buffer_callback=lambda buffer: digest.update(buffer.raw()))
        self._tokens = tokens

    def reducer_override(self, obj: Any) -> Any:
        token = self._tokens.get(id(obj))
        if token is not None:
            return _stand_in, (token,)
        if isinstance(obj, BaseLogger):
            return _stand_in, ("logger",)
        if isinstance(obj, DataAttribute | LazyIndices):
            return _stand_in, (type(obj).__name__,)
        if isinstance(obj, CLExperience):
            # Avalanche hands out copies of an experience, which differ in what their holder may look at.
            known = vars(obj)
            stream = getattr(known.get("_origin_stream"), "name", "")
            return _stand_in, ("experience", stream, known.get("current_experience"))
        if isinstance(obj, torch.Generator):
            return _stand_in, ("generator", obj.get_state())
        if type(obj) in (Tensor, torch.nn.Parameter) and obj.layout is torch.strided and not obj.is_quantized:
            data = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return _stand_in, ("tensor", str(obj.dtype), tuple(obj.shape), hashlib.sha256(data).hexdigest())
        return super().reducer_override(obj)


class _PartFinder(cloudpickle.Pickler):
    """Goes through views and loaders and collects what lies behind them."""

    def __init__(self) -> None:
        super().__init__(_Hash(None), protocol=5, buffer_callback=lambda _buffer: None)
        self._found: dict[int, Any] = {}

    @property
    def parts(self) -> list[Any]:
        return list(self._found.values())

    def reducer_override(self, obj: Any) -> Any:
        if obj is _stand_in or isinstance(obj, type) or _is_view(obj):
            return super().reducer_override(obj)
        if isinstance(obj, DataAttribute | LazyIndices):
            return _stand_in, (type(obj).__name__,)
        self._found[id(obj)] = obj
        return _stand_in, ("part",)


def _is_view(obj: Any) -> bool:
    """Whether it belongs to Avalanche, to torch's loaders or to Python, and only leads to other objects."""
    if isinstance(obj, Dataset) and not isinstance(obj, Subset | ConcatDataset):
        return False
    kind = obj if isinstance(obj, FunctionType) else type(obj)
    room = (kind.__module__ or "").partition(".")[0]
    if isinstance(obj, Subset | ConcatDataset | DataLoader | Sampler):
        return room in ("torch", "avalanche")
    return room in ("avalanche", "collections", "builtins")


def _stand_in(*what: Any) -> Any:
    """Never called: nothing that is pickled here is read again."""
    raise pickle.UnpicklingError(f"{what} stands for something else")
