"""The training loop: turns the machine's instructions into requests, and what workers report into events.

A result is recorded by the coordinator before the machine hears of it, so what the machine lets run next always finds
what it needs in the run directory; and it is recorded only if it comes from the attempt that counts.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from distributed_eg.errors import StorageError, TaskFailedError
from distributed_eg.runtime.engine import Ended, Engine, Lost
from distributed_eg.runtime.messages import (
    AutoencoderRequest,
    Done,
    DropRequest,
    ExpertRequest,
    ExpertResult,
    FeaturesRequest,
    FeaturesResult,
    Raised,
    RelateRequest,
    Request,
    TaskInput,
)
from distributed_eg.runtime.resuming import take_up
from distributed_eg.runtime.shipping import Shipped
from distributed_eg.schedule.events import (
    Event,
    Stage,
    StageFailed,
    StageFinished,
    StreamEnded,
    TaskArrived,
    WorkerJoined,
    WorkerLeaving,
    WorkerLost,
)
from distributed_eg.schedule.instructions import Instruction, PullTask, ReportFailure, RunStage
from distributed_eg.schedule.machine import Machine
from distributed_eg.store.checkpoints import delete_checkpoint
from distributed_eg.store.records import AutoencoderRecord, RelatednessRecord, StageTiming, TaskManifest, TaskRecord
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.types import TaskId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """Something that a person who waits wants to know; "kept": an earlier driver left the stage's result."""

    task: TaskId
    label: int
    stage: Stage
    state: Literal["started", "finished", "failed", "kept"]
    worker: str
    seconds: float = 0.0


Observer = Callable[[Progress], None]
OnCommit = Callable[[TaskManifest, Any], None]
"""Told of a committed task and the log of its expert's training; None where an earlier driver trained it."""


class Training:
    """One call of ``Session.train``: the machine and what is in flight.

    Args:
        engine: where requests run.
        storage: the run directory.
        recorded: what earlier drivers left there, for tasks that have not arrived again yet.
        registry: what this driver has seen; every record goes here, too.
        machine: the order of work.
        inputs: the stream's tasks.
        trainer: trains experts on workers.
        calls: numbers for calls.
        observer: told of every stage that starts or ends.
    """

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        recorded: Registry,
        registry: Registry,
        machine: Machine,
        inputs: Iterator[TaskInput],
        trainer: Shipped,
        calls: Iterator[int],
        observer: Observer | None,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._recorded = recorded
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
        self._attempts: defaultdict[TaskId, list[Raised | Lost]] = defaultdict(list)
        """How the failed attempts at a task's stages ended."""

    def run(self, on_commit: OnCommit) -> None:
        """Until the stream has ended and nothing runs any more."""
        order: deque[TaskId] = deque()
        events: deque[Event] = deque(self._engine.workers())
        while True:
            while events:
                for instruction in self._machine.handle(events.popleft()):
                    events.extend(self._perform(instruction, order))
                while order and (self._machine.is_committed(order[0]) or order[0] in self._failures):
                    task = order.popleft()
                    if task not in self._failures:
                        on_commit(self._registry.manifests[task], self._logs.pop(task, None))
                        del self._tasks[task]
            if self._machine.done:
                break
            for report in self._engine.wait():
                events.extend(self._report(report))
        if self._input_error is not None:
            for task, message in sorted(self._failures.items()):
                logger.error("Task %d failed in %s", task, message)
            raise self._input_error
        if self._failures:
            self._raise_failures()

    def _perform(self, instruction: Instruction, order: deque[TaskId]) -> list[Event]:
        if isinstance(instruction, PullTask):
            try:
                task_input = next(self._inputs, None)
                arrival = None if task_input is None else self._arrive(task_input)
            except Exception as error:  # whatever the user's stream raises, what runs is finished and recorded first
                self._input_error = error
                arrival = None
            if arrival is None:
                return [StreamEnded()]
            order.append(arrival.task)
            return [arrival]
        if isinstance(instruction, ReportFailure):
            self._failures[instruction.task] = f"{instruction.stage.value}: {instruction.message}"
            self._drop_features(instruction.task)
            return []
        call = next(self._calls)
        self._running[call] = instruction
        self._workers_of.setdefault(instruction.task, set()).add(instruction.worker)
        self._tell(instruction.task, instruction.stage, "started", instruction.worker)
        self._engine.submit(call, instruction.worker, self._request(instruction))
        return []

    def _arrive(self, task_input: TaskInput) -> TaskArrived:
        """Take a task in, with what an earlier driver left of it; note what it is before anything is done for it."""
        task = task_input.task
        same = (task_input.label, task_input.classes, task_input.versions, task_input.continues)
        record = TaskRecord(task, *same, task_input.identity)
        done = take_up(self._storage, self._recorded, self._registry, record)
        if self._recorded.arrivals.get(task) != record:
            self._engine.coordinator.record(record)
        self._registry.arrivals[task] = record
        self._tasks[task], self._versions[task] = task_input, task_input.versions
        for stage in sorted(done, key=list(Stage).index):
            self._tell(task, stage, "kept", "")
        if Stage.EXPERT in done:  # its driver may have ended before it did this
            self._delete_checkpoint(task)
            if not self._registry.timings.get(task):  # damaged, and not to be had again
                self._engine.coordinator.note_timings(task, [])
        self._timings[task] = [timing for timing in self._registry.timings.get(task, []) if Stage(timing.stage) in done]
        parent = self._registry.relatedness[task].choice.parent if Stage.RELATE in done else None
        return TaskArrived(task, task_input.continues, done, parent)

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
        if run.stage is Stage.EXPERT:
            choice = registry.relatedness[run.task].choice
            parent = None if choice.parent is None else registry.expert_ref(choice.parent)
            return ExpertRequest(task_input, choice, parent, self._trainer)
        assert registry.statistics is not None
        if run.stage is Stage.AUTOENCODER:
            start = None if task_input.continues is None else registry.autoencoders[task_input.continues]
            return AutoencoderRequest(task_input, registry.statistics, start)
        own = registry.autoencoders[run.task].artifact
        return RelateRequest(task_input, registry.statistics, own, self._candidates(task_input))

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

    def _report(self, report: WorkerJoined | WorkerLeaving | Lost | Ended) -> list[Event]:
        if isinstance(report, WorkerJoined | WorkerLeaving):
            return [report]
        if isinstance(report, Lost):
            for run in (self._running.pop(call, None) for call in report.calls):
                if run is not None:
                    self._tell(run.task, run.stage, "failed", run.worker)
                    self._attempts[run.task].append(report)
            return [WorkerLost(report.worker, report.message, report.cause)]
        run = self._running.pop(report.call, None)
        if run is None or not self._machine.is_current(run.task, run.stage, run.attempt):
            return []  # a second report, or one of an attempt that was given up
        if isinstance(report.outcome, Raised):
            raised = report.outcome
            self._tell(run.task, run.stage, "failed", run.worker, raised.seconds)
            logger.debug("Task %d, %s: %s", run.task, run.stage.value, raised.traceback)
            self._attempts[run.task].append(raised)
            return [StageFailed(run.task, run.stage, run.attempt, raised.cause, raised.message)]
        return [self._finish(run, report.outcome, report.worker)]

    def _finish(self, run: RunStage, done: Done, worker: str) -> StageFinished:
        registry, result = self._registry, done.result
        self._timings[run.task].append(StageTiming(run.stage.value, worker, done.seconds))
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
        self._tell(run.task, run.stage, "finished", worker, done.seconds)
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
        self._delete_checkpoint(task)
        if len({worker.node for worker in self._engine.workers()}) > 1:
            self._drop_features(task)

    def _delete_checkpoint(self, task: TaskId) -> None:
        try:
            delete_checkpoint(self._storage, task)
        except StorageError as error:
            logger.warning("The checkpoint of task %d is left behind; `distributed-eg gc` removes it. %s", task, error)

    def _tell(
        self,
        task: TaskId,
        stage: Stage,
        state: Literal["started", "finished", "failed", "kept"],
        worker: str,
        seconds: float = 0.0,
    ) -> None:
        label = self._tasks[task].label
        logger.debug("Task %d (label %d): %s %s %s", task, label, stage.value, state, worker)
        if self._observer is not None:
            self._observer(Progress(task, label, stage, state, worker, seconds))

    def _raise_failures(self) -> None:
        unfinished = self._machine.unfinished
        rest = "all others are committed"
        if self._machine.stopping:
            rest = "the run stopped there, and what had not begun was not begun"
        if unfinished:
            rest += f"; unfinished: {', '.join(map(str, unfinished))}"
        lines = [f"{len(self._failures)} task(s) were not trained; {rest}. The run can be resumed."]
        for task, message in sorted(self._failures.items()):
            lines.append(f"task {task} (label {self._tasks[task].label}) failed in {message}")
            foreign = [a for a in self._attempts[task] if isinstance(a, Raised) and a.error is None]
            lines += [attempt.traceback for attempt in foreign[-1:]]
        told = "\n".join(lines)
        if len(self._failures) == 1:
            attempts = self._attempts[next(iter(self._failures))]
            last = attempts[-1] if attempts else None
            if isinstance(last, Raised) and last.error is not None:
                raise last.error if len(attempts) == 1 and not self._machine.stopping else type(last.error)(told)
        raise TaskFailedError(told)
