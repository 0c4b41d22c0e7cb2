"""The loop's ports over an engine: stages that may run become requests, what workers leave becomes records."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from distributed_eg.errors import ExpertGateError, StorageError, TaskFailedError
from distributed_eg.runtime import messages
from distributed_eg.runtime.engine import Ended, Engine, Report
from distributed_eg.runtime.messages import Done, ExpertResult, Observer, Progress, Raised, Request, State, TaskInput
from distributed_eg.runtime.resuming import take_up
from distributed_eg.runtime.shipping import Shipped
from distributed_eg.runtime.signals import raise_if_told
from distributed_eg.schedule.events import Stage, TaskArrived, WorkerJoined, WorkerLost
from distributed_eg.schedule.instructions import ReportFailure, RunStage
from distributed_eg.schedule.loop import Loop
from distributed_eg.schedule.machine import Machine
from distributed_eg.store.checkpoints import delete_checkpoints
from distributed_eg.store.records import Record, RelatednessRecord, StageTiming, TaskManifest, TaskTimings
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.types import TaskId

logger = logging.getLogger(__name__)

_IS_KNOWN = 0.9
"""Of the share of its own held-out images that a task knows: from there on another task's look like its own."""


class TaskSource(Protocol):
    """Where a call's tasks come from, and who is told what became of them."""

    def next_task(self) -> TaskInput | None:
        """The stream's next task; None at its end."""

    def committed(self, manifest: TaskManifest, log: Any) -> None:
        """A task is sealed; told in order of arrival. ``log`` is that of its expert's training, None where an earlier
        driver trained it."""


@dataclass(eq=False)
class Dispatcher:
    """One call of ``Run.train``: what is in flight, and what came of it."""

    engine: Engine
    storage: Storage
    recorded: Registry
    """What earlier drivers left there, for tasks that have not arrived again yet."""
    registry: Registry
    """What this driver has seen; every record goes here, too."""
    source: TaskSource
    trainer: Shipped
    """Trains experts on workers."""
    observer: Observer | None
    way_on: str
    """What is left to the run where tasks fail, as a clause."""
    unknown_quantile: float

    def __post_init__(self) -> None:
        self._tasks: dict[TaskId, TaskInput] = {}
        self._workers_of: dict[TaskId, set[str]] = {}
        self._timings: dict[TaskId, list[StageTiming]] = {}
        self._devices: dict[str, str] = {}
        """What each worker computes on."""
        self._relatedness: dict[TaskId, Artifact] = {}
        self._logs: dict[TaskId, Any] = {}
        self._failures: dict[TaskId, ReportFailure] = {}
        self._source_error: Exception | None = None

    def run(self, machine: Machine) -> None:
        """Until the stream has ended and nothing runs any more.

        Raises:
            TaskFailedError: tasks failed. Where one task failed by an error of ours, that error is raised itself.
            Exception: what the source raised, once everything that it gave before is done.
        """
        loop: Loop[Done] = Loop(machine, self)
        self.engine.listener = None if self.observer is None else partial(self._hear, loop)
        for worker in self.engine.workers():
            self._take(worker, loop)
        while not machine.done:
            raise_if_told()
            for report in self.engine.wait():
                self._take(report, loop)
        if self._source_error is not None:
            for task, failure in sorted(self._failures.items()):
                stage = failure.stage.value
                logger.error(
                    "Task %d failed in %s: %s", task, stage, failure.message, extra={"task": task, "stage": stage}
                )
            raise self._source_error
        if self._failures:
            raise self._error(machine)

    def _take(self, report: Report, loop: Loop[Done]) -> None:
        if not isinstance(report, Ended):
            if isinstance(report, WorkerJoined):
                self._join(report)
            if isinstance(report, WorkerLost):
                for run in [run for run in loop.runs.values() if run.worker == report.worker]:
                    self._tell(run, "failed")
            loop.tell(report)
        elif report.call in loop.runs:
            run, outcome = loop.runs[report.call], report.outcome
            if isinstance(outcome, Raised):
                self._tell(run, "failed", outcome.seconds)
                logger.debug("Task %d, %s: %s", run.task, run.stage.value, outcome.traceback, extra=_known_of(run))
                cause, error, details = outcome.cause, outcome.error, outcome.traceback
                loop.failed(run.attempt, cause, outcome.message, error=error, details=details)
            else:
                loop.finished(run.attempt, outcome)

    def _join(self, worker: WorkerJoined) -> None:
        """Note what a worker computes on; warn, once, where the run was begun on something else."""
        known = {stage.device for of_task in self.recorded.timings.values() for stage in of_task.stages} - {""}
        if known and worker.device not in known | {*self._devices.values()}:
            says = "The run was begun on %s and goes on with %s, which may give other bytes."
            logger.warning(says, " and ".join(sorted(known)), worker.device)
        self._devices[worker.worker] = worker.device

    # What the loop asks for

    def pull(self) -> TaskArrived | None:
        """The stream's next task; whatever the source raises, what runs is finished and recorded first."""
        try:
            task_input = self.source.next_task()
            return None if task_input is None else self._arrive(task_input)
        except Exception as error:
            self._source_error = error
            return None

    def submit(self, run: RunStage) -> None:
        """Begin a stage."""
        self._workers_of.setdefault(run.task, set()).add(run.worker)
        self._tell(run, "started")
        self.engine.submit(run.attempt, run.worker, self._request(run))

    def record(self, run: RunStage, result: Done) -> TaskId | None:
        """Seal what a stage left."""
        task, left = run.task, result.result
        device = self._devices[run.worker]
        timing = StageTiming(run.stage.value, run.worker, result.seconds, device, result.started_s)
        self._timings[task].append(timing)
        if isinstance(left, ExpertResult):
            self._seal(task, left)
        elif isinstance(left, Record):
            self._record(left)
        num_checkpoints = left.num_checkpoints if isinstance(left, ExpertResult) else 0
        self._tell(run, "finished", result.seconds, num_checkpoints)
        return left.choice.parent if isinstance(left, RelatednessRecord) else None

    def commit(self, task: TaskId) -> None:
        """Tell the source; the task's data are not needed any more."""
        self.source.committed(self.registry.manifests[task], self._logs.pop(task, None))
        del self._tasks[task]

    def give_up(self, failure: ReportFailure) -> None:
        """Note it for the end; other tasks go on."""
        self._failures[failure.task] = failure
        self._drop_features(failure.task)

    # How it is done

    def _record(self, record: Record) -> None:
        artifact = self.engine.coordinator.record(record)
        if isinstance(record, RelatednessRecord):
            self._relatedness[record.task] = artifact  # the manifest names it
            self._tell_if_known(record)
        self.registry.add(record)

    def _tell_if_known(self, record: RelatednessRecord) -> None:
        """Say where a task looks like one that is there; nothing is done about it."""
        known = zip(record.known_shares or (), record.candidates, strict=False)
        share, task = max(((share, task) for share, task in known if share is not None), default=(0.0, None))
        if task is not None and share >= _IS_KNOWN * self.unknown_quantile:
            logger.info(
                "Task %d (label %d) looks like task %d (label %d): %.0f %% of its held-out images are no stranger to "
                "it than its own. If it is the same, bring it under that label, which trains that task further.",
                *(record.task, self._tasks[record.task].record.label, task, self.registry.arrivals[task].label),
                100 * share,
                extra={"task": record.task},
            )

    def _arrive(self, task_input: TaskInput) -> TaskArrived:
        """Take a task in, with what an earlier driver left of it; note what it is before anything is done for it."""
        record, task = task_input.record, task_input.record.task
        done = take_up(self.storage, self.recorded, self.registry, record)
        known = self.recorded.arrivals.get(task)
        # A sealed task's record stays as it is, where an earlier version of this package described the data otherwise.
        if known is not None and (known == record or task in self.recorded.manifests):
            self.registry.add(known)
        else:
            self._record(record)
        self._tasks[task] = task_input
        for stage in sorted(done, key=list(Stage).index):
            extra = {"task": task, "label": record.label, "stage": stage.value, "state": "kept"}
            logger.debug("Task %d: %s kept", task, stage.value, extra=extra)
            self._observe(task, stage, "kept")
        if Stage.EXPERT in done:  # its driver may have ended before it did this
            self._delete_checkpoints(task)
            if task not in self.registry.timings:  # damaged, and not to be had again
                self._record(TaskTimings(task, ()))
        noted = self.registry.timings.get(task, TaskTimings(task, ()))
        self._timings[task] = [timing for timing in noted.stages if Stage(timing.stage) in done]
        parent = self.registry.relatedness[task].choice.parent if Stage.RELATE in done else None
        return TaskArrived(task, record.continues, done, parent)

    def _request(self, run: RunStage) -> Request:
        task_input, registry = self._tasks[run.task], self.registry
        if run.stage is Stage.FEATURES:
            return messages.FeaturesRequest(task_input, run.with_statistics)
        if run.stage is Stage.EXPERT:
            choice = registry.relatedness[run.task].choice
            parent = None if choice.parent is None else registry.expert_ref(choice.parent)
            return messages.ExpertRequest(task_input, choice, parent, self.trainer)
        assert registry.statistics is not None
        if run.stage is Stage.AUTOENCODER:
            before = task_input.record.continues
            start = None if before is None else registry.autoencoders[before]
            return messages.AutoencoderRequest(task_input, registry.statistics, start)
        own, candidates = registry.autoencoders[run.task], self._candidates(task_input)
        asked = (own, *(registry.autoencoders[task] for task, _ in candidates if task is not None))
        summaries = tuple(record.summary for record in asked if record.summary is not None)
        share = self.unknown_quantile
        limits = tuple(None if task is None else registry.autoencoders[task].limit(share) for task, _ in candidates)
        return messages.RelateRequest(task_input, registry.statistics, own.artifact, candidates, limits, summaries)

    def _candidates(self, task_input: TaskInput) -> tuple[tuple[TaskId | None, Artifact], ...]:
        """What the expert could start from: the root where it has an autoencoder, and the newest version of each task
        that precedes this one in the stream, whatever has finished since. A task that continues starts from itself, and
        is told of the others."""
        registry, arrived = self.registry, task_input.record
        newest: dict[TaskId, TaskId] = {}
        for task in sorted(registry.autoencoders):
            # An autoencoder that an earlier, failed call left behind has no expert to start from.
            is_there = task in registry.manifests or task in self._tasks
            if task < arrived.task and is_there and not registry.is_hidden(task, arrived.task):
                newest[registry.arrivals[task].versions[0]] = task
        if arrived.continues is not None:
            newest.pop(arrived.versions[0], None)
        root = registry.statistics.root_autoencoder if registry.statistics else None
        earlier = [(task, registry.autoencoders[task].artifact) for task in sorted(newest.values())]
        return ((None, root), *earlier) if root is not None else tuple(earlier)

    def _seal(self, task: TaskId, result: ExpertResult) -> None:
        registry, arrived = self.registry, self._tasks[task].record
        relatedness = registry.relatedness[task]
        if task in self.recorded.relatedness:  # perhaps as an earlier version of this package writes it
            self._record(relatedness)
        manifest = TaskManifest(
            task=task,
            label=arrived.label,
            versions=arrived.versions,
            classes=arrived.classes,
            parent=relatedness.choice.parent,
            transfer=result.transfer,
            distillation=result.distillation,
            autoencoder=registry.autoencoders[task].artifact,
            relatedness=self._relatedness.pop(task),
            expert=result.expert,
            contest=result.contest,
        )
        self._record(TaskTimings(task, tuple(self._timings.pop(task))))
        self._record(manifest)
        self._logs[task] = result.log
        self._delete_checkpoints(task)
        if len({worker.node for worker in self.engine.workers()}) > 1:
            self._drop_features(task)

    def _drop_features(self, task: TaskId) -> None:
        """Remove what a task's stages may have left on any node that they ran on."""
        used = self._workers_of.pop(task, set())
        workers = {w.node: w.worker for w in self.engine.workers() if w.worker in used}
        for worker in workers.values():
            self.engine.submit(None, worker, messages.DropRequest(self._tasks[task].key))

    def _delete_checkpoints(self, task: TaskId) -> None:
        try:
            delete_checkpoints(self.storage, task)
        except StorageError as error:
            logger.warning(
                "The checkpoint of task %d is left behind; `distributed-eg gc` removes it. %s",
                task,
                error,
                extra={"task": task},
            )

    def _tell(self, run: RunStage, state: State, seconds: float = 0.0, num_checkpoints: int = 0) -> None:
        told = {**_known_of(run), "label": self._tasks[run.task].record.label, "state": state}
        if state != "started":
            told["seconds"] = seconds
        logger.debug("Task %d: %s %s %s", run.task, run.stage.value, state, run.worker, extra=told)
        self._observe(run.task, run.stage, state, run.worker, seconds, num_checkpoints)

    def _hear(self, loop: Loop[Done], worker: str, epoch: messages.Epoch) -> None:
        """Hand on how far an expert is, where its worker does not do something else by now."""
        now = (worker, epoch.task, Stage.EXPERT)
        if any((run.worker, run.task, run.stage) == now for run in loop.runs.values()):
            self._observe(epoch.task, Stage.EXPERT, "training", worker, epoch=epoch)

    def _observe(
        self,
        task: TaskId,
        stage: Stage,
        state: State,
        worker: str = "",
        seconds: float = 0.0,
        num_checkpoints: int = 0,
        epoch: messages.Epoch | None = None,
    ) -> None:
        related, label = self.registry.relatedness.get(task), self._tasks[task].record.label
        parent = None if related is None else related.choice.parent
        progress = Progress(task, label, stage, state, worker, seconds, parent, num_checkpoints, epoch)
        if epoch is None:
            self.engine.observe(progress)
        if self.observer is not None:
            self.observer(progress)

    def _error(self, machine: Machine) -> ExpertGateError:
        """What to raise for the tasks that failed."""
        rest = "all others are committed"
        if machine.stopping:
            rest = "the run stopped there, and what had not begun was not begun"
        if machine.unfinished:
            rest += f"; unfinished: {', '.join(map(str, machine.unfinished))}"
        lines = [f"{len(self._failures)} task(s) were not trained; {rest}. {self.way_on[0].upper()}{self.way_on[1:]}."]
        for task, failure in sorted(self._failures.items()):
            label = self._tasks[task].record.label
            lines.append(f"task {task} (label {label}) failed in {failure.stage.value}: {failure.message}")
            foreign = [attempt.details for attempt in failure.failures if attempt.details and attempt.error is None]
            lines += foreign[-1:]
        told = "\n".join(lines)
        attempts = next(iter(self._failures.values())).failures
        last = attempts[-1].error if attempts and len(self._failures) == 1 else None
        if not isinstance(last, ExpertGateError):
            return TaskFailedError(told)
        return last if len(attempts) == 1 and not machine.stopping else type(last)(told)


def _known_of(run: RunStage) -> dict[str, object]:
    """What a line of the log carries beside its message."""
    return {"task": run.task, "stage": run.stage.value, "attempt": run.attempt, "worker": run.worker}
