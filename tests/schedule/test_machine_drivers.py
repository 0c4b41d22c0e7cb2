"""The machine, told one story at a time: late and repeated reports, and what an earlier driver left."""

from __future__ import annotations

import pytest

from distributed_eg.schedule.events import (
    Cause,
    Event,
    Stage,
    StageFailed,
    StageFinished,
    StreamEnded,
    TaskArrived,
)
from distributed_eg.schedule.machine import ScheduleError
from tests.schedule.story import AUTOENCODER, EXPERT, FEATURES, RELATE, Story

# Reports that are late or repeated


@pytest.mark.parametrize("late_failure", [False, True])
def test_the_report_of_a_stale_attempt_is_ignored(late_failure: bool) -> None:
    """A worker that was taken for dead reports after all, while its replacement runs the same stage."""
    story = Story(1, workers=1)
    stale = story.lose("w0")
    assert stale is not None
    story.join("w1")
    late: Event = (
        StageFailed(0, stale.stage, stale.attempt, Cause.RAISED, "late")
        if late_failure
        else StageFinished(0, stale.stage, stale.attempt)
    )
    assert story.tell(late) == []
    assert story.now == {0: FEATURES}
    story.finish_all()
    assert story.machine.done


def test_a_stale_report_is_ignored_while_no_worker_is_left() -> None:
    story = Story(1, workers=1)
    stale = story.lose("w0")
    assert stale is not None
    assert story.tell(StageFinished(0, stale.stage, stale.attempt)) == []
    story.join("w1")
    assert story.now == {0: FEATURES}


def test_a_stale_relatedness_report_does_not_change_the_parent() -> None:
    story = Story(2, workers=2)
    for _ in (FEATURES, AUTOENCODER):
        story.finish(0)
        story.finish(1)
    run = story.running[1]
    story.finish(1, parent=None)
    story.tell(StageFinished(1, RELATE, run.attempt, parent=0))
    assert story.now == {0: RELATE, 1: EXPERT}
    story.fail(0)
    assert set(story.failures) == {0}, "task 1 starts from the root, as its first report said"


def test_every_report_may_come_twice() -> None:
    story = Story(3, workers=2)
    while story.running:
        task = min(story.running)
        run = story.running[task]
        story.finish(task)
        before = dict(story.now)
        story.tell(StageFinished(task, run.stage, run.attempt))
        story.tell(StageFailed(task, run.stage, run.attempt, Cause.RAISED, "late"))
        assert story.now == before
    assert story.machine.done
    assert len(story.started) == 3 * len(Stage)


def test_a_failure_that_is_reported_twice_counts_once() -> None:
    story = Story(2, workers=2, has_statistics=True)
    run = story.running[0]
    story.fail(0)
    assert story.tell(StageFailed(0, run.stage, run.attempt, Cause.RAISED, "again")) == []
    assert set(story.failures) == {0}


def test_a_busy_worker_that_says_again_that_it_joined_gets_no_second_stage() -> None:
    """An engine lists its workers and reports each as joined besides: the same worker is told of twice."""
    story = Story()
    story.join("w0")
    story.tell(TaskArrived(0))
    story.tell(TaskArrived(1))
    story.join("w0")
    assert story.now == {0: FEATURES}
    story.tell(StreamEnded())
    story.finish_all()
    assert story.machine.done


def test_an_idle_worker_that_joins_twice_is_one_worker() -> None:
    story = Story()
    story.join("w0")
    story.join("w0")
    story.tell(TaskArrived(0))
    story.tell(TaskArrived(1))
    assert story.now == {0: FEATURES}


def test_an_attempt_is_current_while_it_runs() -> None:
    story = Story(1, workers=1)
    run = story.running[0]
    assert story.machine.is_current(0, FEATURES, run.attempt)
    for other in ((0, FEATURES, run.attempt + 1), (0, AUTOENCODER, run.attempt), (1, FEATURES, run.attempt)):
        assert not story.machine.is_current(*other)
    story.lose("w0")
    assert not story.machine.is_current(0, FEATURES, run.attempt)
    story.join("w1")
    again = story.running[0]
    assert story.machine.is_current(0, FEATURES, again.attempt)
    assert not story.machine.is_current(0, FEATURES, run.attempt)
    story.finish(0)
    assert not story.machine.is_current(0, FEATURES, again.attempt)


# Later drivers


def test_attempt_numbers_go_on_where_an_earlier_driver_stopped() -> None:
    story = Story(2, workers=2, first_attempt=70)
    assert sorted(run.attempt for run in story.running.values()) == [70, 71]
    assert story.machine.next_attempt == 72


def test_late_reports_to_an_earlier_driver_mean_nothing() -> None:
    """Its workers report to the new driver: of a task that has not arrived yet, and of one that runs again."""
    story = Story(has_statistics=True, first_attempt=70)
    assert story.tell(StageFinished(4, EXPERT, 69)) == []
    story.join("w0")
    story.tell(TaskArrived(0))
    assert story.tell(StageFinished(0, FEATURES, 69)) == []
    assert story.tell(StageFailed(0, FEATURES, 69, Cause.STORAGE, "disk full")) == []
    assert story.now == {0: FEATURES}
    with pytest.raises(ScheduleError, match="unknown task 4"):
        story.machine.handle(StageFinished(4, FEATURES, 70))


def test_a_task_that_is_all_there_runs_nothing() -> None:
    story = Story(workers=1, has_statistics=True)
    story.arrive(0, *Stage)
    assert story.machine.is_committed(0)
    assert story.machine.unfinished == []
    story.tell(StreamEnded())
    assert story.machine.done
    assert not story.started


@pytest.mark.parametrize("num_done", range(4))
def test_a_task_goes_on_with_the_first_stage_that_is_not_there(num_done: int) -> None:
    story = Story(workers=1, has_statistics=True)
    stages = list(Stage)
    story.arrive(0, *stages[:num_done])
    story.finish_all()
    assert [stage for _, stage in story.started] == stages[num_done:]
    assert story.machine.is_committed(0)


def test_an_expert_waits_for_the_parent_that_an_earlier_driver_recorded() -> None:
    story = Story(workers=2, has_statistics=True)
    story.arrive(0, FEATURES, AUTOENCODER, RELATE)
    story.arrive(1, FEATURES, AUTOENCODER, RELATE, parent=0)
    assert story.now == {0: EXPERT}
    story.finish(0)
    assert story.now == {1: EXPERT}


def test_an_expert_whose_recorded_parent_fails_now_is_given_up() -> None:
    story = Story(workers=2, has_statistics=True)
    story.arrive(0, FEATURES, AUTOENCODER, RELATE)
    story.arrive(1, FEATURES, AUTOENCODER, RELATE, parent=0)
    story.fail(0)
    assert "the expert of task 0, which failed" in story.failures[1].message


def test_a_lost_autoencoder_of_a_trained_task_is_made_again_and_no_more() -> None:
    """Task 0 has its expert still: task 1 may train from it, but task 2 cannot be related before."""
    story = Story(workers=3, has_statistics=True)
    story.arrive(0, RELATE, EXPERT)
    story.arrive(1, FEATURES, AUTOENCODER, RELATE, parent=0)
    story.arrive(2, FEATURES, AUTOENCODER)
    assert story.now == {0: FEATURES, 1: EXPERT}
    assert not story.machine.is_committed(0)
    story.finish(0)
    assert story.now == {0: AUTOENCODER, 1: EXPERT}
    story.finish(0)
    assert story.now == {1: EXPERT, 2: RELATE}
    assert story.machine.is_committed(0)
    story.finish_all()
    assert [stage for task, stage in story.started if task == 0] == [FEATURES, AUTOENCODER]


def test_a_task_that_goes_on_from_a_lost_autoencoder_waits_for_it() -> None:
    story = Story(workers=2, has_statistics=True)
    story.arrive(0, RELATE, EXPERT)
    story.arrive(1, FEATURES, continues=0)
    assert story.now == {0: FEATURES}
    story.finish(0)
    story.finish(0)
    assert story.now == {1: AUTOENCODER}


def test_lost_statistics_come_from_the_first_task_again_while_the_others_wait() -> None:
    """Only they are missing of task 0. Task 1 trains meanwhile; tasks 2 and 3 need them."""
    story = Story(workers=4)
    story.arrive(0, *Stage)
    story.arrive(1, FEATURES, AUTOENCODER, RELATE, parent=0)
    story.arrive(2, FEATURES, AUTOENCODER)
    story.arrive(3)
    story.finish(3)
    assert story.now == {0: FEATURES, 1: EXPERT}
    assert story.running[0].with_statistics
    assert not story.machine.is_committed(0)
    story.finish(0)
    assert story.now == {1: EXPERT, 2: RELATE, 3: AUTOENCODER}
    assert story.machine.is_committed(0)
    story.finish_all()
    assert [stage for task, stage in story.started if task == 0] == [FEATURES]


def test_lost_statistics_that_cannot_be_had_again_fail_only_what_needs_them() -> None:
    story = Story(workers=3)
    story.arrive(0, *Stage)
    story.arrive(1, FEATURES, AUTOENCODER, RELATE, parent=0)
    story.arrive(2, FEATURES, AUTOENCODER)
    story.fail(0, "no image")
    assert story.failures.keys() == {0, 2}
    assert story.now == {1: EXPERT}
    story.finish_all()
    story.tell(StreamEnded())
    assert story.machine.done
    assert story.machine.is_committed(1)
