"""`decide`: one budget per cause, counted over the attempts at one stage."""

from __future__ import annotations

import pytest

from distributed_eg.schedule.events import Cause
from distributed_eg.schedule.retry import RETRIES, Decision, decide


def test_every_cause_has_a_budget() -> None:
    assert set(RETRIES) == set(Cause)


@pytest.mark.parametrize("cause", list(Cause))
def test_a_stage_runs_once_more_than_its_budget(cause: Cause) -> None:
    decisions = [decide([cause] * failed) for failed in range(1, RETRIES[cause] + 2)]
    assert decisions == [Decision.RETRY] * RETRIES[cause] + [Decision.FAIL_TASK]


def test_the_same_input_raises_the_same_error_again_so_it_is_not_retried() -> None:
    assert decide([Cause.RAISED]) is Decision.FAIL_TASK


def test_lost_workers_do_not_use_up_the_budget_of_another_cause() -> None:
    budget = RETRIES[Cause.WORKER_LOST]
    assert decide([Cause.RAISED, *[Cause.WORKER_LOST] * budget]) is Decision.RETRY
    assert decide([*[Cause.WORKER_LOST] * budget, Cause.RAISED]) is Decision.FAIL_TASK
