"""Independent requests over a small fake of an engine: results in order, lost and leaving workers, budgets."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from distributed_eg.errors import InputError, TaskFailedError, WorkerLostError
from distributed_eg.runtime.engine import Ended, Report
from distributed_eg.runtime.messages import Done, DropRequest, Raised, Request
from distributed_eg.runtime.pool import run_all
from distributed_eg.schedule.events import Cause, WorkerJoined, WorkerLeaving, WorkerLost

Answer = Callable[[int, str], Sequence[Report]]


def done(call: int, worker: str) -> Sequence[Report]:
    """Every request gives its own number."""
    return [Ended(call, worker, Done(call, 0.0, 0.0))]  # type: ignore[arg-type]


class Fake:
    """An engine whose workers answer as ``answer`` says, newest call first."""

    def __init__(self, workers: Sequence[str], answer: Answer = done) -> None:
        self.ready = [WorkerJoined(worker, "here") for worker in workers]
        self.answer = answer
        self.submitted: list[tuple[int, str]] = []
        self._calls: deque[tuple[int, str]] = deque()

    def workers(self) -> list[WorkerJoined]:
        return self.ready

    def submit(self, call: int, worker: str, request: Request) -> None:
        assert worker not in [other for _, other in self._calls], "a worker does one thing at a time"
        self.submitted.append((call, worker))
        self._calls.append((call, worker))

    def wait(self) -> Sequence[Report]:
        assert self._calls, "nothing runs, and something is waited for"
        return self.answer(*self._calls.pop())


REQUESTS = [DropRequest(str(i)) for i in range(5)]


def run(engine: Any) -> list[Any]:
    return run_all(engine, REQUESTS)


def test_results_are_in_the_order_of_the_requests() -> None:
    assert run(Fake(["a", "b"])) == [0, 1, 2, 3, 4]


def test_reports_that_nobody_waits_for_are_ignored() -> None:
    """Of calls that were dropped, of earlier calls, and such as come twice."""

    def answer(call: int, worker: str) -> Sequence[Report]:
        other = Done("other", 0.0, 0.0)  # type: ignore[arg-type]
        return [Ended(None, worker, other), Ended(99, worker, other), *done(call, worker), Ended(call, worker, other)]

    assert run(Fake(["a"], answer)) == [0, 1, 2, 3, 4]


def test_a_lost_workers_request_goes_to_another() -> None:
    def answer(call: int, worker: str) -> Sequence[Report]:
        if worker == "b":
            return [WorkerLost("b", "it died"), WorkerJoined("c", "there")]
        return done(call, worker)

    engine = Fake(["a", "b"], answer)
    assert run(engine) == [0, 1, 2, 3, 4]
    assert next(worker for call, worker in engine.submitted if call == 1) == "b"
    assert "b" not in [worker for _, worker in engine.submitted[2:]]


def test_a_worker_that_leaves_gets_nothing_more() -> None:
    def answer(call: int, worker: str) -> Sequence[Report]:
        return [WorkerLeaving("b"), *done(call, worker)] if worker == "b" else done(call, worker)

    engine = Fake(["a", "b"], answer)
    assert run(engine) == [0, 1, 2, 3, 4]
    assert [worker for _, worker in engine.submitted].count("b") == 1


def test_a_request_that_kills_every_worker_is_given_up() -> None:
    def answer(call: int, worker: str) -> Sequence[Report]:
        if call == 3:
            return [WorkerLost(worker, "poison"), WorkerJoined(f"{worker}'", "here")]
        return done(call, worker)

    engine = Fake(["a"], answer)
    with pytest.raises(WorkerLostError, match="poison"):
        run(engine)
    assert [call for call, _ in engine.submitted].count(3) == 4


@pytest.mark.parametrize(("error", "raised"), [(InputError("mine"), InputError), (None, TaskFailedError)])
def test_what_a_request_raises_is_raised(error: InputError | None, raised: type[Exception]) -> None:
    def answer(call: int, worker: str) -> Sequence[Report]:
        return [Ended(call, worker, Raised(error, "mine", "traceback of mine", 0.0, Cause.RAISED))]

    with pytest.raises(raised, match="mine"):
        run(Fake(["a"], answer))
