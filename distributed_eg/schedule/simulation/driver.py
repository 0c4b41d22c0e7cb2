"""A driver of a simulated schedule: the real loop over the real machine, and ports that check whatever it asks."""

from __future__ import annotations

import weakref
from collections import defaultdict

from distributed_eg.schedule.events import Cause, Event, Stage, TaskArrived, WorkerJoined, WorkerLeaving, WorkerLost
from distributed_eg.schedule.instructions import ReportFailure, RunStage
from distributed_eg.schedule.loop import Loop, Ports
from distributed_eg.schedule.machine import Machine
from distributed_eg.schedule.retry import RETRIES, RETRIES_PER_TASK
from distributed_eg.schedule.simulation.storage import Call, SimulatedStorage, require
from distributed_eg.types import TaskId


class SimulatedDriver(Ports[Call]):
    """Tells the loop what befalls its workers and what they report, and checks all that the loop asks for.

    It knows of earlier drivers what ``storage`` holds. The machine notes every event in ``history``; with ``validates``
    machine and loop are checked after each.
    """

    loop_type: type[Loop[Call]] = Loop
    machine_type: type[Machine] = Machine

    def __init__(self, storage: SimulatedStorage, history: list[Event], *, validates: bool) -> None:
        self._storage = storage
        self._plan = plan = storage.plan
        self._validates = validates
        self.machine = self.machine_type(
            range(plan.num_earlier),
            has_statistics=storage.has_statistics,
            tasks_per_worker=plan.tasks_per_worker,
            first_attempt=storage.last_attempt + 1,
            stop_on_failure=plan.stop_on_failure,
            history=history,
        )
        # Without a cycle, which would leave whole schedules to the garbage collector.
        self._loop = self.loop_type(self.machine, weakref.proxy(self))
        self.workers: dict[str, str] = {}
        """The node of each."""
        self.leaving: dict[str, str] = {}
        self.running: dict[str, Call] = {}
        """What each busy worker really does, whatever the loop takes it for."""
        self.failed: set[TaskId] = set()
        self.stopping = False
        self._stream = iter(range(plan.num_earlier, len(plan.parents)))
        self._ended = False
        self._open: list[TaskId] = []
        """Tasks that arrived, and were neither committed nor given up."""
        self._features: set[TaskId] = set()
        self._failures: defaultdict[TaskId, list[tuple[Stage, Cause]]] = defaultdict(list)
        self._spent: set[TaskId] = set()
        """Tasks whose failures have used up a budget."""

    def runs(self, call: Call) -> bool:
        """Whether it has neither ended nor gone with its worker."""
        return self.running.get(call.run.worker) is call

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
            self._end_badly(self.running[worker], cause)
        self._tell(WorkerLost(worker, cause.value, cause))

    def fail(self, call: Call, cause: Cause) -> None:
        """A failure is reported, perhaps of a call that was given up or has reported before."""
        if self.runs(call):
            self._end_badly(call, cause)
        self._loop.failed(call.run.attempt, cause, cause.value)
        self._check_event()

    def finish(self, call: Call) -> None:
        """A result is reported, perhaps of a call that was given up or has reported before."""
        self._loop.finished(call.run.attempt, call)
        require(not self.runs(call), "the result of an attempt that runs is recorded", call.run)
        self._check_event()

    # The ports

    def pull(self) -> TaskArrived | None:
        require(not self._ended, "the stream ends once", "a pull after its end")
        task = next(self._stream, None)
        if task is None:
            self._ended = True
            return None
        self._open.append(task)
        return TaskArrived(task, self._plan.continues[task], self._storage.done(task), self._storage.parent(task))

    def submit(self, run: RunStage) -> None:
        reads = self._storage.reads(run.task, run.stage, self.failed)
        self._check_start(run, missing=[key for key in reads if key not in self._storage.sealed])
        self._storage.last_attempt = run.attempt
        self.running[run.worker] = Call(run, self._storage.result(run.task, run.stage, reads))

    def record(self, run: RunStage, call: Call) -> TaskId | None:
        is_due = self.runs(call) and call.run is run
        require(is_due, "a result is recorded once, and only if its attempt runs", run)
        del self.running[run.worker]
        if run.stage is Stage.FEATURES:
            self._features.add(run.task)
        self._storage.seal(call)
        return call.result.parent

    def commit(self, task: TaskId) -> None:
        require(self._storage.is_committed(task), "a task is committed after all of it is sealed", task)
        require(self._open[:1] == [task], "tasks are committed once, in order of arrival", task, self._open)
        del self._open[0]

    def give_up(self, failure: ReportFailure) -> None:
        task, storage = failure.task, self._storage
        is_open = task in self._open and not storage.is_committed(task)
        require(is_open, "a task is committed or reported, once", failure)
        no_statistics = not storage.has_statistics and self._plan.num_earlier in self.failed
        needs = {self._plan.continues[task], storage.parent(task)}
        has_cause = task in self._spent or no_statistics or bool(needs & self.failed)
        require(has_cause, "a task is given up for a cause only", failure, self._failures[task])
        self._open.remove(task)
        self.failed.add(task)
        storage.has_failed = True

    # What must hold

    def check_end(self) -> None:
        """Check what must hold once the machine is done."""
        require(not self.running, "the end is the end", self.running)
        self._check_loop()
        unfinished = [task for task in self._open if not self._storage.is_committed(task)]
        require(self.machine.unfinished == unfinished, "no task is lost", unfinished, self.machine.unfinished)
        complete = self._ended and not unfinished
        require(complete or self.stopping, "no task is lost", "done, though nothing asked to stop", unfinished)

    def _check_event(self) -> None:
        if self._validates:
            self.machine.validate()
            self._check_loop()

    def _check_loop(self) -> None:
        runs = {call.run.attempt: call.run for call in self.running.values()}
        require(self._loop.runs == runs, "the loop knows what runs", self._loop.runs, runs)
        is_late = bool(self._open) and self._storage.is_committed(self._open[0])
        require(not is_late, "a task is committed as soon as it can be", self._open)

    def _check_start(self, run: RunStage, missing: list[tuple[TaskId, Stage]]) -> None:
        task, stage, worker, storage = run.task, run.stage, run.worker, self._storage
        has_features = stage is not Stage.AUTOENCODER or task in self._features
        require(has_features and not missing, "a stage starts when what it needs is there", run, missing)
        require(run.attempt > storage.last_attempt, "attempt numbers never repeat", run, storage.last_attempt)
        is_free = worker in self.workers and worker not in self.leaving and worker not in self.running
        require(is_free, "stages go to idle workers that stay", run, self.workers, self.leaving, self.running)
        tasks = [call.run.task for call in self.running.values()]
        require(task not in tasks, "a task does one thing at a time", run, self.running)
        in_budget = task not in self._spent and task not in self.failed
        require(in_budget, "budgets are kept", run, self._failures)
        require(not self.stopping, "a stopped run starts nothing", run)
        gives_statistics = (task, stage) == storage.statistics and not storage.has_statistics
        require(run.with_statistics is gives_statistics, "the first task gives the statistics", run)
        again = stage is not Stage.FEATURES and (task, stage) in storage.sealed
        require(not again, "what is sealed is not run again", run)

    def _tell(self, event: Event) -> None:
        self._loop.tell(event)
        self._check_event()

    def _end_badly(self, call: Call, cause: Cause) -> None:
        """A call that runs fails; whether there may be another attempt is counted apart from the machine."""
        run = call.run
        del self.running[run.worker]
        failures = self._failures[run.task]
        failures.append((run.stage, cause))
        blamed = sum(seen is not Cause.NODE_LOST for _, seen in failures)
        if failures.count((run.stage, cause)) > RETRIES[cause] or blamed > RETRIES_PER_TASK:
            self._spent.add(run.task)
            self.stopping |= self._plan.stop_on_failure or cause is Cause.STORAGE
