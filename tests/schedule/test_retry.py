"""`decide`: one budget per cause, counted over the attempts at one stage, and one for all stages of a task."""

from __future__ import annotations

import pytest

from distributed_eg.schedule.events import Cause
from distributed_eg.schedule.retry import RETRIES, RETRIES_PER_TASK, Decision, decide

LOST = Cause.WORKER_LOST


def test_every_cause_has_a_budget() -> None:
    assert set(RETRIES) == set(Cause)


@pytest.mark.parametrize("cause", list(Cause))
def test_a_stage_runs_once_more_than_its_budget(cause: Cause) -> None:
    decisions = [decide([cause] * failed, [cause] * failed) for failed in range(1, RETRIES[cause] + 2)]
    assert decisions == [Decision.RETRY] * RETRIES[cause] + [Decision.FAIL_TASK]


def test_the_same_input_raises_the_same_error_again_so_it_is_not_retried() -> None:
    assert decide([Cause.RAISED], [Cause.RAISED]) is Decision.FAIL_TASK


def test_lost_workers_do_not_use_up_the_budget_of_another_cause() -> None:
    lost = [LOST] * RETRIES[LOST]
    assert decide([*lost, Cause.OUT_OF_MEMORY], [*lost, Cause.OUT_OF_MEMORY]) is Decision.RETRY
    assert decide([Cause.OUT_OF_MEMORY, *lost], [Cause.OUT_OF_MEMORY, *lost]) is Decision.RETRY
    assert decide([*lost, Cause.RAISED], [*lost, Cause.RAISED]) is Decision.FAIL_TASK


def test_all_stages_of_a_task_share_a_budget() -> None:
    assert decide([LOST], [LOST] * RETRIES_PER_TASK) is Decision.RETRY
    assert decide([LOST], [LOST] * (RETRIES_PER_TASK + 1)) is Decision.FAIL_TASK


def test_lost_nodes_do_not_count_against_a_task() -> None:
    nodes = [Cause.NODE_LOST] * RETRIES[Cause.NODE_LOST]
    assert decide([LOST], [*nodes, *[LOST] * RETRIES_PER_TASK]) is Decision.RETRY
    assert decide(nodes, [*[LOST] * RETRIES_PER_TASK, *nodes]) is Decision.RETRY
