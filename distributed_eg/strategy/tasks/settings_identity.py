"""What tells one run's settings from another's, as JSON values that are the same in every process."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from distributed_eg.strategy.avalanche_types import Template
from distributed_eg.strategy.metrics import GateReporter


def settings_identity(
    strategy: Template, *, on_repeat: str, reference: object, added: Mapping[str, object]
) -> dict[str, object]:
    """What decides how experts train and is not in ``MethodConfig``, as JSON values; read before training begins.

    Objects count by their class; criterion and plugins by their public attributes too, learning rate schedulers and
    dataclasses by all of theirs. ``reference`` is its ``reference_identity``; ``added`` are the public attributes that
    a subclass of the strategy gave it.
    """
    own = (strategy.evaluator, strategy.clock, strategy._criterion)
    names = {id(parameter): name for name, parameter in strategy.model.named_parameters()}
    plugins = [plugin for plugin in strategy.plugins if not any(plugin is other for other in own)]
    return {
        "strategy": {"class": named(type(strategy)), **plain_values(added)},
        **plain_values({name: getattr(strategy, name) for name in ("train_mb_size", "train_epochs", "eval_every")}),
        "peval_mode": ", ".join(plugin.peval_mode for plugin in plugins if isinstance(plugin, PeriodicEval)),
        "on_repeat": on_repeat,
        "optimizer": {
            "class": named(type(strategy.optimizer)),
            "groups": [
                plain_values({name: value for name, value in group.items() if name != "params"})
                | {"params": json_sha256([names.get(id(parameter), "another's") for parameter in group["params"]])}
                for group in strategy.optimizer.param_groups
            ],
        },
        "criterion": _object(strategy._criterion),
        "reference": reference,
        "plugins": [_object(plugin) for plugin in plugins if not isinstance(plugin, PeriodicEval | GateReporter)],
    }


def plain_values(values: Mapping[str, object]) -> dict[str, object]:
    """Named settings, such as loader arguments, as JSON values: arrays by sha256, objects by their class."""
    return {name: plain(value) for name, value in values.items()}


def plain(value: object) -> object:
    """A value as JSON: plain ones as they are, arrays by sha256, objects by their class."""
    if isinstance(value, enum.Enum):
        return f"{named(type(value))}.{value.name}"
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray | np.generic):
        number = value.item() if value.ndim == 0 and not (isinstance(value, Tensor) and value.is_meta) else None
        return number if isinstance(number, bool | int | float | str) else array_sha256(value)
    if isinstance(value, Mapping):
        return {name if isinstance(name, str) else json.dumps(plain(name)): plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=json.dumps)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, torch.device | torch.dtype):
        return str(value)
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return _object(value) if is_data or isinstance(value, LRScheduler | partial) else named(value)


def named(value: object) -> str:
    """Qualified name of a class or function, or of an object's class; never an address."""
    name = getattr(value, "__qualname__", None)
    if not isinstance(name, str):
        value, name = type(value), type(value).__qualname__
    return f"{getattr(value, '__module__', None) or 'builtins'}.{name}"


def array_sha256(value: Tensor | npt.NDArray[np.generic] | np.generic) -> str:
    """sha256 of dtype, shape and bytes."""
    if isinstance(value, Tensor):
        dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    kind = value.dtype if isinstance(value, Tensor) else value.dtype.str
    return hashlib.sha256(f"{kind} {tuple(value.shape)}\n".encode() + flat.tobytes()).hexdigest()


def json_sha256(value: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _object(value: object) -> dict[str, object]:
    """Class and public attributes of an object, all of a scheduler's; of a module its weights and children too."""
    # A dataclass with slots keeps its fields in no ``__dict__``.
    slots = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    attributes = getattr(value, "__dict__", None) or {field.name: getattr(value, field.name) for field in slots}
    private = isinstance(value, LRScheduler)
    described = plain_values({name: v for name, v in attributes.items() if private or not name.startswith("_")})
    if isinstance(value, partial):
        described |= {"func": _object(value.func), "args": plain(value.args), "keywords": plain(value.keywords)}
    if isinstance(value, nn.Module):
        for weights in (value.named_parameters(recurse=False), value.named_buffers(recurse=False)):
            described |= {name: array_sha256(tensor) for name, tensor in weights}
        described |= {name: _object(child) for name, child in value.named_children()}
    return {"class": named(value), **described}
