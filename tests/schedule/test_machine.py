"""The machine, told one story at a time: order of stages, forests of experts, pulling, failures, lost workers."""

from __future__ import annotations

import heapq
import random
from collections.abc import Collection, Mapping

import pytest

from distributed_eg.schedule.events import (
    Cause,
    Event,
    Stage,
    StageFailed,
    StageFinished,
    StreamEnded,
    TaskArrived,
    WorkerJoined,
    WorkerLost,
)
from distributed_eg.schedule.instructions import Instruction, PullTask, ReportFailure, RunStage
from distributed_eg.schedule.machine import Machine, ScheduleError
from distributed_eg.schedule.retry import RETRIES

FEATURES, AUTOENCODER, RELATE, EXPERT = Stage


class Story:
    """A machine that is validated after every event, and what it has asked for.

    With ``tasks`` given, every pull is answered at once: with the next task, then with the end of the stream.
    """

    def __init__(
        self,
        tasks: int | None = None,
        *,
        workers: int = 0,
        committed: Collection[int] = (),
        has_statistics: bool = False,
    ) -> None:
        self.machine = Machine(committed, has_statistics=has_statistics)
        self.running: dict[int, RunStage] = {}
        self.started: list[tuple[int, Stage]] = []
        self.failures: dict[int, ReportFailure] = {}
        self.pulls = 0
        first = max(committed, default=-1) + 1
        self._stream = None if tasks is None else iter(range(first, first + tasks))
        for i in range(workers):
            self.join(f"w{i}")

    def tell(self, event: Event) -> list[Instruction]:
        """Hand ``event`` to the machine; answer its pulls."""
        instructions = self.machine.handle(event)
        self.machine.validate()
        for instruction in instructions:
            if isinstance(instruction, RunStage):
                assert instruction.task not in self.running
                assert instruction.worker not in self.workers_busy
                self.running[instruction.task] = instruction
                self.started.append((instruction.task, instruction.stage))
            elif isinstance(instruction, ReportFailure):
                assert instruction.task not in self.failures
                self.failures[instruction.task] = instruction
            else:
                self.pulls += 1
        if self._stream is not None and PullTask() in instructions:
            task = next(self._stream, None)
            self.tell(StreamEnded() if task is None else TaskArrived(task))
        return instructions

    @property
    def workers_busy(self) -> set[str]:
        """Workers that run something."""
        return {run.worker for run in self.running.values()}

    @property
    def now(self) -> dict[int, Stage]:
        """What runs now, by task."""
        return {task: run.stage for task, run in self.running.items()}

    def join(self, worker: str, node: str = "node") -> list[Instruction]:
        """A worker comes up."""
        return self.tell(WorkerJoined(worker, node))

    def lose(self, worker: str) -> RunStage | None:
        """A worker goes away; return what it ran."""
        run = next((run for run in self.running.values() if run.worker == worker), None)
        if run is not None:
            del self.running[run.task]
        self.tell(WorkerLost(worker, f"{worker} died"))
        return run

    def finish(self, task: int, parent: int | None = None) -> list[Instruction]:
        """What runs for ``task`` ends well."""
        run = self.running.pop(task)
        return self.tell(StageFinished(task, run.stage, run.attempt, parent))

    def finish_until(self, task: int, stage: Stage, parent: int | None = None) -> None:
        """``task`` goes on until ``stage`` runs."""
        while self.running[task].stage is not stage:
            self.finish(task, parent if self.running[task].stage is RELATE else None)

    def fail(self, task: int, message: str = "boom") -> list[Instruction]:
        """What runs for ``task`` raises."""
        run = self.running.pop(task)
        return self.tell(StageFailed(task, run.stage, run.attempt, Cause.RAISED, message))

    def finish_all(self, parents: Mapping[int, int | None] | None = None) -> None:
        """Everything that runs ends well, the smallest task first, until nothing runs."""
        while self.running:
            task = min(self.running)
            self.finish(task, (parents or {}).get(task) if self.running[task].stage is RELATE else None)


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
    assert story.tell(TaskArrived(1)) == [RunStage(1, FEATURES, 1, "w1")]
    assert story.finish(0) == [RunStage(0, AUTOENCODER, 2, "w0")], "a ready stage goes before a further pull"


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
        (TaskArrived(7),),
        (StreamEnded(), TaskArrived(0)),
        (StageFinished(3, FEATURES, 1),),
        (WorkerLost("nobody", "gone"),),
    ],
    ids=["arrived twice", "committed before", "after the end", "unknown task", "unknown worker"],
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
    with pytest.raises(ScheduleError, match="a parent that is unknown or later"):
        story.machine.handle(StageFinished(0, RELATE, run.attempt, parent=0))


# Failures


def test_a_failed_stage_fails_its_task_and_the_others_finish() -> None:
    story = Story(3, workers=3)
    for task in range(3):
        story.finish(task)
    story.fail(1, "no convergence")
    story.finish_all({2: 0})
    assert story.failures == {1: ReportFailure(1, AUTOENCODER, "no convergence")}
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


# Lost workers and repeated reports


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
    assert story.machine.num_workers == 1


@pytest.mark.parametrize("stage", list(Stage))
def test_a_stage_that_keeps_losing_its_workers_fails_its_task_and_spares_the_pool(stage: Stage) -> None:
    budget = RETRIES[Cause.WORKER_LOST]
    story = Story(1, workers=1, has_statistics=True)
    story.finish_until(0, stage)
    for i in range(budget + 1):
        assert not story.failures
        story.lose(f"w{i}")
        story.join(f"w{i + 1}")
    assert story.failures == {0: ReportFailure(0, stage, f"w{budget} died")}
    assert not story.running
    assert story.machine.done


def test_each_stage_has_a_budget_of_its_own() -> None:
    story = Story(1, workers=1)
    count = 0
    for _ in Stage:
        for _ in range(RETRIES[Cause.WORKER_LOST]):
            story.lose(f"w{count}")
            count += 1
            story.join(f"w{count}")
        story.finish(0)
    assert story.machine.done
    assert not story.failures


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
    assert story.machine.num_workers == 0
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
    assert story.machine.num_workers == 1
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
    assert story.machine.num_workers == 1


# Anything may happen


class Adversary:
    """Drives a machine at random, and knows by itself what may run, what must commit and what must fail.

    Args:
        seed: decides the tasks, the forest, and everything that happens.
        with_failures: stages raise, and workers are lost beyond the budget; else every task must commit.
    """

    def __init__(self, seed: int, *, with_failures: bool) -> None:
        self.rng = random.Random(seed)
        committed = self.rng.choice([0, 0, 1, 3])
        self.has_statistics = committed > 0 or self.rng.random() < 0.3
        self.first, self.last = committed, committed + self.rng.randrange(10)
        self.parents = {k: self.rng.choice([None, *range(k)]) for k in range(self.first, self.last)}
        self.with_failures = with_failures
        self.machine = Machine(range(committed), has_statistics=self.has_statistics)
        self.next_task = self.first
        self.pulled = 0
        self.answered = 0
        self.workers: set[str] = set()
        self.names = 0
        self.running: dict[str, RunStage] = {}
        self.ended: dict[int, list[Stage]] = {}
        self.chosen: dict[int, int | None] = {k: None for k in range(committed)}
        self.losses: dict[tuple[int, Stage], int] = {}
        self.broken: set[int] = set()
        self.reported: set[int] = set()
        self.past: list[RunStage] = []

    def run(self) -> set[tuple[int, int | None]]:
        """Until the machine is done; returns the (task, parent) that committed."""
        for _ in range(self.rng.randrange(1, 4)):
            self._join()
        for _ in range(1000):
            if self.machine.done:
                return {(k, self.chosen[k]) for k, stages in self.ended.items() if EXPERT in stages}
            self.rng.choice(self._moves())()
        raise AssertionError("the machine does not come to an end")

    def _moves(self) -> list:
        moves: list = [self._finish] * 8 * bool(self.running)
        moves += [self._answer] * 4 * (self.pulled > self.answered)
        moves += [self._join] * (len(self.workers) < 6)
        moves += [self._lose] * bool(self.workers) + [self._repeat] * 2 * bool(self.past)
        return moves + [self._raise] * (self.with_failures and bool(self.running))

    def _tell(self, event: Event) -> None:
        instructions = self.machine.handle(event)
        self.machine.validate()
        for instruction in instructions:
            if isinstance(instruction, RunStage):
                self._check_start(instruction)
                self.running[instruction.worker] = instruction
            elif isinstance(instruction, ReportFailure):
                assert instruction.task not in self.reported, "a failure is reported once"
                self.reported.add(instruction.task)
            else:
                assert self.pulled == self.answered, "one pull at a time"
                assert len(self.running) < len(self.workers), "a pull is for an idle worker"
                self.pulled += 1

    def _check_start(self, run: RunStage) -> None:
        task, stage = run.task, run.stage
        assert run.worker in self.workers
        assert run.worker not in self.running
        assert all(other.task != task for other in self.running.values())
        assert task not in self.reported
        assert self.ended[task] == list(Stage)[: list(Stage).index(stage)], "each stage once, in order"
        assert run.attempt not in {old.attempt for old in self.past if old.task == task}
        if stage is FEATURES:
            assert run.with_statistics == (not self.has_statistics and task == self.first)
        else:
            assert self.has_statistics or self.ended[self.first], "statistics come from the first task"
        if stage is RELATE:
            assert all(AUTOENCODER in self.ended[k] or k in self.reported for k in range(self.first, task))
        if stage is EXPERT:
            parent = self.chosen[task]
            assert parent is None or parent < self.first or EXPERT in self.ended[parent]
        self.past.append(run)

    def _answer(self) -> None:
        self.answered += 1
        if self.next_task == self.last:
            self._tell(StreamEnded())
            return
        task, self.next_task = self.next_task, self.next_task + 1
        self.ended[task] = []
        self._tell(TaskArrived(task))

    def _finish(self) -> None:
        run = self.running.pop(self.rng.choice(sorted(self.running)))
        self.ended[run.task].append(run.stage)
        if run.stage is RELATE:
            # Only what has an autoencoder can be chosen.
            parent = self.parents[run.task]
            sealed = parent is None or parent < self.first or AUTOENCODER in self.ended[parent]
            self.chosen[run.task] = parent if sealed else None
        self._tell(StageFinished(run.task, run.stage, run.attempt, self.chosen.get(run.task)))

    def _raise(self) -> None:
        run = self.running.pop(self.rng.choice(sorted(self.running)))
        self.broken.add(run.task)
        self._tell(StageFailed(run.task, run.stage, run.attempt, Cause.RAISED, "boom"))

    def _join(self) -> None:
        self.names += self.rng.random() < 0.7 or f"w{self.names}" in self.workers
        if f"w{self.names}" not in self.workers:
            self.workers.add(f"w{self.names}")
            self._tell(WorkerJoined(f"w{self.names}", self.rng.choice("ab")))

    def _lose(self) -> None:
        worker = self.rng.choice(sorted(self.workers))
        run = self.running.get(worker)
        if run is not None:
            lost = self.losses.get((run.task, run.stage), 0) + 1
            if lost > RETRIES[Cause.WORKER_LOST]:
                if not self.with_failures:
                    return
                self.broken.add(run.task)
            self.losses[run.task, run.stage] = lost
            del self.running[worker]
        self.workers.remove(worker)
        self._tell(WorkerLost(worker, "gone"))

    def _repeat(self) -> None:
        """An old report once more, or the late one of an attempt whose worker was lost; possibly a lie."""
        run = self.rng.choice(self.past)
        if run in self.running.values():
            return
        started = len(self.past)
        if self.rng.random() < 0.5:
            parent = self.rng.choice([None, *range(run.task)]) if run.stage is RELATE else None
            self._tell(StageFinished(run.task, run.stage, run.attempt, parent))
        else:
            self._tell(StageFailed(run.task, run.stage, run.attempt, self.rng.choice(list(Cause)), "late"))
        assert len(self.past) == started, "an old report starts nothing"

    def must_fail(self) -> set[int]:
        """Tasks that failed themselves, and what depends on them."""
        arrived = range(self.first, self.next_task)
        if not self.has_statistics and self.first in self.broken and not self.ended[self.first]:
            return set(arrived)
        failed = set(self.broken)
        for task in arrived:
            if RELATE in self.ended[task] and self.chosen[task] in failed:
                failed.add(task)
        return failed


@pytest.mark.parametrize("block", range(8))
def test_whatever_the_order_the_same_tasks_commit_with_the_same_parents(block: int) -> None:
    """Random completion orders, losses within the budget, rejoins, duplicates and late reports: nothing changes."""
    for seed in range(250 * block, 250 * (block + 1)):
        adversary = Adversary(seed, with_failures=False)
        assert adversary.run() == set(adversary.parents.items()), f"seed {seed}"
        assert not adversary.reported, f"seed {seed}"


@pytest.mark.parametrize("block", range(8))
def test_whatever_fails_exactly_what_depends_on_it_is_reported(block: int) -> None:
    for seed in range(250 * block, 250 * (block + 1)):
        adversary = Adversary(seed, with_failures=True)
        committed = {task for task, _ in adversary.run()}
        assert adversary.reported == adversary.must_fail(), f"seed {seed}"
        assert committed == set(adversary.ended) - adversary.reported, f"seed {seed}"


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
