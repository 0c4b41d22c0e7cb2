"""A session: drives the machine, turns its instructions into requests and their ends into events.

    inputs ──▶ machine ──RunStage──▶ request ──▶ engine's worker
                  ▲                                   │ sealed result
                  └── event ◀── record at coordinator ◀┘

The driver waits for the engine only. A result is recorded by the coordinator before the machine hears of it, so what
the machine lets run next always finds what it needs in the run directory.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distributed_eg.errors import ExpertGateError, TaskFailedError
from distributed_eg.runtime.engine import Ended, Engine, Lost
from distributed_eg.runtime.registry import Registry
from distributed_eg.runtime.requests import (
    AutoencoderRequest,
    Done,
    DropRequest,
    EvaluateRequest,
    EvaluateResult,
    ExpertRequest,
    ExpertResult,
    FeaturesRequest,
    FeaturesResult,
    Raised,
    ReferenceRequest,
    RelateRequest,
    Request,
    Result,
    TaskInput,
    WorkerSetup,
)
from distributed_eg.runtime.shipping import Shipped
from distributed_eg.schedule.events import (
    Cause,
    Event,
    Stage,
    StageFailed,
    StageFinished,
    StreamEnded,
    TaskArrived,
    WorkerJoined,
    WorkerLost,
)
from distributed_eg.schedule.instructions import Instruction, PullTask, ReportFailure, RunStage
from distributed_eg.schedule.machine import Machine
from distributed_eg.store.records import (
    AutoencoderRecord,
    RelatednessRecord,
    StageTiming,
    StatisticsRecord,
    TaskManifest,
)
from distributed_eg.store.sealing import Artifact
from distributed_eg.types import TaskId

logger = logging.getLogger(__name__)

_TASKS_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Progress:
    """Something that a person who waits wants to know."""

    task: TaskId
    label: int
    stage: Stage
    state: Literal["started", "finished", "failed"]
    worker: str
    seconds: float = 0.0


Observer = Callable[[Progress], None]
OnCommit = Callable[[TaskManifest, Any], None]


class Session:
    """One driver's work on one run.

    Args:
        engine: where requests run; started.
        setup: what its workers are made from.
        observer: told of every stage that starts or ends.
    """

    def __init__(self, engine: Engine, setup: WorkerSetup, observer: Observer | None = None) -> None:
        self._engine = engine
        self._setup = setup
        self._observer = observer
        self._calls = itertools.count()
        self.registry: Registry = engine.coordinator.registry()

    def fit_reference(self, data: Shipped) -> None:
        """Statistics and the root's autoencoder from a reference dataset, where the run has none yet."""
        if self.registry.statistics is None:
            self._engine.add_workers(self._setup, 1)
            (record,) = self._run_all([ReferenceRequest(data)])
            assert isinstance(record, StatisticsRecord)
            self.adopt_reference(record)

    def adopt_reference(self, record: StatisticsRecord) -> None:
        """Take statistics, and the root's autoencoder, that are sealed in the run directory already."""
        self._engine.coordinator.record(record)
        self.registry.statistics = record

    def train(self, inputs: Iterator[TaskInput], num_tasks: int | None, trainer: Shipped, on_commit: OnCommit) -> None:
        """Train every task of ``inputs``, pulled one by one as workers become free.

        ``on_commit`` is told of each committed task and its training log, in task order.

        Raises:
            TaskFailedError: tasks failed; every task that did not need a failed one is committed. Where one task failed
                by an error of ours, that error is raised itself.
            Exception: what ``inputs`` raised, once everything that it gave before is done.
        """
        self._engine.add_workers(self._setup, num_tasks)
        # A stream of unknown length may not fit in memory: it is read a little ahead of the work only.
        ahead = _TASKS_AHEAD if num_tasks is None else None
        machine = Machine(
            self.registry.manifests, has_statistics=self.registry.statistics is not None, tasks_per_worker=ahead
        )
        training = _Training(self._engine, self.registry, machine, inputs, trainer, self._calls, self._observer)
        try:
            training.run(on_commit)
        finally:
            self._engine.coordinator.export()

    def evaluate(self, requests: Sequence[EvaluateRequest]) -> list[EvaluateResult]:
        """Carry out ``requests`` on the workers; results in their order."""
        self._engine.add_workers(self._setup, len(requests))
        results = self._run_all(requests)
        return [result for result in results if isinstance(result, EvaluateResult)]

    def _run_all(self, requests: Sequence[Request]) -> list[Result]:
        waiting = deque(enumerate(requests))
        idle = deque(worker.worker for worker in self._engine.workers())
        running: dict[int, int] = {}
        results: dict[int, Result] = {}
        while len(results) < len(requests):
            while waiting and idle:
                index, request = waiting.popleft()
                call = next(self._calls)
                running[call] = index
                self._engine.submit(call, idle.popleft(), request)
            for report in self._engine.wait():
                if isinstance(report, WorkerJoined):
                    idle.append(report.worker)
                elif isinstance(report, Lost):
                    for call in [call for call in running if call in report.calls]:
                        waiting.appendleft((running[call], requests[running.pop(call)]))
                elif report.call in running:
                    idle.append(report.worker)
                    if isinstance(report.outcome, Raised):
                        raise _error_of(report.outcome)
                    results[running.pop(report.call)] = report.outcome.result
        return [results[index] for index in range(len(requests))]


class _Training:
    """One call of ``Session.train``: the machine and what is in flight."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        machine: Machine,
        inputs: Iterator[TaskInput],
        trainer: Shipped,
        calls: Iterator[int],
        observer: Observer | None,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._inputs = inputs
        self._trainer = trainer
        self._calls = calls
        self._observer = observer
        self._machine = machine
        self._tasks: dict[TaskId, TaskInput] = {}
        self._versions: dict[TaskId, tuple[TaskId, ...]] = {}
        self._workers_of: dict[TaskId, set[str]] = {}
        self._input_error: Exception | None = None
        self._running: dict[int, RunStage] = {}
        self._timings: dict[TaskId, list[StageTiming]] = {}
        self._logs: dict[TaskId, Any] = {}
        self._failures: dict[TaskId, str] = {}
        self._errors: dict[TaskId, ExpertGateError | None] = {}

    def run(self, on_commit: OnCommit) -> None:
        """Until the stream has ended and nothing runs any more."""
        order: deque[TaskId] = deque()
        events: deque[Event] = deque(self._engine.workers())
        while True:
            while events:
                for instruction in self._machine.handle(events.popleft()):
                    events.extend(self._perform(instruction, order))
                while order and (order[0] in self._logs or order[0] in self._failures):
                    task = order.popleft()
                    if task in self._logs:
                        on_commit(self._registry.manifests[task], self._logs.pop(task))
                        del self._tasks[task]
            if self._machine.done:
                break
            for report in self._engine.wait():
                events.extend(self._report(report))
        if self._input_error is not None:
            raise self._input_error
        if self._failures:
            self._raise_failures()

    def _perform(self, instruction: Instruction, order: deque[TaskId]) -> list[Event]:
        if isinstance(instruction, PullTask):
            try:
                task_input = next(self._inputs, None)
            except Exception as error:  # whatever the user's stream raises, what runs is finished and recorded first
                self._input_error = error
                task_input = None
            if task_input is None:
                return [StreamEnded()]
            self._tasks[task_input.task] = task_input
            self._versions[task_input.task] = task_input.versions
            order.append(task_input.task)
            return [TaskArrived(task_input.task, task_input.continues)]
        if isinstance(instruction, ReportFailure):
            self._failures[instruction.task] = f"{instruction.stage.value}: {instruction.message}"
            self._drop_features(instruction.task)
            return []
        call = next(self._calls)
        self._running[call] = instruction
        self._workers_of.setdefault(instruction.task, set()).add(instruction.worker)
        self._tell(instruction, "started")
        self._engine.submit(call, instruction.worker, self._request(instruction))
        return []

    def _drop_features(self, task: TaskId) -> None:
        """Remove what a task's stages may have left on any node that they ran on."""
        used = self._workers_of.pop(task, set())
        workers = {w.node: w.worker for w in self._engine.workers() if w.worker in used}
        for worker in workers.values():
            self._engine.submit(next(self._calls), worker, DropRequest(self._tasks[task].key))

    def _request(self, run: RunStage) -> Request:
        task_input, registry = self._tasks[run.task], self._registry
        if run.stage is Stage.FEATURES:
            return FeaturesRequest(task_input, run.with_statistics)
        assert registry.statistics is not None
        if run.stage is Stage.AUTOENCODER:
            start = None if task_input.continues is None else registry.autoencoders[task_input.continues]
            return AutoencoderRequest(task_input, registry.statistics, start)
        if run.stage is Stage.RELATE:
            own = registry.autoencoders[run.task].artifact
            return RelateRequest(task_input, registry.statistics, own, self._candidates(task_input))
        choice = registry.relatedness[run.task].choice
        parent = None if choice.parent is None else registry.expert_ref(choice.parent)
        return ExpertRequest(task_input, choice, parent, self._trainer)

    def _candidates(self, task_input: TaskInput) -> tuple[tuple[TaskId | None, Artifact], ...]:
        """What the expert could start from: the root where it has an autoencoder, and the newest version of each task
        that precedes this one in the stream, whatever has finished since."""
        if task_input.continues is not None:
            return ()
        registry = self._registry
        newest: dict[TaskId, TaskId] = {}
        for task in sorted(registry.autoencoders):
            # An autoencoder that an earlier, failed call left behind has no expert to start from.
            if task < task_input.task and (task in registry.manifests or task in self._versions):
                newest[self._first_number(task)] = task
        root = registry.statistics.root_autoencoder if registry.statistics else None
        earlier = [(task, registry.autoencoders[task].artifact) for task in sorted(newest.values())]
        return ((None, root), *earlier) if root is not None else tuple(earlier)

    def _first_number(self, task: TaskId) -> TaskId:
        manifest = self._registry.manifests.get(task)
        return (self._versions[task] if manifest is None else manifest.versions)[0]

    def _report(self, report: WorkerJoined | Lost | Ended) -> list[Event]:
        if isinstance(report, WorkerJoined):
            return [report]
        if isinstance(report, Lost):
            for call in report.calls:
                self._running.pop(call, None)
            return [WorkerLost(report.worker, report.message)]
        run = self._running.pop(report.call, None)
        if run is None:  # a call of an earlier, interrupted loop
            return []
        if isinstance(report.outcome, Raised):
            self._tell(run, "failed", report.outcome.seconds)
            logger.debug("Task %d, %s: %s", run.task, run.stage.value, report.outcome.traceback)
            self._errors[run.task] = report.outcome.error
            message = report.outcome.message if report.outcome.error else report.outcome.traceback
            return [StageFailed(run.task, run.stage, run.attempt, Cause.RAISED, message)]
        return [self._finish(run, report.outcome, report.worker)]

    def _finish(self, run: RunStage, done: Done, worker: str) -> StageFinished:
        registry, result = self._registry, done.result
        self._timings.setdefault(run.task, []).append(StageTiming(run.stage.value, worker, done.seconds))
        parent = None
        if isinstance(result, FeaturesResult) and result.statistics is not None:
            self._engine.coordinator.record(result.statistics)
            registry.statistics = result.statistics
        elif isinstance(result, AutoencoderRecord):
            self._engine.coordinator.record(result)
            registry.autoencoders[run.task] = result
        elif isinstance(result, RelatednessRecord):
            registry.relatedness_artifacts[run.task] = self._engine.coordinator.record(result)
            registry.relatedness[run.task] = result
            parent = result.choice.parent
        elif isinstance(result, ExpertResult):
            self._commit(run.task, result)
        self._tell(run, "finished", done.seconds)
        return StageFinished(run.task, run.stage, run.attempt, parent)

    def _commit(self, task: TaskId, result: ExpertResult) -> None:
        registry, task_input = self._registry, self._tasks[task]
        choice = registry.relatedness[task].choice
        manifest = TaskManifest(
            task=task,
            label=task_input.label,
            versions=task_input.versions,
            classes=task_input.classes,
            parent=choice.parent,
            transfer=choice.transfer,
            distillation=result.distillation,
            autoencoder=registry.autoencoders[task].artifact,
            relatedness=registry.relatedness_artifacts[task],
            expert=result.expert,
        )
        timings = self._timings.pop(task)
        self._engine.coordinator.note_timings(task, timings)
        self._engine.coordinator.record(manifest)
        registry.manifests[task] = manifest
        registry.timings[task] = timings
        self._logs[task] = result.log
        if len({worker.node for worker in self._engine.workers()}) > 1:
            self._drop_features(task)

    def _tell(self, run: RunStage, state: Literal["started", "finished", "failed"], seconds: float = 0.0) -> None:
        label = self._tasks[run.task].label
        logger.debug("Task %d (label %d): %s %s on %s", run.task, label, run.stage.value, state, run.worker)
        if self._observer is not None:
            self._observer(Progress(run.task, label, run.stage, state, run.worker, seconds))

    def _raise_failures(self) -> None:
        if len(self._failures) == 1:
            (task,) = self._failures
            error = self._errors.get(task)
            if error is not None:
                raise error
        lines = [
            f"task {task} (label {self._tasks[task].label}) failed in {message}"
            for task, message in sorted(self._failures.items())
        ]
        raise TaskFailedError(f"{len(lines)} task(s) were not trained; all others are committed:\n" + "\n".join(lines))


def _error_of(raised: Raised) -> ExpertGateError:
    return raised.error or TaskFailedError(f"A worker failed: {raised.traceback}")
