"""An evaluation as the run keeps it: what its samples came to, added up beside the metrics and sealed at its end."""

from __future__ import annotations

import importlib.metadata
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience

from distributed_eg.errors import StorageError
from distributed_eg.runtime.run import Run
from distributed_eg.store.evaluations import EvaluatedExperience, EvaluationRecord, Route
from distributed_eg.store.registry import Registry
from distributed_eg.strategy.answers import labels_of_samples
from distributed_eg.strategy.avalanche_types import LabelledDataset, Plugin, Template
from distributed_eg.strategy.metrics import GateReporter, Quantity, RoutedBatch, quantities
from distributed_eg.strategy.tasks.task_labels import index_of, read

logger = logging.getLogger(__name__)


@contextmanager
def keeping(
    strategy: Template,
    reporter: GateReporter,
    run: Run,
    registry: Registry,
    asked: Sequence[tuple[CLExperience, LabelledDataset]],
    seed: int,
) -> Iterator[None]:
    """Around Avalanche's loop over ``asked``: its samples are reported and counted, and if it ends well the run keeps
    what they came to, as its next evaluation. Where that cannot be written, the log says so: the caller has it."""
    tally = Tally(asked)
    strategy.plugins[:0] = [reporter, tally]
    try:
        yield
    finally:
        strategy.plugins.remove(reporter)
        strategy.plugins.remove(tally)
    if not tally.experiences:
        return
    routes = (Route(right, chosen, count) for (right, chosen), count in sorted(tally.routes.items()))
    finished, tasks = datetime.now(UTC).isoformat(timespec="seconds"), tuple(sorted(registry.active))
    record = EvaluationRecord(0, finished, _version(), seed, tasks, tuple(tally.experiences), tuple(routes))
    try:
        run.life.keep(record)
    except StorageError as error:
        logger.warning("The run does not keep this evaluation, whose figures were returned all the same. %s", error)


class Tally(Plugin):
    """Adds up what the samples of each of ``asked`` come to."""

    def __init__(self, asked: Sequence[tuple[CLExperience, LabelledDataset]]) -> None:
        super().__init__()
        self._labels = iter([tuple(sorted(set(labels_of_samples(*pair)))) for pair in asked])
        self._sums: Counter[Quantity] = Counter()
        self._num_samples = 0
        self.experiences: list[EvaluatedExperience] = []
        self.routes: Counter[tuple[int, int]] = Counter()
        """Number of samples by right and chosen task."""

    def before_eval_exp(self, strategy: Template, *_: object, **__: object) -> None:
        """An experience begins."""
        self._sums, self._num_samples = Counter(), 0

    def after_eval_iteration(self, strategy: Template, *_: object, **__: object) -> None:
        """Take the current mini-batch in."""
        routed: RoutedBatch | None = getattr(strategy, "routed", None)
        if routed is None:
            return
        for quantity, values in quantities(strategy, routed).items():
            self._sums[quantity] += values.double().sum().item()  # type: ignore[assignment]  # typeshed counts in int
        if bool(torch.isnan(routed.strangeness).any()):
            self._sums["Gate_Unknown"] = float("nan")  # type: ignore[assignment]
        self._num_samples += len(routed.tasks)
        self.routes.update(zip(routed.right_tasks.tolist(), routed.tasks.tolist(), strict=True))

    def after_eval_exp(self, strategy: Template, *_: object, **__: object) -> None:
        """An experience has ended."""
        labels, count = next(self._labels), self._num_samples
        if count == 0:  # of a loader that gave nothing the metrics say nothing either
            return
        share = {quantity: total / count for quantity, total in self._sums.items()}
        unknown = share["Gate_Unknown"]
        experience: CLExperience = strategy.experience  # type: ignore[assignment]  # there is one in its loop
        self.experiences.append(
            EvaluatedExperience(
                index=index_of(experience),
                stream=str(getattr(read(experience, "_origin_stream"), "name", "")),
                labels=labels,
                num_samples=count,
                gate_accuracy=share["Gate_Acc"],
                expert_accuracy=share["Expert_Acc"],
                end_to_end_accuracy=share["EndToEnd_Acc"],
                unknown_share=None if unknown != unknown else unknown,
            )
        )


def _version() -> str:
    """Of this package; empty where it is used without being installed."""
    try:
        return importlib.metadata.version("distributed-eg")
    except importlib.metadata.PackageNotFoundError:
        return ""
