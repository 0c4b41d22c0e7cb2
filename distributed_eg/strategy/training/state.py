"""What a checkpoint holds of an expert's training, and how that is put back.

It holds networks, optimizer, random generators and recorded metrics; plugins, metrics and schedulers by their own
``state_dict`` and ``load_state_dict``; the attributes of Avalanche's plugins, and those that a subclass gave the
strategy. A stage with a plugin or metric that lacks the two methods has no checkpoints.

Nobody looks for other changes from one epoch to the next, so these are not put back: plain attributes of modules; what
datasets, transforms and loaders remember or draw from generators of their own; that two attributes are one object.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from distributed_eg.runtime.messages import ExpertJob
from distributed_eg.store.checkpoints import encode
from distributed_eg.strategy.avalanche_types import Template
from distributed_eg.strategy.training.recording import RecordedCallback, RecordedValue

_LAYOUT = "layout 3"
"""Other than in any earlier version whose checkpoints held something else."""
_DONE_WITH = frozenset({"mbatch", "mb_output", "loss", "current_eval_stream", "_checkpointing"})
"""Attributes of the strategy that mean nothing between two epochs."""
_KEPT = frozenset(
    {"model", "optimizer", "optimized_param_id", "evaluator", "plugins", "method", "_answers"}
    | {"experience", "adapted_dataset", "dataloader", "_eval_streams"}
)
"""Attributes of the strategy that a retried stage makes again: nobody may replace them between two epochs."""
_FIXED = (
    *(type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, functools.partial),
    *(torch.device, torch.dtype, logging.Logger, Enum, PurePath),
)
"""Kinds of values that cannot change themselves, and need no storing as long as nobody replaces them."""
_REMEDY = (
    "give it state_dict() and load_state_dict() of tensors and plain values, empty ones where it keeps nothing from "
    "one epoch to the next"
)


class CannotResumeError(Exception):
    """A stage has state that a checkpoint cannot hold; the message names it."""


@runtime_checkable
class Stateful(Protocol):
    """What can be asked for its state."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Take what ``state_dict`` gave."""


class TrainingState:
    """All that a stage's training remembers from one epoch to the next; made before the first one.

    Raises:
        CannotResumeError: a checkpoint cannot hold it.
    """

    def __init__(self, job: ExpertJob, strategy: Template, records: list[RecordedCallback]) -> None:
        self._strategy, self._records, self._device = strategy, records, job.device
        evaluator, criterion = strategy.evaluator, strategy._criterion
        self._networks: dict[str, nn.Module] = {"model": strategy.model}
        members: Sequence[object] = strategy.plugins
        if isinstance(criterion, nn.Module) and not any(criterion is member for member in members):
            self._networks["criterion"] = criterion
        plugins = _named("plugin", [member for member in members if member is not evaluator])
        # Metrics of Avalanche and of this package reset themselves.
        metrics = [metric for metric in evaluator.metrics if not _is_of(metric, "avalanche.", "distributed_eg.")]
        self._members = plugins | _named("metric", metrics)
        kept = [value for name, value in vars(strategy).items() if name in _KEPT and value is not None]
        self._apart = {id(value) for value in (*kept, *self._networks.values(), *self._members.values())}
        self._owners: dict[str, object] = {}
        self._look_into(f"the strategy {type(strategy).__name__}", strategy)
        for name, plugin in plugins.items():
            if _is_of(plugin, "avalanche.") and not isinstance(plugin, Stateful):
                self._look_into(name, plugin)
        self._objects = self._look_at_objects()
        held = {path: value for path, value in self._attributes().items() if not self._is_fixed(value)}
        everyone = (self._members | held).items()
        self._stateful = {name: value for name, value in everyone if isinstance(value, Stateful)}
        if lacking := sorted(self._members.keys() - self._stateful.keys() - self._owners.keys()):
            raise CannotResumeError(f"{', '.join(lacking)} cannot be asked for state; {_REMEDY}")
        self._values()
        settings = getattr(strategy.dataloader, "loader_kwargs", None) or getattr(strategy.dataloader, "__dict__", {})
        if settings.get("persistent_workers") and settings.get("num_workers"):
            raise CannotResumeError("with persistent_workers=True the loader's processes draw on from epoch to epoch")
        streams = [f"{info.stream} {info.index}" for info, _ in job.data.evaluations]
        self.consists_of: list[str] = [_LAYOUT, *self._members, *self._owners, *self._stateful, *streams]
        """What tells whether a state belongs to this strategy; its settings and data are in the checkpoint's key."""

    def take(self) -> dict[str, Any]:
        """The state as it is now.

        Raises:
            CannotResumeError: a checkpoint cannot hold it.
        """
        before, now = self._objects, self._look_at_objects()
        for path in {**before, **now}:
            if path not in before or path not in now or before[path] is not now[path]:
                raise CannotResumeError(f"{path} comes, goes or is replaced between epochs")
        optimizer, evaluator = self._strategy.optimizer, self._strategy.evaluator
        _require_exact(optimizer)
        return {
            "consists of": self.consists_of,
            "networks": {name: _network_state(net) for name, net in self._networks.items()},
            "optimizer": optimizer.state_dict(),
            "states": {name: value.state_dict() for name, value in self._stateful.items()},
            "values": self._values(),
            "records": _pack_records(self._records),
            "metrics": {"active": evaluator.active, "last": list(evaluator.last_metric_results)},
            "random": _random_state(self._device),
        }

    def put_back(self, state: Mapping[str, Any]) -> None:
        """Make the training what it was when ``take`` gave ``state``."""
        for name, net in self._networks.items():
            _set_network(net, state["networks"][name])
        _set_optimizer(self._strategy.optimizer, state["optimizer"])
        for name, value in self._stateful.items():
            value.load_state_dict(state["states"][name])
        for path, value in state["values"].items():
            owner, _, name = path.rpartition(".")
            vars(self._owners[owner])[name] = value
        self._records[:] = _unpack_records(state["records"])
        _publish(self._strategy.evaluator, self._records, state["metrics"]["last"])
        self._strategy.evaluator.active = state["metrics"]["active"]
        _set_random(state["random"], self._device)

    def _look_into(self, path: str, owner: object) -> None:
        """Store the attributes of ``owner``, and of Avalanche's objects among them."""
        self._owners[path] = owner
        self._apart.add(id(owner))
        for name, value in vars(owner).items():
            if _is_of(value, "avalanche.") and not isinstance(value, Stateful) and not self._is_fixed(value):
                self._look_into(f"{path}.{name}", value)

    def _is_fixed(self, value: object) -> bool:
        return isinstance(value, _FIXED) or id(value) in self._apart

    def _attributes(self) -> dict[str, object]:
        return {
            f"{path}.{name}": value
            for path, owner in self._owners.items()
            for name, value in vars(owner).items()
            if owner is not self._strategy or name not in _DONE_WITH
        }

    def _look_at_objects(self) -> dict[str, object]:
        """What loading a state does not replace: members, layers, parameters, objects that attributes hold."""
        found: dict[str, object] = dict(self._members)
        for name, net in self._networks.items():
            found |= {f"{name} {path}": part for path, part in (*net.named_modules(), *net.named_parameters())}
            found |= {f"{name} {path}": None for path, _ in net.named_buffers()}
        for i, group in enumerate(self._strategy.optimizer.param_groups):
            found |= {f"parameter {j} of the optimizer's group {i}": p for j, p in enumerate(group["params"])}
        attributes = self._attributes().items()
        return found | {path: v for path, v in attributes if self._is_fixed(v) or isinstance(v, Stateful)}

    def _values(self) -> dict[str, object]:
        """Attributes that are stored as they are."""
        found = {path: value for path, value in self._attributes().items() if path not in self._objects}
        try:
            encode(found)
        except TypeError as error:
            raise CannotResumeError(f"{error}; {_REMEDY}") from error
        return found


def _named(role: str, members: Sequence[object]) -> dict[str, object]:
    return {f"the {role} {type(member).__name__} ({i})": member for i, member in enumerate(members)}


def _is_of(value: object, *rooms: str) -> bool:
    return type(value).__module__.startswith(rooms)


def _network_state(net: nn.Module) -> dict[str, Any]:
    """Also what a state dict leaves out: gradients that nobody cleared, buffers that are not kept, what is frozen or in
    evaluation mode."""
    state = net.state_dict()
    return {
        "state": state,
        "buffers": {name: buffer for name, buffer in net.named_buffers() if name not in state},
        "gradients": {name: p.grad for name, p in net.named_parameters() if p.grad is not None},
        "trained": {name: p.requires_grad for name, p in net.named_parameters()},
        "modes": {name: module.training for name, module in net.named_modules()},
    }


def _set_network(net: nn.Module, stored: dict[str, Any]) -> None:
    state = net.state_dict()
    state.update(stored["state"])  # not a plain dict: it knows the versions of the layers
    net.load_state_dict(state)
    buffers = dict(net.named_buffers())
    for name, value in stored["buffers"].items():
        buffers[name].copy_(value)
    for name, parameter in net.named_parameters():
        gradient: Tensor | None = stored["gradients"].get(name)
        parameter.requires_grad_(stored["trained"][name])
        parameter.grad = None if gradient is None else gradient.to(parameter.device)
    for name, module in net.named_modules():
        module.training = stored["modes"][name]


def _require_exact(optimizer: Optimizer) -> None:
    """Torch's own ``load_state_dict`` casts state to its parameter's type."""
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        return
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            tensors = isinstance(value, Tensor) and isinstance(parameter, Tensor)
            if tensors and name != "step" and parameter.is_floating_point() and value.dtype != parameter.dtype:
                kind = type(optimizer).__name__
                raise CannotResumeError(
                    f"{kind} keeps {name!r} as {value.dtype} for a parameter of {parameter.dtype}, and loads it as that"
                )


def _set_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load, but keep the groups that others may hold."""
    groups = optimizer.param_groups
    optimizer.load_state_dict(state)
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        group.clear()
        group.update(loaded)
    optimizer.param_groups = groups


def _publish(evaluator: EvaluationPlugin, records: Sequence[RecordedCallback], last: list[str]) -> None:
    """Give the evaluator back what it knew: plugins such as early stopping ask it for the ``last`` values."""
    evaluator.all_metric_results.clear()
    evaluator.last_metric_results = {}
    for record in records:
        for value in record.values:
            origin: Any = None  # nobody asks for the metric
            evaluator.publish_metric_value(MetricValue(origin, value.name, value.value, value.x))
    evaluator._metric_values = []
    evaluator.last_metric_results = {name: evaluator.last_metric_results[name] for name in last}


def _random_state(device: torch.device) -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def _set_random(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _pack_records(records: Sequence[RecordedCallback]) -> dict[str, Any]:
    """Records as columns: there is one for every iteration, and most are like the one before.

    Raises:
        TypeError: a value stands at an x that is no integer.
    """
    kinds: dict[tuple[Any, ...], int] = {}
    sequence: list[int] = []
    for record in records:
        values = tuple((value.metric, value.name, type(value.value) is float) for value in record.values)
        sequence.append(kinds.setdefault((record.callback, record.num_batches, record.measured, values), len(kinds)))
    everything = [value for record in records for value in record.values]
    for value in everything:
        if type(value.x) is not int:
            raise TypeError(f"a value of the metric {value.name!r} stands at x = {value.x!r}, which is no integer")
    others = [value for value in everything if type(value.value) is not float]
    return {
        "kinds": list(kinds),
        "sequence": torch.tensor(sequence, dtype=torch.int64),
        "xs": torch.tensor([value.x for value in everything], dtype=torch.int64),
        "floats": torch.tensor([v.value for v in everything if type(v.value) is float], dtype=torch.float64),
        "others": {f"{i} {value.name}": value.value for i, value in enumerate(others)},
    }


def _unpack_records(packed: dict[str, Any]) -> list[RecordedCallback]:
    xs, floats, others = iter(packed["xs"].tolist()), iter(packed["floats"].tolist()), iter(packed["others"].values())
    records = []
    for position in packed["sequence"].tolist():
        callback, num_batches, measured, kinds = packed["kinds"][position]
        values = (RecordedValue(m, name, next(floats if is_float else others), next(xs)) for m, name, is_float in kinds)
        records.append(RecordedCallback(callback, tuple(values), num_batches, measured))
    return records
