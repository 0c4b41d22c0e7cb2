"""How a user's strategy travels to a worker: everything in one pickle, but for what the worker has of its own.

Parameters and modules of the root network become their names, and on the worker the expert's of the same name; the
model, the evaluator and the clock become placeholders; loggers stay on the driver.
"""

from __future__ import annotations

import io
import pickle
import threading
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import psutil
import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from torch import Tensor, nn

from distributed_eg.errors import InputError
from distributed_eg.runtime.pickling import Pickler, dump, load
from distributed_eg.strategy.avalanche_types import Metric, Template
from distributed_eg.strategy.metrics import COMPARING
from distributed_eg.strategy.training.expert_loop import ExpertLoop
from distributed_eg.strategy.training.recording import RecordingLogger, heard_by

PackedMetric: TypeAlias = tuple[str, bytes]
"""A metric's name, for errors, and its pickle."""
FreshMetrics: TypeAlias = Sequence[tuple[Metric, PackedMetric | None]]

_MADE_ANEW: Mapping[type, Callable[[], object]] = {
    type(threading.Lock()): threading.Lock,
    type(threading.RLock()): threading.RLock,
    psutil.Process: psutil.Process,
}

_DEVICE = object()
"""Stands for the expert's device in a pickle."""


@dataclass(frozen=True)
class PackedStrategy:
    """A strategy as bytes: its class and its state, and the evaluator's metrics one by one (None: cannot travel)."""

    parts: tuple[tuple[str, str], ...]
    """What ``state`` holds behind the class, in its order: an attribute's name, a plugin's being "plugins", and what
    errors call it."""
    state: bytes
    metrics: tuple[PackedMetric | None, ...]
    collect_all: bool
    """The evaluator's own: whether it keeps every value."""
    heard: frozenset[str]
    """The callbacks that the evaluator's loggers act on."""


def pack(strategy: Template, driver_only: Container[str], fresh_metrics: FreshMetrics) -> PackedStrategy:
    """Pickle ``strategy`` without its attributes in ``driver_only``; ``fresh_metrics`` are what ``pack_metrics`` gave.

    Raises:
        InputError: a plugin, the criterion, or an attribute of a subclass, cannot be pickled; it is named.
    """
    state = {name: value for name, value in lasting_state(strategy).items() if name not in driver_only}
    own = f"of the strategy {type(strategy).__name__}"
    parts = [("plugins", f"The plugin {type(plugin).__name__}", plugin) for plugin in state.pop("plugins")]
    parts += [(name, f"The attribute {name!r} {own}", value) for name, value in state.items()]
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, strategy)
    # One pickle after the other, of one pickler: what several of them refer to stays one object.
    dump(pickler, type(strategy), f"The class {own}")
    for _, what, value in parts:
        dump(pickler, value, what)
    known = {id(metric): packed for metric, packed in fresh_metrics}
    evaluator = strategy.evaluator
    metrics = tuple(known[id(m)] if id(m) in known else _pack_metric(strategy, m) for m in evaluator.metrics)
    named = tuple((name, what) for name, what, _ in parts)
    return PackedStrategy(named, buffer.getvalue(), metrics, evaluator.collect_all, heard_by(evaluator.loggers))


def lasting_state(strategy: Template) -> dict[str, Any]:
    """A strategy's attributes, but what an interrupted loop left behind: no part of it, and maybe whole datasets."""
    passing = {name: None for name in ("experience", "adapted_dataset", "mbatch", "mb_output")}
    return {**vars(strategy), **passing, "dataloader": [], "current_eval_stream": [], "is_training": False}


def pack_metrics(strategy: Template) -> FreshMetrics:
    """Each metric of the evaluator with its pickle as it is now: made when the strategy is, before a metric has seen
    anything, so that every expert starts with metrics that remember no other task."""
    return [(metric, _pack_metric(strategy, metric)) for metric in strategy.evaluator.metrics]


def _pack_metric(strategy: Template, metric: Metric) -> PackedMetric | None:
    if isinstance(metric, COMPARING):
        return None
    buffer, what = io.BytesIO(), f"The metric {type(metric).__name__}"
    try:
        dump(_MetricPickler(buffer, strategy), metric, what)
    except InputError as error:
        warnings.warn(f"{what} stays silent in training. {error}", stacklevel=4)
        return None
    return what, buffer.getvalue()


def unpack(
    packed: PackedStrategy, model: nn.Module, expert: nn.Module, clock: Clock
) -> tuple[ExpertLoop, RecordingLogger]:
    """The strategy on the worker, around ``model`` and the parameters of ``expert``, and what logs its training.

    Raises:
        InputError: a part of it cannot be made here; it is named.
    """
    # There before anything is loaded: all of it may refer to them.
    strategy, evaluator = ExpertLoop.__new__(ExpertLoop), EvaluationPlugin.__new__(EvaluationPlugin)
    own = {"model": model, "clock": clock, "logger": None, "strategy": strategy, "evaluator": evaluator}
    own["device"] = next(expert.parameters()).device
    unpickler = _Unpickler(packed.state, own, expert)
    strategy.__class__ = load(unpickler.load, "The class of the strategy")
    metrics = [None if m is None else load(_Unpickler(m[1], own, expert).load, m[0]) for m in packed.metrics]
    recorder = RecordingLogger(metrics, packed.heard)
    travelled = [metric for metric in metrics if metric is not None]
    evaluator.__init__(*travelled, loggers=[recorder], collect_all=packed.collect_all)  # type: ignore[misc]
    state = vars(strategy)
    state["plugins"] = plugins = []
    for name, what in packed.parts:
        value = load(unpickler.load, what)
        if name == "plugins":
            plugins.append(value)
        else:
            state[name] = value
    return strategy, recorder


class _Pickler(Pickler):
    def __init__(self, buffer: io.BytesIO, strategy: Template) -> None:
        super().__init__(buffer)
        root = strategy.model.get_submodule("expert")
        self._names: dict[int, tuple[str, str]] = {
            id(strategy): ("own", "strategy"),
            id(strategy.model): ("own", "model"),
            id(strategy.evaluator): ("own", "evaluator"),
            id(strategy.clock): ("own", "clock"),
            id(_DEVICE): ("own", "device"),
            **{id(parameter): ("parameter", name) for name, parameter in root.named_parameters()},
            **{id(module): ("module", name) for name, module in root.named_modules()},
        }

    def persistent_id(self, obj: object) -> tuple[str, str] | None:
        if isinstance(obj, BaseLogger):
            return ("own", "logger")
        return self._names.get(id(obj))

    def reduce_from_card(self, tensor: Tensor) -> Any:
        """What was on a card is where the expert is, when it is used."""
        made = super().reduce_from_card(tensor)
        return _on_device, (made[:2], _DEVICE)


def _on_device(made: tuple[Callable[..., Tensor], Sequence[Any]], device: torch.device) -> Tensor:
    """A tensor, made by a function of arguments, on a device."""
    tensor = made[0](*made[1])
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


class _MetricPickler(_Pickler):
    """A metric that measures in a thread holds a lock and its process: on the worker it gets new ones."""

    def reducer_override(self, obj: object) -> Any:
        make = _MADE_ANEW.get(type(obj))
        return super().reducer_override(obj) if make is None else (make, ())


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, own: Mapping[str, object], expert: nn.Module) -> None:
        super().__init__(io.BytesIO(data))
        self._own = own
        self._expert = expert

    def persistent_load(self, pid: tuple[str, str]) -> object:
        kind, name = pid
        if kind == "own":
            return self._own[name]
        return self._expert.get_parameter(name) if kind == "parameter" else self._expert.get_submodule(name)
