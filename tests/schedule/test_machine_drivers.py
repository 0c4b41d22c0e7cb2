"""The machine, told one story at a time: workers that join twice, and what an earlier driver left."""

from __future__ import annotations

import pytest

from distributed_eg.schedule.events import Stage, StreamEnded, TaskArrived
from tests.schedule.story import AUTOENCODER, EXPERT, FEATURES, RELATE, Story

# Workers that are told of twice


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


# Later drivers


def test_attempt_numbers_go_on_where_an_earlier_driver_stopped() -> None:
    story = Story(2, workers=2, first_attempt=70)
    assert sorted(run.attempt for run in story.running.values()) == [70, 71]
    assert story.machine.next_attempt == 72


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
