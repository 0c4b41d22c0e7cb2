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

import cloudpickle
import psutil
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from torch import nn

from distributed_eg.errors import InputError
from distributed_eg.runtime.shipping import PICKLE_ERRORS
from distributed_eg.strategy.avalanche_types import Metric, Template
from distributed_eg.strategy.metrics import COMPARING
from distributed_eg.strategy.training.expert_loop import ExpertLoop
from distributed_eg.strategy.training.recording import RecordingLogger, heard_by

FreshMetrics: TypeAlias = Sequence[tuple[Metric, bytes | None]]

_MADE_ANEW: Mapping[type, Callable[[], object]] = {
    type(threading.Lock()): threading.Lock,
    type(threading.RLock()): threading.RLock,
    psutil.Process: psutil.Process,
}


@dataclass(frozen=True)
class PackedStrategy:
    """A strategy as bytes: its class, its state, and the evaluator's metrics one by one (None: cannot travel)."""

    cls: bytes
    state: bytes
    metrics: tuple[bytes | None, ...]
    collect_all: bool
    """The evaluator's own: whether it keeps every value."""
    heard: frozenset[str]
    """The callbacks that the evaluator's loggers act on."""


def pack(strategy: Template, driver_only: Container[str], fresh_metrics: FreshMetrics) -> PackedStrategy:
    """Pickle ``strategy`` without its attributes in ``driver_only``; ``fresh_metrics`` are what ``pack_metrics`` gave.

    Raises:
        InputError: a plugin, or an attribute of a subclass, cannot be pickled; it is named.
    """
    state = {name: value for name, value in vars(strategy).items() if name not in driver_only}
    # What an interrupted loop left behind is no part of the strategy, and may be whole datasets.
    state |= {name: None for name in ("experience", "adapted_dataset", "mbatch", "mb_output")}
    state |= {"dataloader": [], "current_eval_stream": [], "is_training": False}
    try:
        packed_class, packed_state = cloudpickle.dumps(type(strategy)), _dump(state, strategy)
    except PICKLE_ERRORS as error:
        raise InputError(_why_it_cannot_travel(strategy, state, error)) from error
    known = {id(metric): packed for metric, packed in fresh_metrics}
    evaluator = strategy.evaluator
    metrics = tuple(known[id(m)] if id(m) in known else _pack_metric(strategy, m) for m in evaluator.metrics)
    return PackedStrategy(packed_class, packed_state, metrics, evaluator.collect_all, heard_by(evaluator.loggers))


def pack_metrics(strategy: Template) -> FreshMetrics:
    """Each metric of the evaluator with its pickle as it is now: made when the strategy is, before a metric has seen
    anything, so that every expert starts with metrics that remember no other task."""
    return [(metric, _pack_metric(strategy, metric)) for metric in strategy.evaluator.metrics]


def _pack_metric(strategy: Template, metric: Metric) -> bytes | None:
    if isinstance(metric, COMPARING):
        return None
    try:
        return _dump(metric, strategy, _MetricPickler)
    except PICKLE_ERRORS as error:
        warnings.warn(f"The metric {metric} stays silent in training: it cannot travel ({error}).", stacklevel=4)
        return None


def unpack(
    packed: PackedStrategy, model: nn.Module, expert: nn.Module, clock: Clock
) -> tuple[ExpertLoop, RecordingLogger]:
    """The strategy on the worker, around ``model`` and the parameters of ``expert``, and what logs its training."""
    # The class comes first: metrics and state may refer to the strategy itself.
    cls = pickle.loads(packed.cls)
    strategy: ExpertLoop = cls.__new__(cls)
    own: dict[str, object] = {"model": model, "clock": clock, "logger": None, "strategy": strategy}
    metrics = [None if metric is None else _Unpickler(metric, own, expert).load() for metric in packed.metrics]
    recorder = RecordingLogger(metrics, packed.heard)
    travelled = [metric for metric in metrics if metric is not None]
    own["evaluator"] = EvaluationPlugin(*travelled, loggers=[recorder], collect_all=packed.collect_all)
    vars(strategy).update(_Unpickler(packed.state, own, expert).load())
    return strategy, recorder


class _Pickler(cloudpickle.Pickler):
    def __init__(self, buffer: io.BytesIO, strategy: Template) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        root = strategy.model.get_submodule("expert")
        self._names: dict[int, tuple[str, str]] = {
            id(strategy): ("own", "strategy"),
            id(strategy.model): ("own", "model"),
            id(strategy.evaluator): ("own", "evaluator"),
            id(strategy.clock): ("own", "clock"),
            **{id(parameter): ("parameter", name) for name, parameter in root.named_parameters()},
            **{id(module): ("module", name) for name, module in root.named_modules()},
        }

    def persistent_id(self, obj: object) -> tuple[str, str] | None:
        if isinstance(obj, BaseLogger):
            return ("own", "logger")
        return self._names.get(id(obj))


class _MetricPickler(_Pickler):
    """A metric that measures in a thread holds a lock and its process: on the worker it gets new ones."""

    def reducer_override(self, obj: object) -> Any:
        make = _MADE_ANEW.get(type(obj))
        return super().reducer_override(obj) if make is None else (make, ())


def _dump(value: object, strategy: Template, pickler: type[_Pickler] = _Pickler) -> bytes:
    buffer = io.BytesIO()
    pickler(buffer, strategy).dump(value)
    return buffer.getvalue()


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


def _why_it_cannot_travel(strategy: Template, state: Mapping[str, object], error: Exception) -> str:
    """Which plugin, or which attribute of the strategy, stopped the pickle."""
    plugins: Sequence[object] = strategy.plugins  # Avalanche's evaluator is one of them, but no BasePlugin
    owners = [
        (f"plugin {type(plugin).__name__}", getattr(plugin, "__dict__", {}), " Make it in before_training instead.")
        for plugin in plugins
        if plugin is not strategy.evaluator
    ]
    owners.append((f"strategy {type(strategy).__name__}", {n: v for n, v in state.items() if n != "plugins"}, ""))
    for owner, attributes, remedy in owners:
        for name, value in attributes.items():
            try:
                _dump(value, strategy)
            except PICKLE_ERRORS:
                return (
                    f"The {owner} cannot travel to a worker: its attribute {name!r} ({type(value).__name__}) cannot be "
                    f"pickled: {error}.{remedy}"
                )
    return f"The strategy {type(strategy).__name__} cannot travel to a worker: {error}."
