"""What a simulated schedule is checked against: its tasks, the storage that outlives drivers, and a driver that mirrors
the session's loop and holds the machine to what must hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distributed_eg.schedule.events import (
    Cause,
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
from distributed_eg.schedule.instructions import PullTask, ReportFailure, RunStage
from distributed_eg.schedule.machine import Machine
from distributed_eg.schedule.retry import RETRIES, RETRIES_PER_TASK
from distributed_eg.types import TaskId

_SEALED = (Stage.AUTOENCODER, Stage.RELATE, Stage.EXPERT)


class BrokenInvariant(AssertionError):
    """What must hold in every schedule did not.

    Args:
        invariant: what must hold.
        told: what was seen instead.
        choices: the schedule, for ``simulate(choices=…)``.
    """

    def __init__(self, invariant: str, told: str, choices: Sequence[int] = ()) -> None:
        super().__init__(invariant, told, choices)
        self.invariant = invariant
        self.told = told
        self.choices = tuple(choices)

    def __str__(self) -> str:
        return f"{self.invariant}: {self.told}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one schedule is about; the same for each of its drivers.

    ``parents`` and ``continues`` have an entry for each task. The first ``num_earlier`` tasks were sealed by an earlier
    call and do not arrive. A ``poison`` is a stage that always fails by that cause.
    """

    parents: tuple[TaskId | None, ...]
    continues: tuple[TaskId | None, ...]
    num_earlier: int = 0
    has_reference: bool = False
    tasks_per_worker: int | None = None
    stop_on_failure: bool = False
    poison: tuple[TaskId, Stage, Cause] | None = None


class Call(NamedTuple):
    """A stage that a worker was given, and what it will leave."""

    run: RunStage
    content: int
    parent: TaskId | None


class Storage:
    """The run directory: what each stage left, as a number that depends on the task and on all that the stage read.

    The standardization statistics are what FEATURES of the call's first task leave.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sealed: dict[Stage, dict[TaskId, int]] = {stage: {} for stage in Stage}
        self.parents: dict[TaskId, TaskId | None] = {}
        self.last_attempt = 0
        self.has_failed = False
        """Whether a driver has given a task up: from then on there may be fewer candidates, so other parents."""
        if plan.has_reference or plan.num_earlier:
            self.sealed[Stage.FEATURES][plan.num_earlier] = hash((0, plan.num_earlier))
        for task in range(plan.num_earlier):
            self.seal_all(task)

    @property
    def has_statistics(self) -> bool:
        """Whether the statistics are there."""
        return bool(self.sealed[Stage.FEATURES])

    def result(self, task: TaskId, stage: Stage) -> tuple[int, TaskId | None]:
        """What a stage makes of what is sealed now; with the task's parent after RELATE."""
        if stage is Stage.FEATURES:
            return hash((0, task)), None
        if stage is Stage.EXPERT:
            parent = self.parents[task]
            return hash((3, task, 0 if parent is None else self.sealed[Stage.EXPERT][parent])), None
        autoencoders = self.sealed[Stage.AUTOENCODER]
        statistics = self.sealed[Stage.FEATURES][self.plan.num_earlier]
        if stage is Stage.AUTOENCODER:
            before = self.plan.continues[task]
            return hash((1, task, statistics, 0 if before is None else autoencoders[before])), None
        parent = self.plan.parents[task]
        candidates = [autoencoders[earlier] for earlier in range(task) if earlier in autoencoders]
        # Only what has an autoencoder can be chosen.
        return hash((2, statistics, autoencoders[task], *candidates)), parent if parent in autoencoders else None

    def seal(self, task: TaskId, stage: Stage, content: int, parent: TaskId | None) -> None:
        """Seal a result; again the same changes nothing.

        Raises:
            BrokenInvariant: another result is sealed already.
        """
        known = self.sealed[stage].setdefault(task, content)
        if known != content:
            raise BrokenInvariant("a result is sealed once", f"{stage.value} of task {task} was sealed with another")
        if stage is Stage.RELATE:
            self.parents[task] = parent

    def seal_all(self, task: TaskId) -> None:
        """Seal what a task leaves where nothing goes wrong."""
        for stage in _SEALED:
            self.seal(task, stage, *self.result(task, stage))

    def done(self, task: TaskId) -> frozenset[Stage]:
        """Stages that need not run again; features are a cache that RELATE makes anew where it is missing."""
        done = {stage for stage in _SEALED if task in self.sealed[stage]}
        if Stage.AUTOENCODER in done:
            done.add(Stage.FEATURES)
        return frozenset(done)

    def is_committed(self, task: TaskId) -> bool:
        """Whether all that a task leaves is there."""
        gives_statistics = task == self.plan.num_earlier
        return all(task in self.sealed[stage] for stage in _SEALED) and (self.has_statistics or not gives_statistics)


def undisturbed(plan: Plan) -> Storage:
    """What ``plan`` leaves where nothing goes wrong."""
    storage = Storage(plan)
    first = plan.num_earlier
    storage.sealed[Stage.FEATURES][first] = hash((0, first))
    for task in range(first, len(plan.parents)):
        storage.seal_all(task)
    return storage


class Driver:
    """One driver over one machine, which asks, records, then tells, as the session does; and checks what it is asked.

    Args:
        storage: all that it knows of earlier drivers.
        expected: what the same tasks leave where nothing goes wrong.
        history: where every event is noted.
        validates: whether the machine is validated after every event.
    """

    machine_type: type[Machine] = Machine

    def __init__(self, storage: Storage, expected: Storage, history: list[Event], *, validates: bool) -> None:
        plan = storage.plan
        self.storage = storage
        self.plan = plan
        self.machine = self.machine_type(
            range(plan.num_earlier),
            has_statistics=storage.has_statistics,
            tasks_per_worker=plan.tasks_per_worker,
            first_attempt=self._first_attempt(),
            stop_on_failure=plan.stop_on_failure,
        )
        self.workers: dict[str, str] = {}
        self.leaving: set[str] = set()
        self.running: dict[str, RunStage] = {}
        self.failed: set[TaskId] = set()
        self.stopping = False
        self._expected = expected
        self._history = history
        self._validates = validates
        self._num_arrived = plan.num_earlier
        self._ended = False
        self._features: set[TaskId] = set()
        self._failures: defaultdict[TaskId, list[tuple[Stage, Cause]]] = defaultdict(list)
        self._spent: set[TaskId] = set()

    def _first_attempt(self) -> int:
        return self.storage.last_attempt + 1

    def join(self, worker: str, node: str) -> list[Call]:
        """A worker is ready; returns the calls that begin, as all of these do."""
        self.workers[worker] = node
        return self.tell(WorkerJoined(worker, node))

    def leave(self, worker: str) -> list[Call]:
        """A worker will go soon."""
        self.leaving.add(worker)
        return self.tell(WorkerLeaving(worker))

    def lose(self, worker: str, cause: Cause) -> list[Call]:
        """A worker is gone."""
        del self.workers[worker]
        self.leaving.discard(worker)
        run = self.running.pop(worker, None)
        if run is not None:
            self._note_failure(run, cause)
        return self.tell(WorkerLost(worker, cause.value, cause))

    def fail(self, run: RunStage, cause: Cause) -> list[Call]:
        """A report of a failure came in."""
        if self._is_current(run):
            del self.running[run.worker]
            self._note_failure(run, cause)
        return self.tell(StageFailed(run.task, run.stage, run.attempt, cause, cause.value))

    def finish(self, call: Call, num_seals: int = 1) -> list[Call]:
        """A report of a result came in: it is recorded if its attempt is current, and then told."""
        self.record(call, num_seals)
        run = call.run
        if self.running.get(run.worker) is run:
            del self.running[run.worker]
            if run.stage is Stage.FEATURES:
                self._features.add(run.task)
        return self.tell(StageFinished(run.task, run.stage, run.attempt, call.parent))

    def record(self, call: Call, num_seals: int = 1) -> None:
        """Seal a current attempt's result, as often as the coordinator is asked."""
        if self._is_current(call.run):
            for _ in range(num_seals):
                self._seal(call)

    def tell(self, event: Event) -> list[Call]:
        """Tell the machine and do what it says."""
        calls: list[Call] = []
        events = [event]
        for event in events:
            self._history.append(event)
            for instruction in self.machine.handle(event):
                if isinstance(instruction, RunStage):
                    self._check_start(instruction)
                    self.storage.last_attempt = instruction.attempt
                    self.running[instruction.worker] = instruction
                    calls.append(Call(instruction, *self.storage.result(instruction.task, instruction.stage)))
                elif isinstance(instruction, PullTask):
                    events.append(self._pull())
                else:
                    self._give_up(instruction)
            if self._validates:
                self.machine.validate()
        return calls

    def check_end(self) -> None:
        """Check what must hold once the machine is done."""
        plan, storage = self.plan, self.storage
        if self.running:
            raise BrokenInvariant("the end is the end", f"done while {list(self.running.values())} run")
        arrived = range(plan.num_earlier, self._num_arrived)
        committed = [task for task in arrived if storage.is_committed(task)]
        told = [task for task in arrived if self.machine.is_committed(task)]
        if told != committed:
            raise BrokenInvariant("the machine knows what is committed", f"{committed} are, told {told}")
        open_tasks = [task for task in arrived if task not in self.failed and task not in committed]
        if self.machine.unfinished != open_tasks:
            raise BrokenInvariant("no task is lost", f"unfinished {open_tasks}, told {self.machine.unfinished}")
        if not self.stopping and (open_tasks or not self._ended):
            raise BrokenInvariant("no task is lost", f"done, though {open_tasks} are open and nothing asked to stop")

    def _pull(self) -> Event:
        task = self._num_arrived
        if self._ended:
            raise BrokenInvariant("the stream ends once", "a pull after its end")
        if task == len(self.plan.parents):
            self._ended = True
            return StreamEnded()
        self._num_arrived += 1
        done = self.storage.done(task)
        if Stage.FEATURES in done:
            self._features.add(task)
        parent = self.storage.parents[task] if Stage.RELATE in done else None
        return TaskArrived(task, self.plan.continues[task], done, parent)

    def _check_start(self, run: RunStage) -> None:
        task, stage, worker, sealed = run.task, run.stage, run.worker, self.storage.sealed
        if run.attempt <= self.storage.last_attempt:
            raise BrokenInvariant("attempt numbers never repeat", f"{run} after {self.storage.last_attempt}")
        if worker not in self.workers or worker in self.leaving:
            raise BrokenInvariant("stages go to workers that stay", f"{run}; there are {self.workers}")
        if worker in self.running:
            raise BrokenInvariant("a worker does one thing at a time", f"{run} beside {self.running[worker]}")
        if any(other.task == task for other in self.running.values()):
            raise BrokenInvariant("a task does one thing at a time", f"{run} beside {self.running}")
        if task in self._spent or task in self.failed:
            raise BrokenInvariant("budgets are kept", f"{run} after {self._failures[task]}")
        if self.stopping:
            raise BrokenInvariant("a stopped run starts nothing", str(run))
        gives_statistics = stage is Stage.FEATURES and task == self.plan.num_earlier and not self.storage.has_statistics
        if run.with_statistics is not gives_statistics:
            raise BrokenInvariant("the first task gives the statistics", str(run))
        if stage is not Stage.FEATURES and task in sealed[stage]:
            raise BrokenInvariant("what is sealed is not run again", str(run))
        missing = self._missing(task, stage)
        if missing:
            raise BrokenInvariant("a stage starts when what it needs is there", f"{run} needs {missing}")

    def _missing(self, task: TaskId, stage: Stage) -> str:
        autoencoders = self.storage.sealed[Stage.AUTOENCODER]
        if stage is Stage.FEATURES:
            return ""
        if stage is Stage.EXPERT:
            if task not in self.storage.parents:
                return "its relatedness"
            parent = self.storage.parents[task]
            missing = parent is not None and parent not in self.storage.sealed[Stage.EXPERT]
            return f"the expert of task {parent}" if missing else ""
        if not self.storage.has_statistics or task not in self._features:
            return "the statistics and its own features"
        if stage is Stage.AUTOENCODER:
            before = self.plan.continues[task]
            missing = before is not None and before not in autoencoders
            return f"the autoencoder of task {before}" if missing else ""
        for earlier in range(task + 1):
            if earlier not in autoencoders and earlier not in self.failed:
                return f"the autoencoder of task {earlier}"
        return ""

    def _is_current(self, run: RunStage) -> bool:
        is_current = self.machine.is_current(run.task, run.stage, run.attempt)
        if is_current != (self.running.get(run.worker) is run):
            raise BrokenInvariant("the attempt that runs is the current one", f"{run} beside {self.running}")
        return is_current

    def _seal(self, call: Call) -> None:
        run = call.run
        if self.running.get(run.worker) is not run:
            raise BrokenInvariant("only a current attempt is sealed", str(run))
        if run.stage is Stage.FEATURES and not run.with_statistics:
            return
        self.storage.seal(run.task, run.stage, call.content, call.parent)
        may_differ = self.storage.has_failed and run.stage in (Stage.RELATE, Stage.EXPERT)
        if call.content != self._expected.sealed[run.stage][run.task] and not may_differ:
            raise BrokenInvariant("faults do not change results", str(run))

    def _note_failure(self, run: RunStage, cause: Cause) -> None:
        failures = self._failures[run.task]
        failures.append((run.stage, cause))
        blamed = sum(seen is not Cause.NODE_LOST for _, seen in failures)
        if failures.count((run.stage, cause)) > RETRIES[cause] or blamed > RETRIES_PER_TASK:
            self._spent.add(run.task)
            self.stopping |= self.plan.stop_on_failure or cause is Cause.STORAGE

    def _give_up(self, failure: ReportFailure) -> None:
        task = failure.task
        if task in self.failed or self.storage.is_committed(task):
            raise BrokenInvariant("a task is committed or reported, once", str(failure))
        parent = self.storage.parents.get(task)
        no_statistics = not self.storage.has_statistics and self.plan.num_earlier in self.failed
        needed_failed = self.plan.continues[task] in self.failed or parent in self.failed or no_statistics
        if task not in self._spent and not needed_failed:
            raise BrokenInvariant("a task is given up for a cause only", f"{failure} after {self._failures[task]}")
        self.failed.add(task)
        self.storage.has_failed = True
