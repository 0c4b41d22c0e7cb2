"""The seeded adversary: decides what a schedule is about, in which order things end, and everything that goes wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, repeat
from typing import TypeVar

from distributed_eg.schedule.events import Cause, Event, Stage
from distributed_eg.schedule.simulation.driver import SimulatedDriver
from distributed_eg.schedule.simulation.storage import BrokenInvariant, Call, Plan, SimulatedStorage, require
from distributed_eg.types import TaskId

Item = TypeVar("Item")

_MAX_TASKS = 6
_MAX_APPENDED = 3
_MAX_FAULTS = 8
_MAX_STEPS = 2000
_UNDISTURBED = 48
"""While there are faults left, a number is drawn for each report that comes in: this many of the numbers let it pass,
each further one is one of ``FAULTS``."""


class Chooser:
    """The numbers that decide a schedule: first the given ones, then a seed's random ones, then zeros.

    Zero always stands for what disturbs least: a schedule of zeros is one task that nothing happens to.
    """

    def __init__(self, seed: int | None, given: Sequence[int]) -> None:
        self.taken: list[int] = []
        further = repeat(0) if seed is None else map(random.Random(seed).getrandbits, repeat(32))
        self._numbers = chain(given, further)

    def below(self, bound: int) -> int:
        """A number from 0 to ``bound`` - 1."""
        if bound < 2:
            return 0
        choice = next(self._numbers) % bound
        self.taken.append(choice)
        return choice

    def one_of(self, items: Sequence[Item]) -> Item:
        """One of the items, of which there is at least one."""
        return items[self.below(len(items))]


def make_plan(choose: Chooser) -> Plan:
    """Choose what a schedule is about."""
    num_tasks = 1 + choose.below(_MAX_TASKS)
    num_earlier = max(0, choose.below(5) - 2)
    parents, continues = _ancestors(choose, range(num_earlier + num_tasks))
    has_reference = choose.below(5) == 4
    tasks_per_worker = choose.below(4) or None
    stop_on_failure = choose.below(6) == 5
    poison = None
    if choose.below(6) == 5:
        cause = choose.one_of((Cause.RAISED, Cause.WORKER_LOST, Cause.STORAGE))
        poison = (num_earlier + choose.below(num_tasks), choose.one_of(tuple(Stage)), cause)
    return Plan(
        parents,
        continues,
        num_earlier,
        has_reference=has_reference,
        tasks_per_worker=tasks_per_worker,
        stop_on_failure=stop_on_failure,
        poison=poison,
    )


def append_to(plan: Plan, choose: Chooser) -> Plan:
    """Choose what is retired once all of a plan's tasks are there, and which tasks a further call brings."""
    known = len(plan.parents)
    retired = frozenset(task for task in range(known) if choose.below(4) == 3)
    parents, continues = _ancestors(choose, range(known, known + 1 + choose.below(_MAX_APPENDED)), retired)
    return replace(
        plan, parents=plan.parents + parents, continues=plan.continues + continues, num_earlier=known, retired=retired
    )


def _ancestors(
    choose: Chooser, tasks: range, retired: Collection[TaskId] = ()
) -> tuple[tuple[TaskId | None, ...], tuple[TaskId | None, ...]]:
    """For each task an earlier one as its parent, or none; and the one that it continues, or none."""
    parents: list[TaskId | None] = []
    continues: list[TaskId | None] = []
    for task in tasks:
        parent = choose.below(task + 1) - 1
        parents.append(None if parent < 0 or parent in retired else parent)
        # An expert that goes on from an earlier version of its task has no other parent.
        continues.append(parents[-1] if parents[-1] is not None and choose.below(5) == 4 else None)
    return tuple(parents), tuple(continues)


class Adversary:
    """One schedule: drivers, one after another, over one storage, until one comes to its end undisturbed."""

    def __init__(
        self, choose: Chooser, driver_type: type[SimulatedDriver], history: list[Event], *, validates: bool
    ) -> None:
        self.plan = make_plan(choose)
        self.storage = SimulatedStorage(self.plan)
        self.faults: Counter[str] = Counter()
        self.num_drivers = 0
        self._choose = choose
        self._make_driver = partial(driver_type, self.storage, history, validates=validates)
        self._faults_left = choose.below(_MAX_FAULTS + 1)
        self._late: list[Call] = []
        """What may report though it no longer runs: it was given up, has reported before, or is an earlier driver's."""
        self._begin()

    def run(self) -> None:
        """Until the machine says that it is done, and nobody resumes the run after that.

        Raises:
            BrokenInvariant: something does not hold.
            ScheduleError: the machine found that by itself.
        """
        for _ in range(_MAX_STEPS):
            if not self.driver.machine.done:
                self._step()
                continue
            self.driver.check_end()
            if not self._faults_left or self._choose.below(4) < 3:
                is_whole = all(map(self.storage.is_committed, range(len(self.plan.parents))))
                if self.faults["appended"] or not is_whole or self._choose.below(4) < 3:
                    return
                self._append()
                continue
            self._fault("resumed after its end")
            self._restart()
        raise BrokenInvariant("every run ends", f"not after {_MAX_STEPS} steps")

    def _step(self) -> None:
        """One of the things happens that may happen next."""
        driver = self.driver
        possible: list[Call | str] = [*driver.running.values(), *self._late, *driver.leaving, *self._returning]
        if not possible:
            require(not driver.workers, "every run ends", "workers are idle, and the machine is not done")
            return self._join()
        position = self._choose.below(len(possible))
        if position:
            self.faults["report delayed"] += 1
        what = possible[position]
        if isinstance(what, Call):
            return self._end_or_disturb(what) if driver.runs(what) else self._report_late(what)
        if what in driver.leaving:
            return self._lose(what, Cause.NODE_LOST)
        self._returning.remove(what)
        return self._join(what)

    def _end_or_disturb(self, call: Call) -> None:
        """A call that runs ends well, unless the plan or a fault is against it."""
        drawn = self._choose.below(_UNDISTURBED + len(FAULTS)) if self._faults_left else 0
        poison = self.plan.poison
        if call.run.attempt in self._silent:
            self._lose(call.run.worker, Cause.OVERDUE)
        elif drawn >= _UNDISTURBED:
            name, disturb = FAULTS[drawn - _UNDISTURBED]
            self._fault(name)
            disturb(self, call)
        elif poison is None or poison[:2] != (call.run.task, call.run.stage):
            self.driver.finish(call)
        else:
            cause = poison[2]
            self.faults[f"poison: {cause.value}"] += 1
            if cause is Cause.WORKER_LOST:
                self._lose(call.run.worker, cause)
            else:
                self.driver.fail(call, cause)

    def _report_late(self, call: Call) -> None:
        self._late.remove(call)
        has_failed = self._choose.below(2)
        self.faults["stale failure" if has_failed else "stale result"] += 1
        return self.driver.fail(call, Cause.RAISED) if has_failed else self.driver.finish(call)

    def _fault(self, name: str) -> None:
        self._faults_left -= 1
        self.faults[name] += 1

    def _begin(self) -> None:
        """A driver begins with what storage tells, and with workers of its own."""
        self.num_drivers += 1
        self.driver = self._make_driver()
        self._names = map("w{}".format, count(1))
        self._returning: list[str] = []
        """Names of workers that went, and under which others may come."""
        self._silent: set[int] = set()
        """Attempts that nobody will hear of again."""
        for _ in range(1 + self._choose.below(4)):
            self._join()

    def _append(self) -> None:
        """Another process opens the run, which is whole, and brings further tasks."""
        self.faults["appended"] += 1
        self.plan = append_to(self.plan, self._choose)
        self.storage.append(self.plan)
        self._begin()

    def _restart(self) -> None:
        """The driver dies; what ran may still report, to the next one; files may be damaged meanwhile."""
        self._late = [*self.driver.running.values(), *self._late] if self._choose.below(2) else []
        self.faults["report to a later driver"] += len(self._late)
        if self._choose.below(3) == 2:
            for _ in range(1 + self._choose.below(3)):
                self._damage()
        self._begin()

    def _damage(self) -> None:
        """A file is lost, but none of an earlier call, which this one could not make again."""
        files = [key for key in self.storage.sealed if key not in self.storage.earlier]
        if files:
            task, stage = self._choose.one_of(files)
            del self.storage.sealed[task, stage]
            self.faults[f"{'statistics' if stage is Stage.FEATURES else stage.value} damaged"] += 1

    def _join(self, worker: str | None = None) -> None:
        """A worker comes: a new one, or another under the name of one that went."""
        self.driver.join(worker or next(self._names), self._choose.one_of("abc"))

    def _lose(self, worker: str, cause: Cause) -> None:
        """A worker goes; what it ran may report after all, and another may come under its name."""
        call = self.driver.running.get(worker)
        if call is not None and self._choose.below(3) == 2:
            self._late.append(call)
        if self._choose.below(3) == 0:
            self._returning.append(worker)
        self.driver.lose(worker, cause)

    # Faults of a call that was about to end well: what is not ended here runs on.

    def _on_node(self, call: Call, befall: Callable[[str], None]) -> None:
        """The same befalls all workers of the call's node."""
        workers = dict(self.driver.workers)
        for worker, node in workers.items():
            if node == workers[call.run.worker]:
                befall(worker)

    def _report_twice(self, call: Call) -> None:
        self._late.append(call)
        self.driver.finish(call)

    def _seal_twice(self, call: Call) -> None:
        """The coordinator sealed and died before it answered; the next one is asked again."""
        self.storage.seal(call)
        self.driver.finish(call)

    def _die_after_sealing(self, call: Call) -> None:
        self.storage.seal(call)
        self._restart()


FAULTS: tuple[tuple[str, Callable[[Adversary, Call], None]], ...] = (
    ("stage raised", lambda self, call: self.driver.fail(call, Cause.RAISED)),
    ("out of memory", lambda self, call: self.driver.fail(call, Cause.OUT_OF_MEMORY)),
    ("storage failed", lambda self, call: self.driver.fail(call, Cause.STORAGE)),
    ("worker lost", lambda self, call: self._lose(call.run.worker, Cause.WORKER_LOST)),
    ("any worker lost", lambda self, call: self._lose(self._choose.one_of([*self.driver.workers]), Cause.WORKER_LOST)),
    ("node lost", lambda self, call: self._on_node(call, partial(self._lose, cause=Cause.NODE_LOST))),
    ("node left with notice", lambda self, call: self._on_node(call, self.driver.leave)),
    ("worker joined", lambda self, call: self._join()),
    ("worker joined twice", lambda self, call: self.driver.join(call.run.worker, self.driver.workers[call.run.worker])),
    ("report lost", lambda self, call: self._silent.add(call.run.attempt)),
    ("report twice", Adversary._report_twice),
    ("coordinator died before sealing", lambda self, call: self.driver.finish(call)),
    ("coordinator died after sealing", Adversary._seal_twice),
    ("driver died", lambda self, call: self._restart()),
    ("driver died after sealing", Adversary._die_after_sealing),
)
