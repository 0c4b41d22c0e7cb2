"""Whether a failed stage runs again: budgets by cause and by task, so that a poisonous task cannot use up the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from distributed_eg.schedule.events import Cause


class Decision(Enum):
    """What follows a failed attempt."""

    RETRY = "retry"
    FAIL_TASK = "fail task"


RETRIES: Mapping[Cause, int] = {
    Cause.RAISED: 0,
    Cause.STORAGE: 1,
    Cause.OUT_OF_MEMORY: 1,
    Cause.ACCELERATOR: 3,
    Cause.WORKER_LOST: 3,
    Cause.NODE_LOST: 50,
    Cause.OVERDUE: 1,
}
"""Further attempts at one stage of one task, by the cause of the failure."""

RETRIES_PER_TASK = 8
"""Further attempts at all stages of one task together. Lost nodes do not count: they are no task's fault, and a long
expert on preemptible machines outlives many of them."""


def decide(stage: Sequence[Cause], task: Sequence[Cause]) -> Decision:
    """Decide after a failed attempt.

    Args:
        stage: causes of the failed attempts at this stage, the newest last.
        task: causes of the failed attempts at all of the task's stages.
    """
    newest = stage[-1]
    blamed = sum(cause is not Cause.NODE_LOST for cause in task)
    within = stage.count(newest) <= RETRIES[newest] and blamed <= RETRIES_PER_TASK
    return Decision.RETRY if within else Decision.FAIL_TASK
