"""The machine, told one story at a time: failures and their budgets, stopping, lost workers."""

from __future__ import annotations

import pytest

from distributed_eg.schedule.events import Cause, Stage, StreamEnded, TaskArrived, WorkerLeaving
from distributed_eg.schedule.instructions import ReportFailure
from distributed_eg.schedule.retry import RETRIES, RETRIES_PER_TASK
from tests.schedule.story import AUTOENCODER, EXPERT, FEATURES, RELATE, Story

# Failures


def test_a_failed_stage_fails_its_task_and_the_others_finish() -> None:
    story = Story(3, workers=3)
    for task in range(3):
        story.finish(task)
    story.fail(1, "no convergence")
    story.finish_all({2: 0})
    assert story.failures.keys() == {1}
    assert (story.failures[1].stage, story.failures[1].message) == (AUTOENCODER, "no convergence")
    assert story.machine.done
    assert [stage for task, stage in story.started if task == 2] == list(Stage)


def test_relatedness_does_not_wait_for_an_autoencoder_that_failed() -> None:
    story = Story(2, workers=2, has_statistics=True)
    story.finish(1)
    story.finish(1)
    assert story.now == {0: FEATURES}
    story.fail(0)
    assert story.now == {1: RELATE}


def test_tasks_that_need_a_failed_expert_are_reported_transitively_and_cousins_finish() -> None:
    """0 ◀ 1 ◀ 2 ◀ 3 and 0 ◀ 4: task 1 fails while it trains, so 2 and 3 have nothing to start from."""
    story = Story(5, workers=5)
    for _ in (FEATURES, AUTOENCODER):
        for task in range(5):
            story.finish(task)
    for task, parent in enumerate((None, 0, 1, 2, 0)):
        story.finish(task, parent=parent)
    story.finish(0)
    assert story.now == {1: EXPERT, 4: EXPERT}
    instructions = story.fail(1, "NaN")
    assert [i.task for i in instructions if isinstance(i, ReportFailure)] == [1, 2, 3]
    assert story.failures[1].message == "NaN"
    assert "task 1" in story.failures[2].message
    assert "task 2" in story.failures[3].message
    assert all(story.failures[task].stage is EXPERT for task in (1, 2, 3))
    assert story.now == {4: EXPERT}
    story.finish_all()
    assert story.machine.done


def test_a_parent_chosen_after_it_failed_fails_the_child_at_once() -> None:
    story = Story(2, workers=2)
    for _ in (FEATURES, AUTOENCODER):
        story.finish(0)
        story.finish(1)
    story.finish(0)
    story.fail(0)
    story.finish(1, parent=0)
    assert set(story.failures) == {0, 1}
    assert (1, EXPERT) not in story.started
    assert story.machine.done


def test_a_first_task_that_fails_before_the_statistics_fails_everything_that_waits_for_them() -> None:
    """Task 1's features are there, task 2's are being extracted, task 3 arrives later: none can go on."""
    story = Story()
    for i in range(3):
        story.join(f"w{i}")
        story.tell(TaskArrived(i))
    story.finish(1)
    story.fail(0, "cannot read images")
    assert set(story.failures) == {0, 1}
    assert story.now == {2: FEATURES}
    story.finish(2)
    assert set(story.failures) == {0, 1, 2}
    story.tell(TaskArrived(3))
    assert set(story.failures) == {0, 1, 2, 3}
    assert story.failures[0].message == "cannot read images"
    assert all("statistics of task 0" in story.failures[task].message for task in (1, 2, 3))
    story.tell(StreamEnded())
    assert story.machine.done
    assert {stage for _, stage in story.started} == {FEATURES}


def test_a_first_task_that_fails_after_the_statistics_fails_alone() -> None:
    story = Story(2, workers=2)
    story.finish(0)
    story.fail(0)
    story.finish_all()
    assert set(story.failures) == {0}
    assert story.machine.done


def test_a_later_call_whose_first_task_fails_goes_on_with_the_statistics_of_the_run() -> None:
    story = Story(2, workers=2, committed=(0,), has_statistics=True)
    story.fail(1)
    story.finish_all({2: 0})
    assert set(story.failures) == {1}
    assert story.machine.done


# Lost workers and budgets


def test_the_stage_of_a_lost_worker_runs_again_under_a_new_number() -> None:
    story = Story(1, workers=1)
    story.finish(0)
    lost = story.lose("w0")
    assert lost is not None
    assert not story.running
    assert not story.failures
    story.join("w1")
    again = story.running[0]
    assert (again.stage, again.worker) == (AUTOENCODER, "w1")
    assert again.attempt > lost.attempt


def test_another_worker_takes_over_at_once() -> None:
    story = Story(1, workers=2)
    story.lose("w0")
    assert {run.worker for run in story.running.values()} == {"w1"}


@pytest.mark.parametrize("stage", list(Stage))
def test_a_stage_that_keeps_losing_its_workers_fails_its_task_and_spares_the_pool(stage: Stage) -> None:
    budget = RETRIES[Cause.WORKER_LOST]
    story = Story(1, workers=1, has_statistics=True)
    story.finish_until(0, stage)
    for i in range(budget + 1):
        assert not story.failures
        story.lose(f"w{i}")
        story.join(f"w{i + 1}")
    assert story.failures.keys() == {0}
    assert story.failures[0].stage is stage
    assert f"w{budget} died" in story.failures[0].message
    assert not story.running
    assert story.machine.done


def _lose(story: Story, times: int, cause: Cause = Cause.WORKER_LOST) -> None:
    """Lose the only worker again and again."""
    for _ in range(times):
        story.lose("w0", cause)
        story.join("w0")


def test_each_stage_has_a_budget_of_its_own_within_the_tasks() -> None:
    """Three lost workers each at two stages and two at a third: eight in all."""
    story = Story(1, workers=1)
    for times in (3, 0, 3, 2):
        _lose(story, times)
        story.finish(0)
    assert story.machine.done
    assert not story.failures


def test_a_task_that_fails_a_little_everywhere_uses_up_its_own_budget() -> None:
    story = Story(2, workers=1)
    for times in (3, 3, 2):
        _lose(story, times)
        story.finish(0)
    assert sum((3, 3, 2)) == RETRIES_PER_TASK
    assert story.now == {0: EXPERT}
    _lose(story, 1)
    assert story.failures.keys() == {0}
    assert story.now == {1: FEATURES}, "the next task has a budget of its own"


def test_lost_nodes_are_nobodys_fault() -> None:
    """Fifty preemptions of one expert, beside failures of its own, within every budget."""
    story = Story(1, workers=1)
    story.finish_until(0, EXPERT)
    _lose(story, RETRIES[Cause.WORKER_LOST])
    _lose(story, RETRIES[Cause.NODE_LOST], Cause.NODE_LOST)
    story.fail(0, cause=Cause.OUT_OF_MEMORY)
    assert story.now == {0: EXPERT}
    assert not story.failures
    _lose(story, 1, Cause.NODE_LOST)
    assert story.failures.keys() == {0}


@pytest.mark.parametrize("cause", [Cause.OUT_OF_MEMORY, Cause.OVERDUE, Cause.STORAGE])
def test_what_may_pass_is_tried_once_more(cause: Cause) -> None:
    story = Story(1, workers=1)
    story.fail(0, "first", cause)
    assert story.now == {0: FEATURES}
    story.fail(0, "second", cause)
    assert story.failures.keys() == {0}


def test_the_report_of_a_failure_tells_the_cause_of_every_attempt() -> None:
    story = Story(1, workers=1)
    story.lose("w0", Cause.NODE_LOST)
    story.join("w1")
    story.finish(0)
    story.fail(0, "12 GB", Cause.OUT_OF_MEMORY)
    story.fail(0, "no convergence")
    told = story.failures[0]
    assert told.stage is AUTOENCODER
    assert told.message == (
        "3 attempts failed:\n  features, node lost: w0 died\n  autoencoder, out of memory: 12 GB"
        "\n  autoencoder, raised: no convergence"
    )
    assert [(f.stage, f.cause, f.message) for f in told.failures] == [
        (FEATURES, Cause.NODE_LOST, "w0 died"),
        (AUTOENCODER, Cause.OUT_OF_MEMORY, "12 GB"),
        (AUTOENCODER, Cause.RAISED, "no convergence"),
    ]


# Stopping


def test_a_run_that_stops_on_failure_lets_what_runs_end_and_starts_nothing() -> None:
    story = Story(3, workers=2, has_statistics=True, stop_on_failure=True)
    story.lose("w1")
    story.join("w1")
    assert story.now == {0: FEATURES, 1: FEATURES}, "a failure that is tried again stops nothing"
    pulls = story.pulls
    story.fail(1)
    assert story.failures.keys() == {1}
    assert not story.machine.done, "task 0 runs still"
    story.finish(0)
    assert not story.running
    assert story.pulls == pulls
    assert story.machine.done
    assert story.machine.unfinished == [0]
    assert story.join("late") == []


def test_a_run_goes_on_after_a_failure_where_it_was_not_told_to_stop() -> None:
    story = Story(3, workers=2, has_statistics=True)
    story.fail(1)
    story.finish_all()
    assert story.machine.done
    assert story.machine.unfinished == []


def test_a_storage_that_takes_nothing_stops_the_run() -> None:
    """Every task would fail by it, one after another, with hours of work each."""
    story = Story(3, workers=2, has_statistics=True)
    story.fail(0, "disk full", Cause.STORAGE)
    assert story.now == {0: FEATURES, 1: FEATURES}
    story.fail(0, "disk full", Cause.STORAGE)
    story.finish(1)
    assert not story.running
    assert story.machine.done
    assert story.failures.keys() == {0}
    assert story.machine.unfinished == [1]


def test_what_needs_a_failed_task_is_reported_though_the_run_stops() -> None:
    story = Story(2, workers=2, stop_on_failure=True)
    story.finish(1)
    story.fail(0)
    assert story.failures.keys() == {0, 1}
    assert story.machine.done
    assert story.machine.unfinished == []


# Workers that come and go


def test_idle_workers_may_go_without_costing_a_task_anything() -> None:
    story = Story()
    story.join("busy")
    story.tell(TaskArrived(0))
    story.tell(StreamEnded())
    for i in range(20):
        story.join(f"idle{i}")
        story.lose(f"idle{i}")
    assert story.now == {0: FEATURES}
    story.finish_all()
    assert story.machine.done
    assert not story.failures


def test_losing_every_worker_stops_nothing_for_good() -> None:
    story = Story(3, workers=3)
    for i in range(3):
        story.lose(f"w{i}")
    assert not story.machine.done
    story.join("late")
    story.finish_all()
    assert story.machine.done
    assert not story.failures


def test_a_worker_may_come_back_under_its_old_name() -> None:
    story = Story(1, workers=1)
    story.lose("w0")
    story.join("w0")
    story.finish_all()
    assert story.machine.done


def test_a_worker_that_leaves_finishes_what_it_does_and_gets_nothing_new() -> None:
    story = Story(2, workers=1, has_statistics=True)
    story.tell(WorkerLeaving("w0"))
    assert story.now == {0: FEATURES}
    assert story.finish(0) == []
    story.join("w0")
    assert not story.running, "it says that it is there, but it goes all the same"
    story.join("w1")
    assert story.now == {0: AUTOENCODER}
    story.lose("w0", Cause.NODE_LOST)
    story.join("w0")
    assert story.now == {0: AUTOENCODER, 1: FEATURES}, "a new worker of that name stays"


def test_an_idle_worker_that_leaves_pulls_nothing() -> None:
    story = Story()
    story.tell(TaskArrived(0))
    story.join("w0")
    story.join("w1")
    story.tell(WorkerLeaving("w1"))
    story.tell(TaskArrived(1))
    assert story.now == {0: FEATURES}
    story.tell(WorkerLeaving("nobody"))
    assert story.join("nobody") != [], "a notice about a worker that is not there means nothing"


def test_a_stage_on_a_worker_that_left_too_early_runs_again_at_no_cost() -> None:
    story = Story(1, workers=2)
    for _ in range(2 * RETRIES_PER_TASK):
        worker = story.running[0].worker
        story.tell(WorkerLeaving(worker))
        story.lose(worker, Cause.NODE_LOST)
        story.join(worker)
    assert story.now == {0: FEATURES}
    story.finish_all()
    assert not story.failures


@pytest.mark.parametrize("cause", [Cause.OUT_OF_MEMORY, Cause.STORAGE])
def test_a_node_that_had_no_memory_or_no_disk_is_not_tried_again_where_there_is_another(cause: Cause) -> None:
    story = Story(1)
    story.join("w0", "small")
    story.join("w1", "large")
    story.fail(0, cause=cause)
    assert story.running[0].worker == "w1"
    story.lose("w1", Cause.NODE_LOST)
    assert story.running[0].worker == "w0"


def test_a_worker_that_left_before_this_machine_began_may_be_reported_lost() -> None:
    """It was leaving when the call before ended, so that this machine never heard of it."""
    story = Story(1, workers=1)
    story.lose("w7", Cause.NODE_LOST)
    story.finish_all()
    assert story.machine.is_committed(0)


def test_an_expert_whose_recorded_parent_never_arrived_is_given_up() -> None:
    """Resumed step by step: the parent failed again in the call before, and this machine knows nothing of it."""
    story = Story(workers=1, has_statistics=True)
    story.arrive(2, FEATURES, AUTOENCODER, RELATE, parent=1)
    story.tell(StreamEnded())
    assert "the expert of task 1, which failed or was left out" in story.failures[2].message
    assert story.machine.done
