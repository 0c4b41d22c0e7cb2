"""Whether a failed stage runs again: one budget per cause, so that a poisonous task cannot use up the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from distributed_eg.schedule.events import Cause


class Decision(Enum):
    """What follows a failed attempt."""

    RETRY = "retry"
    FAIL_TASK = "fail task"


RETRIES: Mapping[Cause, int] = {Cause.RAISED: 0, Cause.WORKER_LOST: 2}
"""Further attempts at one stage of one task, by the cause of the failure."""


def decide(causes: Sequence[Cause]) -> Decision:
    """Decide after the attempts at one stage of one task that failed for ``causes``, the newest last."""
    newest = causes[-1]
    return Decision.RETRY if causes.count(newest) <= RETRIES[newest] else Decision.FAIL_TASK
