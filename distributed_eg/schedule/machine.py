"""The machine: which stage of which task may run now, on which worker, and what a failure costs.

    FEATURES ──▶ AUTOENCODER ──▶ RELATE ──▶ EXPERT
                 needs the       needs all   needs the
                 run's           earlier     parent's
                 statistics      autoencoders expert

A task's parent is known after RELATE only: experts form a forest that unfolds while the work goes on. Everything else
may run in any order; the results do not depend on it.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, MutableSequence
from dataclasses import dataclass, field
from itertools import filterfalse

from distributed_eg.schedule import events
from distributed_eg.schedule.events import Cause, Event, Stage, StageFailed, StageFinished, TaskArrived, WorkerLost
from distributed_eg.schedule.instructions import Instruction, PullTask, ReportFailure, RunStage
from distributed_eg.schedule.retry import Decision, decide
from distributed_eg.types import TaskId

_STAGES = tuple(Stage)
# A ready expert goes first: it is the longest stage and others wait for it. Then whatever is nearest to its end, so
# that few tasks hold features at a time.
_PRIORITY = (Stage.EXPERT, Stage.RELATE, Stage.AUTOENCODER, Stage.FEATURES)
_HISTORY = 10


class ScheduleError(AssertionError):
    """An event that cannot happen in this state: a slip of ours, told with the machine's last events."""


@dataclass(slots=True)
class _Task:
    continues: TaskId | None
    done: set[Stage]
    parent: TaskId | None
    run: RunStage | None = None
    failed: bool = False
    failures: list[StageFailed] = field(default_factory=list)
    node: str | None = None
    """Where its features lie."""
    shunned: str | None = None
    """A node that had no memory or no disk for it."""

    @property
    def next_stage(self) -> Stage | None:
        """The first stage that has not ended well; None where all have."""
        return next(filterfalse(self.done.__contains__, _STAGES), None)


class Machine:
    """Told every event through ``handle``; answers with what to do next.

    A task that cannot run yet waits in exactly one place, and whatever it waits for lets it go: an event costs the
    logarithm of the number of tasks.

    Args:
        committed: tasks that are sealed already, from an earlier call or an earlier run.
        has_statistics: whether the run's standardization statistics are known already.
        tasks_per_worker: unfinished tasks that may be pulled ahead for each worker; None: as many as there are.
        first_attempt: number of the first attempt; a later driver's are above all that an earlier one has given out.
        stop_on_failure: whether the first task that fails ends the run, once everything that runs has ended.
        history: where every event is noted; None: the last few are kept, to be told with an error.
    """

    def __init__(
        self,
        committed: Collection[TaskId] = (),
        *,
        has_statistics: bool = False,
        tasks_per_worker: int | None = None,
        first_attempt: int = 1,
        stop_on_failure: bool = False,
        history: MutableSequence[Event] | None = None,
    ) -> None:
        self._has_statistics = has_statistics
        self._tasks_per_worker = tasks_per_worker
        self.next_attempt = first_attempt
        """The number that the next attempt would get."""
        self._stop_on_failure = stop_on_failure
        self.stopping = False
        """Whether a failure ends the run before its stream's end."""
        self._first: TaskId | None = None
        """The task that arrived first, whose features give the statistics."""
        self._tasks = {task: _Task(None, set(Stage), None) for task in committed}
        self._earlier = set(committed)
        self._num_unfinished = 0
        self._ready: dict[Stage, list[TaskId]] = {stage: [] for stage in _PRIORITY}
        self._waiting: defaultdict[tuple[TaskId | None, Stage], list[TaskId]] = defaultdict(list)
        """Tasks by the stage of another task that they wait for."""
        self._wait_for_all_earlier: list[TaskId] = []
        self._without_autoencoder: list[TaskId] = []
        self._nodes: dict[str, str] = {}
        self._idle: dict[str, str] = {}
        self._leaving: set[str] = set()
        self._busy: dict[str, RunStage] = {}
        self._pulling = False
        self._ended = False
        self._history: MutableSequence[Event] = deque(maxlen=_HISTORY) if history is None else history

    @property
    def done(self) -> bool:
        """Whether nothing runs any more, and every task of the ended stream is committed or given up, or the run
        stops at a failure."""
        return not self._busy and (self.stopping or (self._ended and self._num_unfinished == 0))

    @property
    def unfinished(self) -> list[TaskId]:
        """Tasks that are neither committed nor given up."""
        return sorted(t for t, state in self._tasks.items() if not state.failed and state.next_stage is not None)

    def is_committed(self, task: TaskId) -> bool:
        """Whether all stages of a task have ended well."""
        return task in self._tasks and self._tasks[task].next_stage is None

    def handle(self, event: Event) -> list[Instruction]:
        """Take one event in; return what to do now. Reports are of attempts that run: ``Loop`` ignores all others.

        Raises:
            ScheduleError: the event cannot happen now.
        """
        self._history.append(event)
        instructions: list[Instruction] = []
        if isinstance(event, events.WorkerJoined):
            if event.worker not in self._nodes:
                self._nodes[event.worker] = self._idle[event.worker] = event.node
        elif isinstance(event, events.WorkerLeaving):
            if event.worker in self._nodes:
                self._leaving.add(event.worker)
                self._idle.pop(event.worker, None)
        elif isinstance(event, WorkerLost):
            instructions += self._lose_worker(event)
        elif isinstance(event, TaskArrived):
            instructions += self._add_task(event)
        elif isinstance(event, events.StreamEnded):
            self._ended, self._pulling = True, False
        else:
            run = self._tasks[event.task].run if event.task in self._tasks else None
            runs = run is not None and (run.stage, run.attempt) == (event.stage, event.attempt)
            self._require(runs, f"task {event.task}, attempt {event.attempt}: a report of what does not run")
            self._release(event.task)
            instructions += self._finish(event) if isinstance(event, StageFinished) else self._fail(event)
        instructions += self._start_stages()
        return instructions

    def validate(self) -> None:
        """Check what must hold after every event.

        Raises:
            ScheduleError: it does not hold.
        """
        running = {task for task, state in self._tasks.items() if state.run is not None}
        self._require(running == {run.task for run in self._busy.values()}, "running tasks and busy workers differ")
        self._require(not (self._idle.keys() & self._busy.keys()), "a worker is idle and busy")
        starved = self._idle and any(self._ready.values()) and not self.stopping
        self._require(not starved, "a worker is idle though a stage is ready")
        for run in self._busy.values():
            state = self._tasks[run.task]
            self._require(not state.failed, f"task {run.task} failed and runs")
            if run.stage is Stage.EXPERT and state.parent is not None:
                self._require(self._expert_ready(state.parent), f"task {run.task} trains before its parent's expert")
        unfinished = self.unfinished
        self._require(len(unfinished) == self._num_unfinished, "unfinished tasks are miscounted")
        waiting = [*running, *self._wait_for_all_earlier]
        for place in (*self._ready.values(), *self._waiting.values()):
            waiting += place
        self._require(sorted(waiting) == unfinished, "a task is in no place, or in two")

    def _add_task(self, event: TaskArrived) -> list[Instruction]:
        is_new = event.task not in self._tasks or event.task in self._earlier
        self._require(is_new and not self._ended, f"task {event.task} arrived twice, or after the stream's end")
        self._earlier.discard(event.task)  # brought again: a call was cut off, and a file of its may be damaged
        self._first = event.task if self._first is None else self._first
        state = self._tasks[event.task] = _Task(event.continues, set(event.done), event.parent)
        self._pulling = False
        if event.task == self._first and not self._has_statistics:
            state.done.discard(Stage.FEATURES)
        if state.next_stage is None:
            return []
        self._num_unfinished += 1
        heapq.heappush(self._without_autoencoder, event.task)
        return self._advance(event.task)

    def _advance(self, task: TaskId) -> list[Instruction]:
        """Put a task that does not run where its next stage's needs let it be: ready, waiting, or given up."""
        state = self._tasks[task]
        stage = state.next_stage
        if stage is not Stage.EXPERT and self._statistics_are_lost():
            needed = f"it needs the standardization statistics of task {self._first}, which failed"
            return self._give_up(task, needed)
        if stage in (Stage.AUTOENCODER, Stage.RELATE) and not self._has_statistics:
            self._waiting[self._first, Stage.FEATURES].append(task)
            return []
        if stage is Stage.AUTOENCODER:
            if state.continues is not None:
                before = self._tasks[state.continues]
                if before.failed:
                    return self._give_up(task, f"it continues task {state.continues}, which failed")
                if Stage.AUTOENCODER not in before.done:
                    self._waiting[state.continues, stage].append(task)
                    return []
        elif stage is Stage.RELATE:
            if self._first_without_autoencoder() < task:
                heapq.heappush(self._wait_for_all_earlier, task)
                return []
        elif stage is Stage.EXPERT and state.parent is not None and not self._expert_ready(state.parent):
            if state.parent not in self._tasks or self._tasks[state.parent].failed:
                needed = f"its expert starts from the expert of task {state.parent}, which failed or was left out"
                return self._give_up(task, needed)
            self._waiting[state.parent, stage].append(task)
            return []
        assert stage is not None
        heapq.heappush(self._ready[stage], task)
        return []

    def _advance_all(self, tasks: Iterable[TaskId]) -> list[Instruction]:
        return [instruction for task in sorted(tasks) for instruction in self._advance(task)]

    def _finish(self, event: StageFinished) -> list[Instruction]:
        state = self._tasks[event.task]
        if event.stage is Stage.RELATE:
            known = event.parent is None or (event.parent in self._tasks and event.parent < event.task)
            self._require(known, f"task {event.task} names parent {event.parent}, unknown or later")
            state.parent = event.parent
        state.done.add(event.stage)
        freed = self._waiting.pop((event.task, event.stage), [])
        if event.stage is Stage.FEATURES:
            self._has_statistics |= event.task == self._first
        elif event.stage is Stage.AUTOENCODER:
            freed += self._related_now()
        if state.next_stage is None:
            self._num_unfinished -= 1
            return self._advance_all(freed)
        return self._advance_all([event.task, *freed])

    def _fail(self, event: StageFailed) -> list[Instruction]:
        state = self._tasks[event.task]
        if event.cause in (Cause.OUT_OF_MEMORY, Cause.STORAGE):
            state.shunned = state.node
        failures = state.failures
        failures.append(event)
        of_stage = [failure for failure in failures if failure.stage is event.stage]
        if decide([f.cause for f in of_stage], [f.cause for f in failures]) is Decision.RETRY:
            return self._advance(event.task)
        # A storage that does not take what is written would fail every task that is left, hours of work each.
        self.stopping |= self._stop_on_failure or event.cause is Cause.STORAGE
        if len(failures) == 1:
            return self._give_up(event.task, event.message)
        told = "".join(f"\n  {f.stage.value}, {f.cause.value}: {f.message}" for f in failures)
        return self._give_up(event.task, f"{len(failures)} attempts failed:{told}")

    def _give_up(self, task: TaskId, message: str) -> list[Instruction]:
        """Fail a task that is in no waiting place, and whatever waits for it."""
        state = self._tasks[task]
        assert state.next_stage is not None
        state.failed = True
        self._num_unfinished -= 1
        reports: list[Instruction] = [ReportFailure(task, state.next_stage, message, tuple(state.failures))]
        freed = self._related_now()
        for stage in _STAGES:
            freed += self._waiting.pop((task, stage), [])
        if self._statistics_are_lost():
            freed += self._ready[Stage.FEATURES]
            self._ready[Stage.FEATURES] = []
        return reports + self._advance_all(freed)

    def _lose_worker(self, event: WorkerLost) -> list[Instruction]:
        run = self._busy.get(event.worker)
        if run is not None:
            self._release(run.task)
        self._nodes.pop(event.worker, None)  # unknown if it was leaving when this machine began, or is reported twice
        self._idle.pop(event.worker, None)
        self._leaving.discard(event.worker)
        if run is None:
            return []
        return self._fail(StageFailed(run.task, run.stage, run.attempt, event.cause, event.message))

    def _release(self, task: TaskId) -> None:
        state = self._tasks[task]
        assert state.run is not None
        worker = state.run.worker
        state.run, state.node = None, self._nodes[worker]
        del self._busy[worker]
        if worker not in self._leaving:
            self._idle[worker] = self._nodes[worker]

    def _start_stages(self) -> list[Instruction]:
        instructions: list[Instruction] = []
        if self.stopping or not self._idle:
            return instructions
        for stage in _PRIORITY:
            while self._idle and self._ready[stage]:
                instructions.append(self._start(heapq.heappop(self._ready[stage]), stage))
        per_worker = self._tasks_per_worker
        has_room = per_worker is None or self._num_unfinished < per_worker * len(self._nodes)
        if self._idle and has_room and not self._ended and not self._pulling:
            self._pulling = True
            instructions.append(PullTask())
        return instructions

    def _start(self, task: TaskId, stage: Stage) -> RunStage:
        state = self._tasks[task]
        # The idle worker on the node that holds the task's features, else the one that has been idle longest.
        usable = {worker: node for worker, node in self._idle.items() if node != state.shunned} or self._idle
        near = (worker for worker, node in usable.items() if node == state.node)
        worker = next(near, next(iter(usable)))
        del self._idle[worker]
        gives_statistics = stage is Stage.FEATURES and task == self._first and not self._has_statistics
        state.run = self._busy[worker] = RunStage(task, stage, self.next_attempt, worker, gives_statistics)
        self.next_attempt += 1
        return state.run

    def _related_now(self) -> list[TaskId]:
        """Take out the tasks that waited for earlier autoencoders and need wait no longer."""
        freed = []
        first_missing = self._first_without_autoencoder()
        while self._wait_for_all_earlier and self._wait_for_all_earlier[0] < first_missing:
            freed.append(heapq.heappop(self._wait_for_all_earlier))
        return freed

    def _first_without_autoencoder(self) -> float:
        missing = self._without_autoencoder
        while missing and (self._tasks[missing[0]].failed or Stage.AUTOENCODER in self._tasks[missing[0]].done):
            heapq.heappop(missing)
        return missing[0] if missing else float("inf")

    def _statistics_are_lost(self) -> bool:
        return not self._has_statistics and self._first is not None and self._tasks[self._first].failed

    def _expert_ready(self, task: TaskId) -> bool:
        return task in self._tasks and Stage.EXPERT in self._tasks[task].done

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ScheduleError(f"{message}; last events: {list(self._history)[-_HISTORY:]}")
