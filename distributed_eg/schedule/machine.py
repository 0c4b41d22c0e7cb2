"""The machine: which stage of which task may run now, on which worker, and what a failure costs.

    FEATURES ──▶ AUTOENCODER ──▶ RELATE ──▶ EXPERT
                 needs the       needs all   needs the
                 run's           earlier     parent's
                 statistics      autoencoders expert

A task's parent is known after RELATE only: experts form a forest that unfolds while the work goes on. Everything else
may run in any order; the results do not depend on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

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
from distributed_eg.schedule.retry import Decision, decide
from distributed_eg.types import TaskId

_STAGES = tuple(Stage)
# A ready expert goes first: it is the longest stage and others wait for it. Then whatever is nearest to its end, so
# that few tasks hold features at a time.
_PRIORITY = (Stage.EXPERT, Stage.RELATE, Stage.AUTOENCODER, Stage.FEATURES)
_HISTORY = 50


class ScheduleError(AssertionError):
    """An event that cannot happen in this state: a slip of ours, told with the machine's last events."""


@dataclass(slots=True)
class _Task:
    next_stage: Stage | None = Stage.FEATURES
    running: bool = False
    attempt: int = 0
    parent: TaskId | None = None
    failed: bool = False
    causes: dict[Stage, list[Cause]] = field(default_factory=dict)
    node: str | None = None

    def past(self, stage: Stage) -> bool:
        """Whether ``stage`` has ended well."""
        return self.next_stage is None or _STAGES.index(self.next_stage) > _STAGES.index(stage)


class Machine:
    """Told every event through ``handle``; answers with what to do next.

    Args:
        committed: tasks that are sealed already, from an earlier call or an earlier run.
        has_statistics: whether the run's standardization statistics are known already.
    """

    def __init__(self, committed: Collection[TaskId] = (), *, has_statistics: bool = False) -> None:
        self._committed = frozenset(committed)
        self._tasks: dict[TaskId, _Task] = {}
        self._idle: dict[str, str] = {}
        self._busy: dict[str, RunStage] = {}
        self._nodes: dict[str, str] = {}
        self._has_statistics = has_statistics
        self._first: TaskId | None = None
        self._pulling = False
        self._ended = False
        self._history: deque[Event] = deque(maxlen=_HISTORY)

    @property
    def done(self) -> bool:
        """Whether the stream has ended and every task is committed or given up."""
        return self._ended and not self._busy and all(t.failed or t.next_stage is None for t in self._tasks.values())

    @property
    def num_workers(self) -> int:
        """Workers that are there, idle or busy."""
        return len(self._nodes)

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event in; return what to do now.

        Reports of an attempt that is no longer the current one are ignored: the current one will report.

        Raises:
            ScheduleError: the event cannot happen now.
        """
        self._history.append(event)
        instructions: list[Instruction] = []
        if isinstance(event, WorkerJoined):
            self._nodes[event.worker] = self._idle[event.worker] = event.node
        elif isinstance(event, WorkerLost):
            instructions += self._lose_worker(event)
        elif isinstance(event, TaskArrived):
            self._add_task(event.task)
        elif isinstance(event, StreamEnded):
            self._ended, self._pulling = True, False
        elif self._is_current(event):
            self._release(event.task)
            if isinstance(event, StageFinished):
                self._finish(event)
            else:
                instructions += self._fail(event)
        instructions += self._fail_dependants()
        instructions += self._start_stages()
        return instructions

    def validate(self) -> None:
        """Check what must hold after every event.

        Raises:
            ScheduleError: it does not hold.
        """
        running = {task for task, state in self._tasks.items() if state.running}
        self._require(running == {run.task for run in self._busy.values()}, "running tasks and busy workers differ")
        self._require(not (self._idle.keys() & self._busy.keys()), "a worker is idle and busy")
        for task, state in self._tasks.items():
            self._require(not (state.running and state.failed), f"task {task} failed and runs")
            if state.next_stage is None and state.parent is not None:
                self._require(self._expert_ready(state.parent), f"task {task} is committed before its parent")
        idle_for_nothing = self._idle and any(self._ready(task) for task in self._tasks)
        self._require(not idle_for_nothing, "a worker is idle though a stage is ready")

    def _add_task(self, task: TaskId) -> None:
        known = task in self._tasks or task in self._committed
        self._require(not known and not self._ended, f"task {task} arrived twice, or after the stream's end")
        self._first = task if self._first is None else self._first
        self._tasks[task] = _Task()
        self._pulling = False

    def _is_current(self, event: StageFinished | StageFailed) -> bool:
        state = self._tasks.get(event.task)
        self._require(state is not None, f"a report of the unknown task {event.task}")
        assert state is not None
        return state.running and state.attempt == event.attempt and state.next_stage == event.stage

    def _release(self, task: TaskId) -> None:
        worker = next(worker for worker, run in self._busy.items() if run.task == task)
        del self._busy[worker]
        self._idle[worker] = self._nodes[worker]
        self._tasks[task].running = False
        self._tasks[task].node = self._nodes[worker]

    def _finish(self, event: StageFinished) -> None:
        state = self._tasks[event.task]
        if event.stage is Stage.FEATURES and event.task == self._first:
            self._has_statistics = True
        if event.stage is Stage.RELATE:
            self._require(event.parent is None or event.parent < event.task, f"{event} names a later parent")
            state.parent = event.parent
        following = _STAGES.index(event.stage) + 1
        state.next_stage = _STAGES[following] if following < len(_STAGES) else None

    def _fail(self, event: StageFailed) -> list[Instruction]:
        state = self._tasks[event.task]
        causes = state.causes.setdefault(event.stage, [])
        causes.append(event.cause)
        if decide(causes) is Decision.RETRY:
            return []
        state.failed = True
        return [ReportFailure(event.task, event.stage, event.message)]

    def _lose_worker(self, event: WorkerLost) -> list[Instruction]:
        self._require(event.worker in self._nodes, f"the unknown worker {event.worker!r} was lost")
        run = self._busy.get(event.worker)
        if run is not None:
            self._release(run.task)
        del self._nodes[event.worker], self._idle[event.worker]
        if run is None:
            return []
        return self._fail(StageFailed(run.task, run.stage, run.attempt, Cause.WORKER_LOST, event.message))

    def _fail_dependants(self) -> list[Instruction]:
        reports: list[Instruction] = []
        first_lost = not self._has_statistics and self._first is not None and self._tasks[self._first].failed
        for task in sorted(self._tasks):
            state = self._tasks[task]
            if state.failed or state.next_stage is None or state.running:
                continue
            reason = None
            if first_lost:
                reason = f"it needs the standardization statistics of task {self._first}, which failed"
            elif state.parent is not None and state.parent in self._tasks and self._tasks[state.parent].failed:
                reason = f"its expert starts from the expert of task {state.parent}, which failed"
            if reason is not None:
                state.failed = True
                reports.append(ReportFailure(task, state.next_stage, reason))
        return reports

    def _start_stages(self) -> list[Instruction]:
        instructions: list[Instruction] = []
        while self._idle:
            ready = [task for task in self._tasks if self._ready(task)]
            if not ready:
                break
            task = min(ready, key=lambda task: (_PRIORITY.index(self._next_stage(task)), task))
            state = self._tasks[task]
            worker = self._pick_worker(state.node)
            del self._idle[worker]
            state.attempt += 1
            state.running = True
            stage = self._next_stage(task)
            gives_statistics = stage is Stage.FEATURES and task == self._first and not self._has_statistics
            run = RunStage(task, stage, state.attempt, worker, gives_statistics)
            self._busy[worker] = run
            instructions.append(run)
        if self._idle and not self._ended and not self._pulling:
            self._pulling = True
            instructions.append(PullTask())
        return instructions

    def _pick_worker(self, node: str | None) -> str:
        """The idle worker on the node that holds the task's features, else the one that joined first."""
        near = [worker for worker, where in self._idle.items() if where == node]
        return (near or list(self._idle))[0]

    def _ready(self, task: TaskId) -> bool:
        state = self._tasks[task]
        if state.failed or state.running or state.next_stage is None:
            return False
        if state.next_stage is Stage.AUTOENCODER:
            return self._has_statistics
        if state.next_stage is Stage.RELATE:
            return all(t.failed or t.past(Stage.AUTOENCODER) for k, t in self._tasks.items() if k < task)
        if state.next_stage is Stage.EXPERT:
            return state.parent is None or self._expert_ready(state.parent)
        return True

    def _expert_ready(self, task: TaskId) -> bool:
        return task in self._committed or self._tasks[task].next_stage is None

    def _next_stage(self, task: TaskId) -> Stage:
        stage = self._tasks[task].next_stage
        assert stage is not None
        return stage

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ScheduleError(f"{message}; last events: {list(self._history)[-10:]}")
