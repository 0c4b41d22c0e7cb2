"""The method's own metrics, as Avalanche plugin metrics: gate, expert given the right task, and end to end."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from avalanche.evaluation.metric_definitions import GenericPluginMetric
from avalanche.evaluation.metrics.mean import Mean
from torch import Tensor

Quantity = Literal["Gate_Acc", "Expert_Acc", "EndToEnd_Acc"]
QUANTITIES: tuple[Quantity, ...] = ("Gate_Acc", "Expert_Acc", "EndToEnd_Acc")


class RoutedBatch(NamedTuple):
    """What the gate did with the current evaluation mini-batch; every tensor has one row a sample."""

    tasks: Tensor
    """The task whose expert answered."""
    right_tasks: Tensor
    """The task that the sample belongs to; −1 where no trained task does."""
    confidences: Tensor
    """The gate's confidence in its choice."""
    expert_predictions: Tensor
    """The class id that the right task's expert predicts; −1 where there is none."""


class RoutingMetric(GenericPluginMetric[float, Mean]):
    """The mean of one quantity over an evaluated experience, or over the stream.

    ``Gate_Acc``: the gate chose the right task. ``Expert_Acc``: the right task's expert predicts the right class
    (oracle gate). ``EndToEnd_Acc``: both the gate and its expert are right; a sample sent to the wrong expert is wrong
    even when the class id happens to match. Samples of tasks that were never trained count as wrong.
    """

    def __init__(self, quantity: Quantity, level: Literal["experience", "stream"]) -> None:
        super().__init__(Mean(), reset_at=level, emit_at=level, mode="eval")
        self.quantity = quantity
        self.level = level

    def update(self, strategy: Any) -> None:
        """Take the current mini-batch in."""
        routed: RoutedBatch | None = getattr(strategy, "routed", None)
        if routed is None:
            return
        targets, predictions = strategy.mb_y.cpu(), strategy.mb_output.argmax(1).cpu()
        if self.quantity == "Gate_Acc":
            right = routed.tasks == routed.right_tasks
        elif self.quantity == "Expert_Acc":
            right = routed.expert_predictions == targets
        else:
            right = (routed.tasks == routed.right_tasks) & (predictions == targets)
        self._metric.update(right.double().mean().item(), len(right))

    def _package_result(self, strategy: Any) -> Any:
        # Where nothing was routed (an evaluation inside an expert's training) there is nothing to say.
        return super()._package_result(strategy) if self._metric.weight > 0 else None

    def __str__(self) -> str:
        return f"{self.quantity}_{'Exp' if self.level == 'experience' else 'Stream'}"


def gate_metrics(*, experience: bool = True, stream: bool = True) -> list[RoutingMetric]:
    """The method's metrics, each per experience and for the stream as asked.

    ``ExpertGateStrategy.eval`` reports them whatever the evaluator holds; put them into your own ``EvaluationPlugin``
    to place them among your metrics.
    """
    levels: list[Literal["experience", "stream"]] = []
    if experience:
        levels.append("experience")
    if stream:
        levels.append("stream")
    return [RoutingMetric(quantity, level) for quantity in QUANTITIES for level in levels]
