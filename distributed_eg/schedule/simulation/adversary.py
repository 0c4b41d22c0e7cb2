"""The seeded adversary: decides what a schedule is about, in which order things end, and everything that goes wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from distributed_eg.schedule.events import Cause, Event, Stage
from distributed_eg.schedule.simulation.world import BrokenInvariant, Call, Driver, Plan, Storage, undisturbed
from distributed_eg.types import TaskId

_MAX_TASKS = 6
_MAX_FAULTS = 8
_MAX_STEPS = 2000
_CALM = 48
"""Of as many draws plus one for each kind of fault, how many do no harm."""

Pending: TypeAlias = tuple[Literal["report", "overdue", "stale", "departure", "join"], Call | str]


class Chooser:
    """Hands out bounded numbers: first the given ones, then a seed's, then zeros; zero is always the tame choice."""

    def __init__(self, seed: int | None, given: Sequence[int]) -> None:
        self.taken: list[int] = []
        self._given = given
        self._random = None if seed is None else random.Random(seed).random

    def below(self, bound: int) -> int:
        """A number from 0 to ``bound`` - 1."""
        if bound < 2:
            return 0
        position = len(self.taken)
        if position < len(self._given):
            choice = self._given[position] % bound
        else:
            choice = 0 if self._random is None else int(self._random() * bound)
        self.taken.append(choice)
        return choice


def make_plan(choose: Chooser) -> Plan:
    """Choose what a schedule is about."""
    num_tasks = 1 + choose.below(_MAX_TASKS)
    num_earlier = max(0, choose.below(5) - 2)
    parents: list[TaskId | None] = []
    continues: list[TaskId | None] = []
    for task in range(num_earlier + num_tasks):
        parent = choose.below(task + 1) - 1
        parents.append(None if parent < 0 else parent)
        # An expert that goes on from an earlier version of its task has no other parent.
        continues.append(parents[-1] if parent >= 0 and choose.below(5) == 4 else None)
    has_reference = choose.below(5) == 4
    tasks_per_worker = choose.below(4) or None
    stop_on_failure = choose.below(6) == 5
    poison = None
    if choose.below(6) == 5:
        cause = (Cause.RAISED, Cause.WORKER_LOST, Cause.STORAGE)[choose.below(3)]
        poison = (num_earlier + choose.below(num_tasks), tuple(Stage)[choose.below(4)], cause)
    return Plan(tuple(parents), tuple(continues), num_earlier, has_reference, tasks_per_worker, stop_on_failure, poison)


class Adversary:
    """One schedule: drivers, one after another, over one storage, until one comes to its end undisturbed.

    Args:
        choose: decides everything.
        driver_type: what is tested.
        history: where every event is noted.
        validates: whether the machine is validated after every event.
    """

    def __init__(self, choose: Chooser, driver_type: type[Driver], history: list[Event], *, validates: bool) -> None:
        self.plan = make_plan(choose)
        self.storage = Storage(self.plan)
        self._history = history
        self.faults: Counter[str] = Counter()
        self.num_drivers = 0
        self._choose = choose
        self._driver_type = driver_type
        self._validates = validates
        self._expected = undisturbed(self.plan)
        self._faults_left = choose.below(_MAX_FAULTS + 1)
        self._pending: list[Pending] = []
        self._num_named = 0
        self._begin()

    def run(self) -> None:
        """Until the machine says that it is done, and nobody resumes the run after that.

        Raises:
            BrokenInvariant: something does not hold.
            ScheduleError: the machine found that by itself.
        """
        for _ in range(_MAX_STEPS):
            if self.driver.machine.done:
                self.driver.check_end()
                if not self._faults_left or self._choose.below(4) < 3:
                    return
                self._fault("resumed after its end")
                self._restart()
            else:
                self._step()
        raise BrokenInvariant("every run ends", f"not after {_MAX_STEPS} steps")

    def _step(self) -> None:
        if not self._pending:
            if self.driver.workers.keys() - self.driver.leaving:
                raise BrokenInvariant("every run ends", "workers are idle, nothing runs, and the machine is not done")
            self._join()
            return
        position = self._choose.below(len(self._pending))
        if position:
            self.faults["report delayed"] += 1
        kind, what = self._pending.pop(position)
        if isinstance(what, str):
            if kind == "join":
                self._join(what)
            elif what in self.driver.workers:
                self._lose(what, Cause.NODE_LOST)
        elif kind == "report":
            self._end_or_disturb(what)
        elif kind == "overdue":
            self._lose(what.run.worker, Cause.OVERDUE, what)
        elif self._choose.below(2):
            self.faults["stale failure"] += 1
            self._begin_calls(self.driver.fail(what.run, Cause.RAISED))
        else:
            self.faults["stale result"] += 1
            self._begin_calls(self.driver.finish(what))

    def _end_or_disturb(self, call: Call) -> None:
        fault = self._choose.below(_CALM + len(FAULTS)) - _CALM if self._faults_left else -1
        poison = self.plan.poison
        if fault >= 0:
            name, disturb = FAULTS[fault]
            self._fault(name)
            disturb(self, call)
        elif poison is None or poison[:2] != (call.run.task, call.run.stage):
            self._begin_calls(self.driver.finish(call))
        elif poison[2] is Cause.WORKER_LOST:
            self.faults["poison killed its worker"] += 1
            self._lose(call.run.worker, Cause.WORKER_LOST, call)
        else:
            self.faults["poison failed"] += 1
            self._begin_calls(self.driver.fail(call.run, poison[2]))

    def _fault(self, name: str) -> None:
        self._faults_left -= 1
        self.faults[name] += 1

    # The world

    def _begin(self) -> None:
        """A driver begins with what storage tells, and with workers of its own."""
        self.num_drivers += 1
        self._num_named = 0
        self.driver = self._driver_type(self.storage, self._expected, self._history, validates=self._validates)
        for _ in range(1 + self._choose.below(4)):
            self._join()

    def _restart(self) -> None:
        """The driver dies; what ran may still report, to the next one; files may be damaged meanwhile."""
        late = self._choose.below(2) == 1
        calls = [what for kind, what in self._pending if late and kind in ("report", "stale")]
        self._pending = [("stale", call) for call in calls]
        if calls:
            self.faults["report to a later driver"] += len(calls)
        if self._choose.below(3) == 2:
            self._damage()
        self._begin()

    def _damage(self) -> None:
        first = self.plan.num_earlier
        # What an earlier call sealed is not this one's to make again.
        derived = not (self.plan.has_reference or first)
        for _ in range(1 + self._choose.below(3)):
            files = [
                (stage, task)
                for stage, tasks in self.storage.sealed.items()
                for task in tasks
                if (derived if stage is Stage.FEATURES else task >= first)
            ]
            if files:
                stage, task = files[self._choose.below(len(files))]
                del self.storage.sealed[stage][task]
                self.faults[f"{'statistics' if stage is Stage.FEATURES else stage.value} damaged"] += 1
                if stage is Stage.RELATE:
                    del self.storage.parents[task]

    def _begin_calls(self, calls: list[Call]) -> None:
        for call in calls:
            self._pending.append(("report", call))

    def _join(self, worker: str | None = None) -> None:
        if worker is None:
            worker = f"w{self._num_named}"
            self._num_named += 1
        self._begin_calls(self.driver.join(worker, "abc"[self._choose.below(3)]))

    def _lose(self, worker: str, cause: Cause, call: Call | None = None) -> None:
        """A worker goes; what it ran (``call``, if that is not pending) may report after all, and another may come."""
        for index, (kind, what) in enumerate(self._pending):
            if not isinstance(what, str) and kind != "stale" and what.run.worker == worker:
                del self._pending[index]
                call = what
                break
        if call is not None and self._choose.below(3) == 2:
            self._pending.append(("stale", call))
        calls = self.driver.lose(worker, cause)
        if not self._choose.below(3):
            self._pending.append(("join", worker))
        self._begin_calls(calls)

    # What goes wrong; each is told the call whose report was due

    def _raises(self, call: Call) -> None:
        self._begin_calls(self.driver.fail(call.run, Cause.RAISED))

    def _out_of_memory(self, call: Call) -> None:
        self._begin_calls(self.driver.fail(call.run, Cause.OUT_OF_MEMORY))

    def _storage_fails(self, call: Call) -> None:
        self._begin_calls(self.driver.fail(call.run, Cause.STORAGE))

    def _worker_dies(self, call: Call) -> None:
        self._lose(call.run.worker, Cause.WORKER_LOST, call)

    def _any_worker_dies(self, call: Call) -> None:
        self._pending.append(("report", call))
        workers = list(self.driver.workers)
        self._lose(workers[self._choose.below(len(workers))], Cause.WORKER_LOST)

    def _node_dies(self, call: Call) -> None:
        self._pending.append(("report", call))
        for worker in self._neighbours(call):
            self._lose(worker, Cause.NODE_LOST)

    def _node_leaves(self, call: Call) -> None:
        self._pending.append(("report", call))
        for worker in self._neighbours(call):
            self._pending.append(("departure", worker))
            self._begin_calls(self.driver.leave(worker))

    def _neighbours(self, call: Call) -> list[str]:
        workers = self.driver.workers
        return [worker for worker, node in workers.items() if node == workers[call.run.worker]]

    def _worker_joins(self, call: Call) -> None:
        self._pending.append(("report", call))
        self._join()

    def _worker_joins_again(self, call: Call) -> None:
        self._pending.append(("report", call))
        self._begin_calls(self.driver.join(call.run.worker, self.driver.workers[call.run.worker]))

    def _report_lost(self, call: Call) -> None:
        self._pending.append(("overdue", call))

    def _report_twice(self, call: Call) -> None:
        self._begin_calls(self.driver.finish(call))
        self._pending.append(("stale", call))

    def _coordinator_dies_before_sealing(self, call: Call) -> None:
        self._begin_calls(self.driver.finish(call, num_seals=1))

    def _coordinator_dies_after_sealing(self, call: Call) -> None:
        self._begin_calls(self.driver.finish(call, num_seals=2))

    def _driver_dies(self, call: Call) -> None:
        self._pending.append(("report", call))
        self._restart()

    def _driver_dies_after_sealing(self, call: Call) -> None:
        self.driver.record(call)
        self._driver_dies(call)


FAULTS: tuple[tuple[str, Callable[[Adversary, Call], None]], ...] = (
    ("stage raised", Adversary._raises),
    ("out of memory", Adversary._out_of_memory),
    ("storage failed", Adversary._storage_fails),
    ("worker lost", Adversary._worker_dies),
    ("any worker lost", Adversary._any_worker_dies),
    ("node lost", Adversary._node_dies),
    ("node left with notice", Adversary._node_leaves),
    ("worker joined", Adversary._worker_joins),
    ("worker joined twice", Adversary._worker_joins_again),
    ("report lost", Adversary._report_lost),
    ("report twice", Adversary._report_twice),
    ("coordinator died before sealing", Adversary._coordinator_dies_before_sealing),
    ("coordinator died after sealing", Adversary._coordinator_dies_after_sealing),
    ("driver died", Adversary._driver_dies),
    ("driver died after sealing", Adversary._driver_dies_after_sealing),
)
