"""The machine, told one story at a time: order of stages, forests of experts, pulling, and many tasks at once.

What may happen in any order is the simulation's, in ``simulation/test_runs.py``.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping

import pytest

from distributed_eg.schedule.events import (
    Event,
    Stage,
    StageFinished,
    StreamEnded,
    TaskArrived,
    WorkerJoined,
    WorkerLost,
)
from distributed_eg.schedule.instructions import PullTask, RunStage
from distributed_eg.schedule.machine import Machine, ScheduleError
from tests.schedule.story import AUTOENCODER, EXPERT, FEATURES, RELATE, Story

# The order of stages


def test_one_worker_takes_each_task_to_its_end_before_it_pulls_the_next() -> None:
    story = Story(2, workers=1)
    story.finish_all()
    assert story.started == [(task, stage) for task in (0, 1) for stage in Stage]
    assert story.machine.done


def test_features_run_before_the_statistics_are_known_but_autoencoders_wait_for_the_first_task() -> None:
    """Only the first task's features give the statistics; another task's, however early, do not."""
    story = Story(3, workers=3)
    assert story.now == {0: FEATURES, 1: FEATURES, 2: FEATURES}
    story.finish(1)
    story.finish(2)
    assert story.now == {0: FEATURES}
    story.finish(0)
    assert story.now == {0: AUTOENCODER, 1: AUTOENCODER, 2: AUTOENCODER}


def test_only_the_first_task_is_asked_for_the_statistics_and_again_when_it_is_retried() -> None:
    story = Story(2, workers=3)
    assert {task: run.with_statistics for task, run in story.running.items()} == {0: True, 1: False}
    story.lose(story.running[0].worker)
    assert {task: run.with_statistics for task, run in story.running.items()} == {0: True, 1: False}
    story.finish(0)
    assert not story.running[0].with_statistics


def test_nobody_is_asked_for_statistics_that_the_run_has() -> None:
    story = Story(2, workers=2, committed=(0, 1), has_statistics=True)
    assert not any(run.with_statistics for run in story.running.values())


def test_known_statistics_let_any_autoencoder_go_first() -> None:
    story = Story(2, workers=2, has_statistics=True)
    story.finish(1)
    assert story.now == {0: FEATURES, 1: AUTOENCODER}


def test_relatedness_waits_for_the_autoencoders_of_all_earlier_tasks_and_of_no_later_one() -> None:
    story = Story(3, workers=3, has_statistics=True)
    story.finish_until(1, AUTOENCODER)
    story.finish(1)
    assert story.now == {0: FEATURES, 2: FEATURES}
    story.finish(0)
    assert story.now[0] is AUTOENCODER
    story.finish(0)
    assert story.now == {0: RELATE, 1: RELATE, 2: FEATURES}


def test_an_expert_waits_for_its_parent_only() -> None:
    story = Story(4, workers=4)
    for _ in (FEATURES, AUTOENCODER):
        for task in range(4):
            story.finish(task)
    story.finish(0)
    story.finish(1, parent=0)
    story.finish(2, parent=1)
    story.finish(3, parent=0)
    assert story.now == {0: EXPERT}
    story.finish(0)
    assert story.now == {1: EXPERT, 3: EXPERT}, "two children of one parent run beside each other"
    story.finish(1)
    assert story.now == {2: EXPERT, 3: EXPERT}, "task 2 does not wait for task 3"
    story.finish_all()
    assert story.machine.done


def test_two_trees_of_a_forest_do_not_wait_for_each_other() -> None:
    """Both 0 and 1 start from the pretrained root, 2 from 1: the tree of 1 and 2 overtakes task 0."""
    story = Story(3, workers=3)
    for _ in (FEATURES, AUTOENCODER):
        for task in range(3):
            story.finish(task)
    story.finish(0)
    story.finish(1, parent=None)
    story.finish(2, parent=1)
    story.finish(1)
    story.finish(2)
    assert story.now == {0: EXPERT}


def test_a_chain_runs_one_expert_at_a_time_whatever_the_number_of_workers() -> None:
    story = Story(5, workers=8)
    for _ in (FEATURES, AUTOENCODER):
        for task in range(5):
            story.finish(task)
    for task in range(5):
        story.finish(task, parent=task - 1 if task else None)
    order = []
    while story.running:
        (task,) = story.running
        order.append(task)
        story.finish(task)
    assert order == [0, 1, 2, 3, 4]


def test_a_ready_expert_goes_before_everything_else_and_features_go_last() -> None:
    """With one worker for two tasks, the one that is nearer to its end goes on: few tasks hold features at a time."""
    story = Story(2, workers=2)
    story.finish(1)
    story.lose("w1")
    story.finish(0)
    assert story.now == {0: AUTOENCODER}
    story.finish(0)
    assert story.now == {0: RELATE}
    story.finish(0)
    assert story.now == {0: EXPERT}


def test_a_task_goes_on_where_its_features_lie() -> None:
    """Two nodes, two tasks: the idle worker that joined first is not the one that holds the features."""
    story = Story(2)
    story.join("far", "north")
    story.join("near", "south")
    assert {task: run.worker for task, run in story.running.items()} == {0: "far", 1: "near"}
    story.finish(1)
    story.finish(0)
    assert {task: run.worker for task, run in story.running.items()} == {0: "far", 1: "near"}


# The stream


def test_a_task_is_pulled_only_for_an_idle_worker_and_one_at_a_time() -> None:
    story = Story(has_statistics=True)
    assert story.tell(WorkerJoined("w0", "node")) == [PullTask()]
    assert story.tell(WorkerJoined("w1", "node")) == [], "a pull is under way"
    assert story.tell(TaskArrived(0)) == [RunStage(0, FEATURES, 1, "w0"), PullTask()], "w1 is idle still"
    assert story.tell(TaskArrived(1)) == [RunStage(1, FEATURES, 2, "w1")]
    assert story.finish(0) == [RunStage(0, AUTOENCODER, 3, "w0")], "a ready stage goes before a further pull"


def test_nothing_is_pulled_without_a_worker() -> None:
    story = Story()
    assert story.tell(TaskArrived(0)) == []
    assert story.pulls == 0


def test_nothing_is_pulled_after_the_stream_ended() -> None:
    story = Story()
    story.join("w0")
    assert story.tell(StreamEnded()) == []
    assert story.join("w1") == []
    assert story.pulls == 1
    assert story.machine.done


def test_an_idle_worker_that_waits_for_a_parent_pulls_the_next_task() -> None:
    story = Story(3, workers=2, has_statistics=True)
    for _ in (FEATURES, AUTOENCODER):
        story.finish(0)
        story.finish(1)
    story.finish(0)
    story.finish(1, parent=0)
    assert story.now == {0: EXPERT, 2: FEATURES}


def test_a_stream_that_may_not_fit_is_read_only_a_little_ahead() -> None:
    """One task trains for long and the others wait for it: the idle worker pulls two tasks a worker, no more."""
    story = Story(workers=0)
    story.machine = Machine(tasks_per_worker=2)
    story.join("w0")
    story.join("w1")
    for task in range(4):
        story.tell(TaskArrived(task))
        for _ in range(3):
            story.finish(task, 0 if task else None)
    assert story.now == {0: EXPERT}
    pulls = story.pulls
    story.finish(0)
    assert story.pulls == pulls, "two experts are ready, so nobody is idle"
    assert set(story.now) == {1, 2}
    story.finish(1)
    assert story.now.keys() == {2, 3}
    story.finish(2)
    assert story.pulls == pulls + 1


def test_an_empty_stream_is_done_at_once() -> None:
    story = Story(0, workers=1)
    assert story.machine.done
    assert not story.started


def test_not_done_before_the_stream_has_ended_nor_while_something_runs() -> None:
    story = Story()
    story.join("w0")
    story.tell(TaskArrived(0))
    story.tell(StreamEnded())
    for _ in Stage:
        assert not story.machine.done
        story.finish(0)
    assert story.machine.done
    open_story = Story()
    open_story.join("w0")
    open_story.tell(TaskArrived(0))
    open_story.finish_all()
    assert not open_story.machine.done


def test_tasks_of_an_earlier_call_are_parents_and_are_not_trained_again() -> None:
    story = Story(2, workers=2, committed=(0, 1, 2), has_statistics=True)
    for _ in (FEATURES, AUTOENCODER):
        story.finish(3)
        story.finish(4)
    story.finish(3, parent=1)
    story.finish(4, parent=2)
    assert story.now == {3: EXPERT, 4: EXPERT}
    story.finish_all()
    assert story.machine.done
    assert {task for task, _ in story.started} == {3, 4}


@pytest.mark.parametrize(
    "events",
    [
        (TaskArrived(0), TaskArrived(0)),
        (TaskArrived(7), TaskArrived(7)),
        (StreamEnded(), TaskArrived(0)),
        (StageFinished(3, FEATURES, 1),),
        (WorkerJoined("w0", "node"), TaskArrived(0), WorkerLost("w0", "died"), StageFinished(0, FEATURES, 1)),
        (WorkerJoined("w0", "node"), TaskArrived(0), StageFinished(0, AUTOENCODER, 1)),
        (WorkerJoined("w0", "node"), TaskArrived(0), StageFinished(0, FEATURES, 2)),
    ],
    ids=["arrived twice", "committed twice", "after the end", "unknown task", "lost", "other stage", "other attempt"],
)
def test_what_cannot_happen_is_told_with_the_last_events(events: tuple[Event, ...]) -> None:
    machine = Machine([7], has_statistics=True)
    for event in events[:-1]:
        machine.handle(event)
    with pytest.raises(ScheduleError) as caught:
        machine.handle(events[-1])
    assert all(repr(event) in str(caught.value) for event in events)


def test_a_parent_must_be_an_earlier_task() -> None:
    story = Story(1, workers=1)
    story.finish_until(0, RELATE)
    run = story.running[0]
    with pytest.raises(ScheduleError, match="names parent 0, unknown or later"):
        story.machine.handle(StageFinished(0, RELATE, run.attempt, parent=0))


# Many tasks


def _simulate(num_tasks: int, num_workers: int, seconds: Mapping[int, float], seed: int = 0) -> int:
    """Run with random durations, ``seconds`` for the features of some tasks; return the number of stages."""
    rng = random.Random(seed)
    machine = Machine()
    clock, arrived, stages = 0.0, 0, 0
    due: list[tuple[float, int, RunStage]] = []
    events: list[Event] = [WorkerJoined(f"w{i}", f"n{i % 10}") for i in range(num_workers)]
    while not machine.done:
        if not events:
            clock, _, run = heapq.heappop(due)
            parent = rng.choice([None, *range(max(0, run.task - 9), run.task)]) if run.stage is RELATE else None
            events.append(StageFinished(run.task, run.stage, run.attempt, parent))
        for instruction in machine.handle(events.pop()):
            if isinstance(instruction, RunStage):
                stages += 1
                slow = seconds.get(instruction.task, 0.0) if instruction.stage is FEATURES else 0.0
                heapq.heappush(due, (clock + slow + rng.random(), stages, instruction))
            elif isinstance(instruction, PullTask):
                events.append(TaskArrived(arrived) if arrived < num_tasks else StreamEnded())
                arrived += arrived < num_tasks
    machine.validate()
    return stages


def test_a_thousand_tasks_on_fifty_workers_are_scheduled() -> None:
    assert _simulate(1000, 50, {}) == 4 * 1000


@pytest.mark.timeout(20)  # 1 s where the work per event does not grow with the number of tasks
def test_a_slow_task_that_all_others_wait_for_does_not_make_scheduling_slow() -> None:
    """Task 1 takes as long as everything else: 998 tasks wait to be related, and become ready at the same moment."""
    assert _simulate(1000, 50, {1: 1000.0}) == 4 * 1000
