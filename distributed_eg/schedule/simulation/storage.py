"""What drivers of a simulated schedule share: what the schedule is about, and the storage that outlives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distributed_eg.schedule.events import Cause, Stage
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


def require(condition: bool, invariant: str, *seen: object) -> None:
    """Raise ``BrokenInvariant`` with what was seen, unless ``condition`` holds."""
    if not condition:
        raise BrokenInvariant(invariant, "; ".join(map(str, seen)))


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


class SimulatedStorage:
    """The run directory: what each stage left, as a number that depends on the task and on all that the stage read.

    The standardization statistics are what FEATURES of the call's first task leave.

    Args:
        plan: what the schedule is about.
        complete: whether all is sealed from the beginning that the plan leaves where nothing goes wrong.
    """

    def __init__(self, plan: Plan, *, complete: bool = False) -> None:
        self.plan = plan
        self.sealed: dict[Stage, dict[TaskId, int]] = {stage: {} for stage in Stage}
        self.parents: dict[TaskId, TaskId | None] = {}
        self.last_attempt = 0
        self.has_failed = False
        """Whether a driver has given a task up: from then on there may be fewer candidates, so other parents."""
        num_sealed = len(plan.parents) if complete else plan.num_earlier
        if plan.has_reference or num_sealed:
            self.sealed[Stage.FEATURES][plan.num_earlier] = hash((0, plan.num_earlier))
        for task in range(num_sealed):
            for stage in _SEALED:
                self.seal(task, stage, *self.result(task, stage))

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
        require(known == content, "a result is sealed once", task, stage)
        if stage is Stage.RELATE:
            self.parents[task] = parent

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
