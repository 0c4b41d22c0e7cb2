"""Metrics of training: recorded on the worker by a logger that takes every callback, replayed on the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial

from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metric_results import AlternativeValues, MetricType, MetricValue
from avalanche.logging import BaseLogger

from distributed_eg.strategy.avalanche_types import Template

_TASK_LEVEL = ("before_training", "before_training_exp", "after_training_exp", "after_training")
# Loggers and the clock act on these even where no metric speaks.
_LEVELS = ("training", "training_exp", "training_epoch", "eval", "eval_exp")
_ALWAYS = {f"{when}_{level}" for when in ("before", "after") for level in _LEVELS}
_ALWAYS |= {"after_training_iteration", "after_eval_iteration"}
_CALLBACKS = frozenset(name for name in dir(SupervisedPlugin) if name.startswith(("before_", "after_")))


@dataclass(frozen=True, slots=True)
class RecordedValue:
    """A metric value; ``metric`` is the position of its metric in the evaluator, −1 where it is no metric's."""

    metric: int
    name: str
    value: MetricType | AlternativeValues
    x: int


@dataclass(frozen=True, slots=True)
class RecordedCallback:
    """One callback and the values that came with it; ``num_batches`` is the length of the epoch's loader."""

    callback: str
    values: tuple[RecordedValue, ...]
    num_batches: int
    measured: int = -1
    """Which of the task's evaluations is measured; −1: none, the expert trains."""


KEPT = tuple(RecordedCallback(callback, (), 0) for callback in _TASK_LEVEL)
"""What is replayed of a task that an earlier driver trained: nobody kept its values, but metrics that compare tasks,
and the clock, have to know that it was there."""


def heard_by(loggers: Iterable[object]) -> frozenset[str]:
    """The callbacks that one of the loggers acts on: it has them, and not Avalanche's own, which do nothing."""
    methods = ((name, getattr(logger, name, None)) for logger in loggers for name in _CALLBACKS)
    return frozenset(n for n, method in methods if method and getattr(method, "__module__", "") != "avalanche.core")


class RecordingLogger(BaseLogger):
    """Keeps the callbacks that bring values or that somebody acts on, in order."""

    def __init__(self, metrics: Sequence[object], heard: frozenset[str]) -> None:
        super().__init__()
        self.records: list[RecordedCallback] = []
        self.positions = {id(metric): position for position, metric in enumerate(metrics)}
        self.evaluations: Mapping[tuple[str, int], int] = {}
        """Where an experience stands among the task's evaluations, by stream and index."""
        self._kept = _ALWAYS | heard
        self._alike: dict[RecordedCallback, RecordedCallback] = {}

    def log_single_metric(self, name: str, value: object, x_plot: int) -> None:
        """Nothing: values come with their callback."""

    def __getattribute__(self, name: str) -> object:
        is_callback = name.startswith(("before_", "after_"))
        return partial(self._record, name) if is_callback else super().__getattribute__(name)

    def _record(self, callback: str, strategy: Template, values: Sequence[MetricValue], **_: object) -> None:
        if not values and callback not in self._kept:
            return
        of, loader, experience = self.positions, strategy.dataloader, strategy.experience
        kept = tuple(RecordedValue(of.get(id(v.origin), -1), v.name, v.value, v.x_plot) for v in values)
        measured = -1
        if experience is not None and not strategy.is_training:
            measured = self.evaluations.get((experience.origin_stream.name, experience.current_experience), -1)
        record = RecordedCallback(callback, kept, len(loader) if isinstance(loader, Sized) else 0, measured)
        # Those without values are one object: a long log of them is short on its way to the driver.
        self.records.append(record if kept else self._alike.setdefault(record, record))


def replay(
    strategy: Template, records: Sequence[RecordedCallback], trained: CLExperience, evaluations: Sequence[CLExperience]
) -> None:
    """Publish recorded values through the user's evaluator, at the driver's position, and tell its loggers.

    They see the experience that was ``trained``, or the one of the task's ``evaluations`` that was measured.

    The driver's own metrics also get the four task-level callbacks, so that what they remember of the sequence
    (forgetting, transfer) stays right; what they would emit there was emitted on the worker already.
    """
    evaluator, offset = strategy.evaluator, strategy.clock.train_iterations
    metrics = [*evaluator.metrics, None]  # at −1 what stands for no metric
    for record in records:
        strategy.dataloader = range(record.num_batches)
        strategy.is_training = "_eval" not in record.callback
        strategy.experience = trained if record.measured < 0 else evaluations[record.measured]
        if record.callback in _TASK_LEVEL:
            for metric in evaluator.metrics:
                getattr(metric, record.callback, lambda _strategy: None)(strategy)
        if evaluator.active:
            values = [
                MetricValue(metrics[v.metric], v.name, v.value, v.x + offset)  # type: ignore[arg-type]  # None: no one's
                for v in record.values
            ]
            for value in values:
                evaluator.publish_metric_value(value)
            for logger in evaluator.loggers:
                logger.log_metrics(values)
                if hasattr(logger, record.callback):
                    getattr(logger, record.callback)(strategy, values)
            evaluator._metric_values = []
        if hasattr(strategy.clock, record.callback):
            getattr(strategy.clock, record.callback)(strategy)
