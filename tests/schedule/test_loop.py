"""The loop, told one story at a time: what it asks of its ports, and in which order."""

from __future__ import annotations

import pytest

from distributed_eg.errors import StorageError
from distributed_eg.schedule.events import Cause, Stage, TaskArrived, WorkerJoined, WorkerLost
from distributed_eg.schedule.instructions import ReportFailure, RunStage
from distributed_eg.schedule.loop import Loop
from distributed_eg.schedule.machine import Machine

FEATURES, AUTOENCODER, RELATE, EXPERT = Stage


class Ports:
    """A stream of given tasks, and a note of all that was asked; a result is the parent that it chose."""

    def __init__(self, tasks: list[TaskArrived]) -> None:
        self.asked: list[tuple[str, int, Stage | None]] = []
        self.runs: list[RunStage] = []
        self.failures: list[ReportFailure] = []
        self.broken = ""
        self._stream = iter(tasks)

    def _ask(self, port: str, task: int, stage: Stage | None = None) -> None:
        if port == self.broken:
            raise StorageError(f"{port} of task {task}: disk full")
        self.asked.append((port, task, stage))

    def pull(self) -> TaskArrived | None:
        return next(self._stream, None)

    def submit(self, run: RunStage) -> None:
        self._ask("submit", run.task, run.stage)
        self.runs.append(run)

    def record(self, run: RunStage, result: int | None) -> int | None:
        self._ask("record", run.task, run.stage)
        return result

    def commit(self, task: int) -> None:
        self._ask("commit", task)

    def give_up(self, failure: ReportFailure) -> None:
        self._ask("give up", failure.task, failure.stage)
        self.failures.append(failure)

    def asked_for(self, port: str) -> list[int]:
        """The tasks that a port was asked about."""
        return [task for asked, task, _ in self.asked if asked == port]


def _begin(*tasks: int | TaskArrived, workers: int = 1, **machine: int) -> tuple[Loop[int | None], Ports]:
    ports = Ports([task if isinstance(task, TaskArrived) else TaskArrived(task) for task in tasks])
    loop: Loop[int | None] = Loop(Machine(**machine), ports)
    for worker in range(workers):
        loop.tell(WorkerJoined(f"w{worker}", "node"))
    return loop, ports


def _attempt(loop: Loop[int | None], task: int) -> int:
    """The attempt that runs for a task."""
    return next(attempt for attempt, run in loop.runs.items() if run.task == task)


def _finish(loop: Loop[int | None], task: int, times: int = 1, parent: int | None = None) -> None:
    for _ in range(times):
        attempt = _attempt(loop, task)
        loop.finished(attempt, parent if loop.runs[attempt].stage is RELATE else None)


def test_each_stage_is_recorded_before_the_next_one_begins_and_the_task_is_committed_last() -> None:
    loop, ports = _begin(0)
    _finish(loop, 0, times=4)
    stages = [(port, 0, stage) for stage in Stage for port in ("submit", "record")]
    assert ports.asked == [*stages, ("commit", 0, None)]
    assert loop.machine.done
    assert not loop.runs


def test_the_parent_that_was_recorded_is_the_one_that_the_expert_waits_for() -> None:
    loop, _ = _begin(0, 1, workers=2)
    for _ in (FEATURES, AUTOENCODER):
        _finish(loop, 0)
        _finish(loop, 1)
    _finish(loop, 1, parent=0)
    assert [run.task for run in loop.runs.values()] == [0]
    _finish(loop, 0, times=2)
    assert [(run.task, run.stage) for run in loop.runs.values()] == [(1, EXPERT)]


def test_a_second_report_is_ignored_whatever_it_says() -> None:
    loop, ports = _begin(0)
    first = _attempt(loop, 0)
    loop.finished(first, None)
    asked = list(ports.asked)
    loop.finished(first, None)
    loop.failed(first, Cause.STORAGE, "disk full")
    assert ports.asked == asked
    assert [run.stage for run in loop.runs.values()] == [AUTOENCODER]


def test_every_report_may_come_twice() -> None:
    loop, ports = _begin(0, 1, 2, workers=2)
    while loop.runs:
        attempt, run = min(loop.runs.items(), key=lambda item: (item[1].task, item[0]))
        loop.finished(attempt, None)
        asked = list(ports.asked)
        loop.finished(attempt, 0 if run.task else None)
        loop.failed(attempt, Cause.RAISED, "late")
        assert ports.asked == asked
    assert loop.machine.done
    assert [len(ports.asked_for(port)) for port in ("submit", "record", "commit")] == [12, 12, 3]


def test_a_failure_that_is_reported_twice_counts_once() -> None:
    loop, ports = _begin(0)
    attempt = _attempt(loop, 0)
    for _ in range(3):
        loop.failed(attempt, Cause.OUT_OF_MEMORY, "12 GB")
    assert not ports.failures
    assert [run.stage for run in loop.runs.values()] == [FEATURES]


@pytest.mark.parametrize("replaced", [False, True])
def test_an_attempt_of_a_lost_worker_counts_no_longer_before_and_after_another_took_over(replaced: bool) -> None:
    loop, ports = _begin(0)
    lost = _attempt(loop, 0)
    loop.tell(WorkerLost("w0", "died"))
    assert not loop.runs
    if replaced:
        loop.tell(WorkerJoined("w1", "node"))
    loop.finished(lost, None)
    loop.failed(lost, Cause.RAISED, "late")
    assert not ports.asked_for("record")
    assert not ports.failures
    assert [(run.worker, run.attempt > lost) for run in loop.runs.values()] == [("w1", True)] * replaced


def test_a_late_report_does_not_change_the_parent() -> None:
    loop, ports = _begin(0, 1, workers=2)
    for _ in (FEATURES, AUTOENCODER):
        _finish(loop, 0)
        _finish(loop, 1)
    late = _attempt(loop, 1)
    loop.finished(late, None)
    loop.finished(late, 0)
    loop.failed(_attempt(loop, 0), Cause.RAISED, "boom")
    assert ports.asked_for("give up") == [0], "task 1 starts from the root, as its first report said"


def test_reports_to_an_earlier_driver_mean_nothing() -> None:
    """Of a task that has not arrived, and of a stage that runs again under another number."""
    loop, ports = _begin(0, workers=0, first_attempt=70)
    loop.finished(69, None)
    loop.tell(WorkerJoined("w0", "node"))
    loop.finished(69, None)
    loop.failed(69, Cause.STORAGE, "disk full")
    assert ports.asked == [("submit", 0, FEATURES)]
    assert list(loop.runs) == [70]


def test_the_loss_of_an_idle_worker_frees_nothing() -> None:
    loop, _ = _begin(0, workers=2)
    runs = dict(loop.runs)
    loop.tell(WorkerLost("w1", "died"))
    assert loop.runs == runs


def test_tasks_are_committed_in_order_of_arrival_and_those_given_up_are_passed_over() -> None:
    loop, ports = _begin(0, 1, 2, 3, workers=4, has_statistics=True)
    for task in (3, 2, 1, 0):
        _finish(loop, task, times=2)
    for task in (3, 2):
        _finish(loop, task, times=2)
    loop.failed(_attempt(loop, 1), Cause.RAISED, "boom")
    assert not ports.asked_for("commit"), "task 0 is not there yet"
    _finish(loop, 0, times=2)
    assert ports.asked_for("commit") == [0, 2, 3]
    assert ports.asked_for("give up") == [1]
    assert loop.machine.done


def test_a_task_that_an_earlier_driver_finished_is_committed_in_its_turn() -> None:
    loop, ports = _begin(0, TaskArrived(1, done=frozenset(Stage)), workers=2, has_statistics=True)
    assert not ports.asked_for("commit")
    _finish(loop, 0, times=4)
    assert ports.asked_for("commit") == [0, 1]
    assert ports.asked_for("submit") == [0] * 4


def test_failures_are_carried_with_what_was_raised_and_where() -> None:
    loop, ports = _begin(0)
    error = StorageError("disk full")
    loop.failed(_attempt(loop, 0), Cause.OUT_OF_MEMORY, "12 GB", details="in extract")
    loop.failed(_attempt(loop, 0), Cause.STORAGE, "first")
    loop.failed(_attempt(loop, 0), Cause.STORAGE, "second", error=error, details="in write")
    (told,) = ports.failures
    assert (told.task, told.stage) == (0, FEATURES)
    assert [(f.message, f.error, f.details) for f in told.failures] == [
        ("12 GB", None, "in extract"),
        ("first", None, ""),
        ("second", error, "in write"),
    ]


def test_a_failure_takes_what_waits_for_it_along_and_each_task_is_told_once() -> None:
    loop, ports = _begin(0, 1, workers=2)
    _finish(loop, 1)
    loop.failed(_attempt(loop, 0), Cause.RAISED, "no image")
    assert ports.asked_for("give up") == [0, 1]
    assert not ports.asked_for("commit")
    assert loop.machine.done


@pytest.mark.parametrize("port", ["record", "submit", "commit"])
def test_what_a_port_raises_reaches_the_caller(port: str) -> None:
    loop, ports = _begin(0)
    _finish(loop, 0, times=3 if port == "commit" else 0)
    ports.broken = port
    with pytest.raises(StorageError, match=f"{port} of task 0: disk full"):
        _finish(loop, 0)


def test_a_result_that_could_not_be_recorded_was_not_told() -> None:
    """So whoever drives the loop may try again, or leave: the machine takes the stage to run still."""
    loop, ports = _begin(0)
    attempt = _attempt(loop, 0)
    ports.broken = "record"
    with pytest.raises(StorageError):
        loop.finished(attempt, None)
    assert list(loop.runs) == [attempt]
    ports.broken = ""
    loop.finished(attempt, None)
    assert ports.asked == [("submit", 0, FEATURES), ("record", 0, FEATURES), ("submit", 0, AUTOENCODER)]
