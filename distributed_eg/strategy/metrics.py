"""The method's own metrics: gate, expert given the right task, end to end; what reports them in any evaluator; and what
is different for Avalanche's metrics that compare tasks."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from avalanche.evaluation.metric_definitions import GenericPluginMetric, PluginMetric
from avalanche.evaluation.metric_results import MetricResult, MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from avalanche.evaluation.metrics.acc_matrix import AccuracyMatrixPluginMetric
from avalanche.evaluation.metrics.cumulative_accuracies import (
    CumulativeAccuracyPluginMetric,
    CumulativeForgettingPluginMetric,
)
from avalanche.evaluation.metrics.forgetting_bwt import GenericExperienceForgetting
from avalanche.evaluation.metrics.forward_transfer import GenericExperienceForwardTransfer
from avalanche.evaluation.metrics.mean import Mean
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor

from distributed_eg.errors import InputError
from distributed_eg.strategy.avalanche_types import LabelledDataset, Metric, Plugin, Template

Quantity = Literal["Gate_Acc", "Expert_Acc", "EndToEnd_Acc", "Gate_Confidence", "Gate_Unknown"]
Level = Literal["experience", "stream"]
_ALWAYS: tuple[Quantity, ...] = ("Gate_Acc", "Expert_Acc", "EndToEnd_Acc")

COMPARING = (
    *(GenericExperienceForgetting, GenericExperienceForwardTransfer, AccuracyMatrixPluginMetric),
    *(CumulativeAccuracyPluginMetric, CumulativeForgettingPluginMetric),
)
"""Metrics that compare tasks (backward transfer is a kind of forgetting, a stream's a kind of an experience's). Where
an expert trains there is no other task: they are silent there, and speak in ``eval``."""


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
    strangeness: Tensor
    """How strange the sample is to the tasks: above 1 it is unknown; NaN where that cannot be told."""
    heard: Tensor
    """Whether the right task's expert answered, alone or among several."""


def quantities(strategy: Template, routed: RoutedBatch) -> dict[Quantity, Tensor]:
    """Each quantity of every sample of the current evaluation mini-batch, (n,); NaN where it cannot be told."""
    targets, predictions = strategy.mb_y.cpu(), strategy.mb_output.argmax(1).cpu()
    return {
        "Gate_Acc": routed.tasks == routed.right_tasks,
        "Expert_Acc": routed.expert_predictions == targets,
        "EndToEnd_Acc": routed.heard & (predictions == targets),
        "Gate_Confidence": routed.confidences,
        "Gate_Unknown": (routed.strangeness > 1).double().where(~routed.strangeness.isnan(), torch.nan),
    }


class RoutingMetric(GenericPluginMetric[float, Mean]):
    """The mean of one quantity over an evaluated experience, or over the stream.

    ``Gate_Acc``: the gate chose the right task. ``Expert_Acc``: the right task's expert predicts the right class
    (oracle gate). ``EndToEnd_Acc``: the right task's expert answered, alone or among several, and the answer is right;
    a sample sent to the wrong expert is wrong even when the class id happens to match. Samples of tasks that were never
    trained count as wrong. ``Gate_Confidence``: the gate's confidence in the expert that it chose. ``Gate_Unknown``:
    the share of samples that are strange to every task; where these are not sent to the nearest expert, ``Gate_Acc`` is
    right about one that belongs to no trained task.
    """

    def __init__(self, quantity: Quantity, level: Level) -> None:
        super().__init__(Mean(), reset_at=level, emit_at=level, mode="eval")
        self.quantity = quantity
        self.level = level

    def update(self, strategy: Template) -> None:
        """Take the current mini-batch in."""
        routed: RoutedBatch | None = getattr(strategy, "routed", None)
        if routed is None:
            return
        values = quantities(strategy, routed)[self.quantity].double()
        if len(told := values[~values.isnan()]):
            self._metric.update(told.mean().item(), len(told))

    def _package_result(self, strategy: Template) -> MetricResult:
        # Where nothing was routed (an evaluation inside an expert's training) there is nothing to say.
        return super()._package_result(strategy) if self._metric.weight > 0 else None

    def __str__(self) -> str:
        return f"{self.quantity}_{'Exp' if self.level == 'experience' else 'Stream'}"


class GateConfusionMatrix(PluginMetric[Tensor]):
    """How often samples of one task went to the expert of another, over an evaluated stream.

    Its value is an int64 tensor (n, n) over the trained tasks, in the order of ``strategy.registry``: rows are the
    right tasks, columns the chosen ones. Samples that belong to no trained task are left out, and so are those that
    are strange to all and that no expert answered (``unknown="root"``, ``"abstain"``): ``Gate_Unknown`` counts them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[tuple[int, int]] = Counter()
        self._tasks: list[int] = []

    def reset(self) -> None:
        """Forget every sample."""
        self._counts.clear()

    def result(self) -> Tensor:
        """The matrix so far."""
        rows = [[self._counts[right, chosen] for chosen in self._tasks] for right in self._tasks]
        return torch.tensor(rows, dtype=torch.int64)

    def before_eval(self, strategy: Template) -> None:
        """A stream begins."""
        self.reset()

    def after_eval_iteration(self, strategy: Template) -> None:
        """Take the current mini-batch in."""
        routed: RoutedBatch | None = getattr(strategy, "routed", None)
        if routed is not None:
            pairs = zip(routed.right_tasks.tolist(), routed.tasks.tolist(), strict=True)
            self._counts.update(pair for pair in pairs if pair[0] >= 0)

    def after_eval(self, strategy: Template) -> MetricResult:
        """A stream has ended: say the matrix."""
        if not self._counts:
            return None
        registry = getattr(strategy, "registry", None)  # who routes has one
        self._tasks = [] if registry is None else registry["task"].to_pylist()
        name = get_metric_name(self, strategy, add_experience=False, add_task=False)
        return [MetricValue(self, name, self.result(), strategy.clock.train_iterations)]

    def __str__(self) -> str:
        return "Gate_ConfusionMatrix_Stream"


class UnknownAUROC(PluginMetric[float]):
    """How well strangeness parts the samples of an evaluated stream that belong to no trained task from the others: the
    area under the receiver operating characteristic; silent where there are none of either."""

    def __init__(self) -> None:
        super().__init__()
        self._strangeness: dict[bool, list[Tensor]] = {True: [], False: []}

    def reset(self) -> None:
        """Forget every sample."""
        self._strangeness = {True: [], False: []}

    def result(self) -> float | None:
        """The share of pairs of one of no task and one of a task of which the former is stranger; ties count half."""
        if not all(self._strangeness.values()):
            return None
        strange, known = (torch.cat(parts).double() for _, parts in sorted(self._strangeness.items(), reverse=True))
        if not len(strange) or not len(known) or bool(torch.cat([strange, known]).isnan().any()):
            return None
        known = known.sort().values
        below, upto = (torch.searchsorted(known, strange, right=right).double() for right in (False, True))
        return float((below + upto).mean() / 2 / len(known))

    def before_eval(self, strategy: Template) -> None:
        """A stream begins."""
        self.reset()

    def after_eval_iteration(self, strategy: Template) -> None:
        """Take the current mini-batch in."""
        routed: RoutedBatch | None = getattr(strategy, "routed", None)
        if routed is not None:
            for is_strange, parts in self._strangeness.items():
                parts.append(routed.strangeness[(routed.right_tasks < 0) == is_strange])

    def after_eval(self, strategy: Template) -> MetricResult:
        """A stream has ended: say the area."""
        area = self.result()
        if area is None:
            return None
        name = get_metric_name(self, strategy, add_experience=False, add_task=False)
        return [MetricValue(self, name, area, strategy.clock.train_iterations)]

    def __str__(self) -> str:
        return "Gate_UnknownAUROC_Stream"


def gate_metrics(*, experience: bool = True, stream: bool = True) -> list[Metric]:
    """The method's metrics, each per experience and for the stream as asked, with the gate's confusion matrix.

    ``ExpertGateStrategy.eval`` reports gate, expert and end-to-end accuracy whatever the evaluator holds; put these
    into your own ``EvaluationPlugin`` to have all of them, where you want them.
    """
    asked: dict[Level, bool] = {"experience": experience, "stream": stream}
    levels = [level for level, wanted in asked.items() if wanted]
    metrics: list[Metric] = [RoutingMetric(quantity, level) for quantity in get_args(Quantity) for level in levels]
    return [*metrics, GateConfusionMatrix(), UnknownAUROC()] if stream else metrics


class GateReporter(Plugin):
    """Drives those of the method's metrics that ``evaluator`` lacks in front of it, whatever that holds; it logs what
    they publish with its own next values."""

    def __init__(self, evaluator: EvaluationPlugin) -> None:
        super().__init__()
        named = {str(metric) for metric in evaluator.metrics}
        own = [RoutingMetric(quantity, level) for quantity in _ALWAYS for level in get_args(Level)]
        self._metrics = [metric for metric in own if str(metric) not in named]
        for callback in ("before_eval", "before_eval_exp", "after_eval_iteration", "after_eval_exp", "after_eval"):
            setattr(self, callback, partial(self._publish, callback))

    def _publish(self, callback: str, strategy: Template, *_: object, **__: object) -> None:
        experience = strategy.experience
        if experience is not None:
            strategy.experience = experience.logging()
        try:
            for metric in self._metrics:
                for value in getattr(metric, callback)(strategy) or []:
                    strategy.evaluator.publish_metric_value(value)
        finally:
            strategy.experience = experience


def check_comparing(metrics: Sequence[Metric], eval_every: int) -> None:
    """Say that metrics that compare tasks are silent in training, where they would speak there in Avalanche.

    Raises:
        InputError: forward transfer is asked for with ``eval_every=-1``; Avalanche refuses it in its first ``eval``.
    """
    names = sorted({type(metric).__name__ for metric in metrics if isinstance(metric, COMPARING)})
    if eval_every > -1 and names:
        warnings.warn(
            f"{', '.join(names)}: silent in training, where each expert is measured alone, on its own task; call eval "
            "after each train.",
            stacklevel=4,
        )
    if eval_every < 0 and any(isinstance(metric, GenericExperienceForwardTransfer) for metric in metrics):
        raise InputError("Forward transfer needs eval_every of at least 0, as in Avalanche.")


def measure_start(
    strategy: Template, asked: Sequence[tuple[CLExperience, LabelledDataset]], loader_args: Mapping[str, object]
) -> None:
    """Give metrics of forward transfer what an evaluation before training would have told them of experiences that they
    have not seen yet: the root is as it was then."""
    metrics = [metric for metric in strategy.evaluator.metrics if isinstance(metric, GenericExperienceForwardTransfer)]
    known = [metric.forward_transfer.initial for metric in metrics]
    new = [pair for pair in asked if any(pair[0].current_experience not in initial for initial in known)]

    def tell(callback: str) -> None:
        for metric in metrics:
            getattr(metric, callback)(strategy)

    if new:
        for metric in metrics:
            metric.at_init = True
        tell("before_eval")
        for experience, strategy.adapted_dataset in new:
            strategy.make_eval_dataloader(**loader_args)
            strategy.experience = experience.logging()
            tell("before_eval_exp")
            for batch in strategy.dataloader:
                strategy.mbatch = batch
                strategy._unpack_minibatch()
                strategy.mb_output = strategy.model.expert(strategy.mb_x)
                tell("after_eval_iteration")
            tell("after_eval_exp")
        tell("after_eval")
