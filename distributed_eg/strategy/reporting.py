"""Publishes the method's metrics through the user's evaluator, whatever metrics that holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin

from distributed_eg.strategy.metrics import own_metrics

_CALLBACKS = frozenset({"before_eval", "before_eval_exp", "after_eval_iteration", "after_eval_exp", "after_eval"})


class GateReporter(SupervisedPlugin):
    """Drives those of the method's metrics that ``evaluator`` lacks in front of it; it logs what they publish with its
    own next values."""

    def __init__(self, evaluator: EvaluationPlugin) -> None:
        super().__init__()
        named = {str(metric) for metric in evaluator.metrics}
        self._metrics = [metric for metric in own_metrics() if str(metric) not in named]

    def __getattribute__(self, name: str) -> Any:
        return _publisher(self, name) if name in _CALLBACKS else super().__getattribute__(name)


def _publisher(reporter: GateReporter, callback: str) -> Callable[..., None]:
    def publish(strategy: Any, *_: Any, **__: Any) -> None:
        experience = strategy.experience
        if experience is not None:
            strategy.experience = experience.logging()
        try:
            for metric in reporter._metrics:
                for value in getattr(metric, callback)(strategy) or []:
                    strategy.evaluator.publish_metric_value(value)
        finally:
            strategy.experience = experience

    return publish
