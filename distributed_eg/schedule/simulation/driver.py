"""A driver of a simulated schedule: the real loop over the real machine, and ports that check whatever it asks."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import NamedTuple

from distributed_eg.schedule.events import Cause, Event, Stage, TaskArrived, WorkerJoined, WorkerLeaving, WorkerLost
from distributed_eg.schedule.instructions import ReportFailure, RunStage
from distributed_eg.schedule.loop import Loop, Ports
from distributed_eg.schedule.machine import Machine
from distributed_eg.schedule.retry import RETRIES, RETRIES_PER_TASK
from distributed_eg.schedule.simulation.storage import SimulatedStorage, require
from distributed_eg.types import TaskId


class Call(NamedTuple):
    """A stage that a worker was given, and its result: what it will leave, and after RELATE the parent."""

    run: RunStage
    content: int
    parent: TaskId | None


class SimulatedDriver(Ports[Call]):
    """Told what happens to its workers and what they report, it tells the loop; the loop decides, the ports check.

    Args:
        storage: all that it knows of earlier drivers.
        expected: what the same tasks leave where nothing goes wrong.
        history: where the machine notes every event.
        validates: whether machine and loop are checked after every event.
    """

    loop_type: type[Loop[Call]] = Loop
    machine_type: type[Machine] = Machine

    def __init__(
        self, storage: SimulatedStorage, expected: SimulatedStorage, history: list[Event], *, validates: bool
    ) -> None:
        plan = storage.plan
        self.machine = self.machine_type(
            range(plan.num_earlier),
            has_statistics=storage.has_statistics,
            tasks_per_worker=plan.tasks_per_worker,
            first_attempt=storage.last_attempt + 1,
            stop_on_failure=plan.stop_on_failure,
            history=history,
        )
        self.workers: dict[str, str] = {}
        """The node of each."""
        self.leaving: dict[str, str] = {}
        self.running: dict[str, Call] = {}
        """What each busy worker really does, whatever the loop takes it for."""
        self.committed: list[TaskId] = []
        self.failed: set[TaskId] = set()
        self.stopping = False
        # Without a cycle, which would leave whole schedules to the garbage collector.
        self._loop = self.loop_type(self.machine, weakref.proxy(self))
        self._storage = storage
        self._plan = plan
        self._expected = expected
        self._validates = validates
        self._arrived = range(plan.num_earlier, plan.num_earlier)
        self._ended = False
        self._to_record: Call | None = None
        self._features: set[TaskId] = set()
        self._failures: defaultdict[TaskId, list[tuple[Stage, Cause]]] = defaultdict(list)
        self._spent: set[TaskId] = set()

    # What happens to it

    def join(self, worker: str, node: str) -> None:
        """A worker is ready."""
        self.workers[worker] = node
        self._tell(WorkerJoined(worker, node))

    def leave(self, worker: str) -> None:
        """A worker will go soon."""
        self.leaving[worker] = self.workers[worker]
        self._tell(WorkerLeaving(worker))

    def lose(self, worker: str, cause: Cause) -> None:
        """A worker is gone."""
        del self.workers[worker]
        self.leaving.pop(worker, None)
        if worker in self.running:
            self._note_failure(self.running.pop(worker).run, cause)
        self._tell(WorkerLost(worker, cause.value, cause))

    def fail(self, call: Call, cause: Cause) -> None:
        """A failure is reported, perhaps of a call that was given up or has reported before."""
        run = call.run
        if self.running.get(run.worker) is call:
            del self.running[run.worker]
            self._note_failure(run, cause)
        self._loop.failed(run.attempt, cause, cause.value)
        self._check_event()

    def finish(self, call: Call) -> None:
        """A result is reported, perhaps of a call that was given up or has reported before."""
        run = call.run
        if self.running.get(run.worker) is call:
            self._to_record = self.running.pop(run.worker)
        self._loop.finished(run.attempt, call)
        require(self._to_record is None, "the result of an attempt that runs is recorded", run)
        self._check_event()

    def seal(self, call: Call) -> None:
        """The coordinator seals a result."""
        run = call.run
        if run.stage is not Stage.FEATURES or run.with_statistics:
            self._storage.seal(run.task, run.stage, call.content, call.parent)
            same = call.content == self._expected.sealed[run.stage][run.task]
            may_differ = self._storage.has_failed and run.stage in (Stage.RELATE, Stage.EXPERT)
            require(same or may_differ, "faults do not change results", run)

    # The ports

    def pull(self) -> TaskArrived | None:
        if self._validates:
            self.machine.validate()
        require(not self._ended, "the stream ends once", "a pull after its end")
        task, arrival = self._arrived.stop, None
        if task < len(self._plan.parents):
            self._arrived = range(self._plan.num_earlier, task + 1)
            parent = self._storage.parents.get(task)
            arrival = TaskArrived(task, self._plan.continues[task], self._storage.done(task), parent)
        self._ended = arrival is None
        return arrival

    def submit(self, run: RunStage) -> None:
        self._check_start(run)
        self._storage.last_attempt = run.attempt
        self.running[run.worker] = Call(run, *self._storage.result(run.task, run.stage))

    def record(self, run: RunStage, result: Call) -> TaskId | None:
        is_due = result is self._to_record and result.run is run
        require(is_due, "a result is recorded once, and only if its attempt runs", run)
        self._to_record = None
        if run.stage is Stage.FEATURES:
            self._features.add(run.task)
        self.seal(result)
        return result.parent

    def commit(self, task: TaskId) -> None:
        require(self._storage.is_committed(task), "a task is committed after all of it is sealed", task)
        is_next = task == self._first_open()
        require(is_next, "tasks are committed once, in order of arrival", task, self.committed, self.failed)
        self.committed.append(task)

    def give_up(self, failure: ReportFailure) -> None:
        task, storage = failure.task, self._storage
        settled = task in self.failed or storage.is_committed(task)
        require(not settled, "a task is committed or reported, once", failure)
        no_statistics = not storage.has_statistics and self._plan.num_earlier in self.failed
        needs = {self._plan.continues[task], storage.parents.get(task)}
        has_cause = task in self._spent or no_statistics or bool(needs & self.failed)
        require(has_cause, "a task is given up for a cause only", failure, self._failures[task])
        self.failed.add(task)
        storage.has_failed = True

    # What must hold

    def check_end(self) -> None:
        """Check what must hold once the machine is done."""
        require(not self.running, "the end is the end", self.running)
        self._check_loop()
        unfinished = self.machine.unfinished
        settled = [task for task in self._arrived if task in self.failed or self._storage.is_committed(task)]
        no_task_lost = sorted([*settled, *unfinished]) == [*self._arrived]
        require(no_task_lost, "no task is lost", self._arrived, settled, unfinished)
        complete = self._ended and not unfinished
        require(complete or self.stopping, "no task is lost", "done, though nothing asked to stop", unfinished)

    def _tell(self, event: Event) -> None:
        self._loop.tell(event)
        self._check_event()

    def _check_event(self) -> None:
        if self._validates:
            self.machine.validate()
            self._check_loop()

    def _check_loop(self) -> None:
        runs = {call.run.attempt: call.run for call in self.running.values()}
        require(self._loop.runs == runs, "the loop knows what runs", self._loop.runs, runs)
        first_open = self._first_open()
        late = first_open is not None and self._storage.is_committed(first_open)
        require(not late, "a task is committed as soon as it can be", first_open)

    def _first_open(self) -> TaskId | None:
        """The first task that arrived and was neither committed nor given up."""
        return next((task for task in self._arrived if task not in self.committed and task not in self.failed), None)

    def _check_start(self, run: RunStage) -> None:
        task, stage, worker, storage = run.task, run.stage, run.worker, self._storage
        require(run.attempt > storage.last_attempt, "attempt numbers never repeat", run, storage.last_attempt)
        is_free = worker in self.workers and worker not in self.leaving and worker not in self.running
        require(is_free, "stages go to idle workers that stay", run, self.workers, self.leaving, self.running)
        tasks = [call.run.task for call in self.running.values()]
        require(task not in tasks, "a task does one thing at a time", run, self.running)
        in_budget = task not in self._spent and task not in self.failed
        require(in_budget, "budgets are kept", run, self._failures)
        require(not self.stopping, "a stopped run starts nothing", run)
        gives_statistics = stage is Stage.FEATURES and task == self._plan.num_earlier and not storage.has_statistics
        require(run.with_statistics is gives_statistics, "the first task gives the statistics", run)
        again = stage is not Stage.FEATURES and task in storage.sealed[stage]
        require(not again, "what is sealed is not run again", run)
        missing = self._missing(task, stage)
        require(not missing, "a stage starts when what it needs is there", run, missing)

    def _missing(self, task: TaskId, stage: Stage) -> str:
        storage, autoencoders = self._storage, self._storage.sealed[Stage.AUTOENCODER]
        if stage is Stage.EXPERT:
            parent = storage.parents.get(task)
            if task not in storage.parents:
                return "its relatedness"
            return f"the expert of task {parent}" if parent not in (None, *storage.sealed[Stage.EXPERT]) else ""
        if stage is Stage.RELATE:
            for earlier in range(task + 1):
                if earlier not in autoencoders and earlier not in self.failed:
                    return f"the autoencoder of task {earlier}"
        if stage is Stage.AUTOENCODER:
            before = self._plan.continues[task]
            if task not in self._features:
                return "its own features"
            if before not in (None, *autoencoders):
                return f"the autoencoder of task {before}"
        return "" if stage is Stage.FEATURES or storage.has_statistics else "the statistics"

    def _note_failure(self, run: RunStage, cause: Cause) -> None:
        failures = self._failures[run.task]
        failures.append((run.stage, cause))
        blamed = sum(seen is not Cause.NODE_LOST for _, seen in failures)
        if failures.count((run.stage, cause)) > RETRIES[cause] or blamed > RETRIES_PER_TASK:
            self._spent.add(run.task)
            self.stopping |= self._plan.stop_on_failure or cause is Cause.STORAGE
