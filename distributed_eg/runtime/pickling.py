"""One pickler for all that a user makes and a worker needs: what Python can pickle travels; what cannot is named."""

from __future__ import annotations

import io
import pickle
import pkgutil
import sys
from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any, TypeVar

import cloudpickle
from torch import Tensor

from distributed_eg.errors import ExpertGateError, InputError, told

T = TypeVar("T")

_SEND_MODULES = (
    " What a module defines travels by name, so every worker must find the same module: install it on all nodes, or "
    "send it along, by ray.init(runtime_env={'py_modules': [...]} or {'working_dir': ...}) before training, or by "
    "cloudpickle.register_pickle_by_value(module)."
)
_TRAVEL = ("cpu", "meta")
"""Devices that every process has."""
_LONGEST = 10
"""So many steps to what cannot be pickled are named; of more, the first and the last."""


class Pickler(cloudpickle.Pickler):
    """cloudpickle's, with tensors moved to the CPU, for who unpickles them may have no accelerator, or fewer.

    It also takes modules that are no plain ones, such as ``torch.ops``, by their names: cloudpickle finds them by
    itself, as to it every attribute name in a function's code may be a submodule of what is imported.
    """

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)

    def reducer_override(self, obj: object) -> Any:
        """How ``obj`` is pickled; NotImplemented: as any pickler does."""
        if isinstance(obj, ModuleType) and type(obj) is not ModuleType:
            return pkgutil.resolve_name, (obj.__name__,)
        if obj is sys.stdout or obj is sys.stderr:  # a notebook has its own, of classes that cloudpickle does not know
            return getattr, (sys, "stdout" if obj is sys.stdout else "stderr")
        if type(obj) is Tensor and obj.device.type not in _TRAVEL:  # parameters are pickled as such ones
            return self.reduce_from_card(obj)
        return super().reducer_override(obj)

    def reduce_from_card(self, tensor: Tensor) -> Any:
        """How a tensor on an accelerator is pickled: as one on the CPU."""
        return tensor.detach().cpu().requires_grad_(tensor.requires_grad).__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def dump(pickler: Pickler, value: object, what: str) -> None:
    """Pickle ``value``, which errors call ``what``.

    Raises:
        InputError: something in it cannot be pickled; the message says where it is.
    """
    try:
        pickler.dump(value)
    except Exception as error:  # users' objects raise what they like
        raise InputError(
            f"{what} cannot be sent to a worker: {_where(pickler, value, error)}{told(error)}. Make such a thing on "
            "the worker, when it is first used (a plugin: in before_training), or leave it out in __getstate__."
        ) from error


def dumps(value: object, what: str, pickler: type[Pickler] = Pickler) -> bytes:
    """The pickle of ``value``; raises as ``dump`` does."""
    buffer = io.BytesIO()
    dump(pickler(buffer), value, what)
    return buffer.getvalue()


def load(read: Callable[[], T], what: str) -> T:
    """What ``read`` unpickles, which errors call ``what``.

    Raises:
        InputError: it cannot be made here.
    """
    try:
        return read()
    except (ExpertGateError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # a module that is imported runs as a script, perhaps
        by_name = isinstance(error, ImportError | AttributeError)
        remedy = _SEND_MODULES if by_name else ""
        raise InputError(f"{what} cannot be made on a worker from what was sent: {told(error)}.{remedy}") from error


def _where(pickler: Pickler, value: object, error: Exception) -> str:
    """Which attribute of ``value`` raised ``error``; empty where it is the value itself, or cannot be found again."""
    tracer = _Tracer(pickler)
    try:
        tracer.dump(value)
    except Exception as found:
        trail = tracer.trail
        steps = [step for i in range(1, len(trail)) if (step := _step(trail, i))]
        if steps and isinstance(found, type(error) | type(error.__cause__)):
            shown = steps if len(steps) <= _LONGEST else [*steps[: _LONGEST // 2], "…", *steps[-_LONGEST // 2 :]]
            last, of = type(trail[-1]).__name__, type(value).__name__
            return f"attribute {'.'.join(shown)!r} of {of}, a {last}, cannot be pickled: "
    return ""


def _step(trail: list[Any], i: int) -> str:
    """What leads from ``trail[i - 1]`` to ``trail[i]``: a key, a position, a variable; empty for what pickles add."""
    parent, child = trail[i - 1], trail[i]
    if isinstance(parent, dict):
        return next((str(key) for key, value in parent.items() if value is child), "")
    if isinstance(child, CellType):
        function = next((obj for obj in reversed(trail[:i]) if isinstance(obj, FunctionType)), None)
        named = zip(function.__closure__ or (), function.__code__.co_freevars, strict=True) if function else ()
        return next((name for cell, name in named if cell is child), "")
    # A tuple right under an object is how it was taken apart.
    if isinstance(parent, list) or (isinstance(parent, tuple) and isinstance(trail[i - 2], dict | list | tuple)):
        return next((str(position) for position, item in enumerate(parent) if item is child), "")
    return ""


class _Nowhere(io.RawIOBase):
    """Takes what is written, and keeps nothing."""

    def write(self, data: Any, /) -> int:
        return len(data)


class _Tracer(pickle._Pickler):  # Python's own, which is slow, and can be followed
    """Pickles as ``pickler`` does, and knows the way to what it pickles now."""

    def __init__(self, pickler: Pickler) -> None:
        super().__init__(_Nowhere(), protocol=pickle.HIGHEST_PROTOCOL)
        self.dispatch_table = pickler.dispatch_table
        self.trail: list[Any] = []
        self._pickler = pickler

    def reducer_override(self, obj: Any) -> Any:
        return self._pickler.reducer_override(obj)

    def persistent_id(self, obj: Any) -> Any:
        identify = getattr(self._pickler, "persistent_id", None)  # a pickler has one where its class gives it one
        return None if identify is None else identify(obj)

    def save(self, obj: object, *args: Any, **kwargs: Any) -> None:
        self.trail.append(obj)
        super().save(obj, *args, **kwargs)  # type: ignore[misc]  # not in its stub
        self.trail.pop()  # not after an error: then it ends at the culprit
