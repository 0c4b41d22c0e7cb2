"""What drivers of a simulated schedule share: what the schedule is about, and the storage that outlives them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from distributed_eg.schedule.events import Cause, Stage
from distributed_eg.schedule.instructions import RunStage
from distributed_eg.types import TaskId

_SEALED = (Stage.AUTOENCODER, Stage.RELATE, Stage.EXPERT)
Key: TypeAlias = tuple[TaskId, Stage]


class BrokenInvariant(AssertionError):
    """What must hold in every schedule did not: what that is, what was seen instead, and in which schedule.

    ``choices`` are the schedule, for ``simulate(choices=…)``; ``seed`` is where it was found.
    """

    def __init__(self, invariant: str, told: str, choices: Sequence[int] = (), seed: int | None = None) -> None:
        super().__init__(invariant, told, choices, seed)
        self.invariant, self.told, self.choices, self.seed = invariant, told, tuple(choices), seed

    def __str__(self) -> str:
        return f"{self.invariant}: {self.told}"


def require(condition: bool, invariant: str, *seen: object) -> None:
    """Raise ``BrokenInvariant`` with what was seen, unless ``condition`` holds."""
    if not condition:
        raise BrokenInvariant(invariant, "; ".join(map(str, seen)))


@dataclass(frozen=True, slots=True)
class Plan:
    """What one schedule is about; the same for each of its drivers.

    ``parents`` and ``continues`` have an entry for each task. The first ``num_earlier`` tasks were sealed by an earlier
    call and do not arrive; ``retired`` are those of them that the others are not related to. A ``poison`` is a stage
    that always fails by that cause.
    """

    parents: tuple[TaskId | None, ...]
    continues: tuple[TaskId | None, ...]
    num_earlier: int = 0
    retired: frozenset[TaskId] = frozenset()
    has_reference: bool = False
    tasks_per_worker: int | None = None
    stop_on_failure: bool = False
    poison: tuple[TaskId, Stage, Cause] | None = None


class Result(NamedTuple):
    """What a stage leaves: a number that depends on the task and all that the stage read; after RELATE the parent."""

    content: int
    parent: TaskId | None = None


class Call(NamedTuple):
    """A stage that a worker was given, and what it will leave."""

    run: RunStage
    result: Result


class SimulatedStorage:
    """The run directory: results by task and stage. FEATURES of the call's first task leave the statistics."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.last_attempt = 0
        self.has_failed = False
        """Whether a driver has given a task up: from then on there may be fewer candidates, so other parents."""
        self.statistics: Key = (plan.num_earlier, Stage.FEATURES)
        self.sealed: dict[Key, Result] = {}
        self.sealed[self.statistics] = self.result(*self.statistics, reads=())
        self.expected = self._expect(range(len(plan.parents)))
        """What the tasks leave where nothing goes wrong."""
        self.earlier = {key for key in self.expected if key[0] < plan.num_earlier}
        """What earlier calls left."""
        if plan.has_reference or plan.num_earlier:
            self.earlier.add(self.statistics)
        self.sealed = {key: self.expected[key] for key in self.earlier}

    def append(self, plan: Plan) -> None:
        """All of this call is sealed for good; the tasks that ``plan`` has more are brought by another one."""
        self.earlier, self.plan = set(self.sealed), plan
        self.expected = self._expect(range(plan.num_earlier, len(plan.parents)))

    def _expect(self, tasks: range) -> dict[Key, Result]:
        """What will be sealed once these tasks are, too, where nothing goes wrong."""
        before, self.sealed = self.sealed, dict(self.sealed)
        for task in tasks:
            for stage in _SEALED:
                self.sealed[task, stage] = self.result(task, stage, self.reads(task, stage))
        expected, self.sealed = self.sealed, before
        return expected

    @property
    def has_statistics(self) -> bool:
        """Whether the statistics are there."""
        return self.statistics in self.sealed

    def parent(self, task: TaskId) -> TaskId | None:
        """The parent that a task's RELATE left; None too where that has not run."""
        related = self.sealed.get((task, Stage.RELATE))
        return None if related is None else related.parent

    def reads(self, task: TaskId, stage: Stage, failed: Collection[TaskId] = ()) -> list[Key]:
        """What must be sealed before a stage starts: all that it reads. RELATE does without what ``failed``."""
        if stage is Stage.FEATURES:
            return []
        if stage is Stage.EXPERT:
            parent = self.parent(task)
            return [(task, Stage.RELATE), *([] if parent is None else [(parent, stage)])]
        if stage is Stage.AUTOENCODER:
            before = self.plan.continues[task]
            return [self.statistics, *([] if before is None else [(before, stage)])]
        retired = self.plan.retired if task >= self.plan.num_earlier else ()
        candidates = [(earlier, Stage.AUTOENCODER) for earlier in range(task + 1) if earlier not in retired]
        return [self.statistics, *(key for key in candidates if key in self.sealed or key[0] not in failed)]

    def result(self, task: TaskId, stage: Stage, reads: Sequence[Key]) -> Result:
        """What a stage makes of what it reads. Only a task whose autoencoder is read can become the parent."""
        parent = self.plan.parents[task]
        is_chosen = stage is Stage.RELATE and (parent, Stage.AUTOENCODER) in reads
        return Result(hash((task, stage, *map(self.sealed.__getitem__, reads))), parent if is_chosen else None)

    def seal(self, call: Call) -> None:
        """Seal what a stage left; features are a cache, and the same again changes nothing.

        Raises:
            BrokenInvariant: another result is sealed already, or what is left depends on faults.
        """
        run, result = call
        key = (run.task, run.stage)
        if run.stage is Stage.FEATURES and not run.with_statistics:
            return
        require(self.sealed.setdefault(key, result) == result, "a result is sealed once", run)
        may_differ = self.has_failed and run.stage in (Stage.RELATE, Stage.EXPERT)
        require(may_differ or result == self.expected[key], "faults do not change results", run)

    def done(self, task: TaskId) -> frozenset[Stage]:
        """Stages that need not run again; features are a cache that RELATE makes anew where it is missing."""
        done = {stage for stage in _SEALED if (task, stage) in self.sealed}
        return frozenset(done | {Stage.FEATURES} if Stage.AUTOENCODER in done else done)

    def is_committed(self, task: TaskId) -> bool:
        """Whether all that a task leaves is there."""
        gives_statistics = task == self.plan.num_earlier
        return len(self.done(task)) == len(Stage) and (self.has_statistics or not gives_statistics)
