"""Requests that do not depend on each other, such as an evaluation's, over an engine's workers."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from distributed_eg.errors import ExpertGateError, TaskFailedError, WorkerLostError
from distributed_eg.runtime.engine import Ended, Engine
from distributed_eg.runtime.messages import Raised, Request, Result
from distributed_eg.runtime.signals import raise_if_told
from distributed_eg.schedule.events import Cause, WorkerJoined, WorkerLost
from distributed_eg.schedule.retry import Decision, decide


def run_all(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    """Carry out ``requests``, one at a time on each worker; results in their order.

    Failed ones are tried again within the budgets of a stage (``schedule/retry.py``).

    Raises:
        ExpertGateError: one of them failed for good; what it raised, where that is an error of this package.
    """
    waiting = deque(range(len(requests)))
    idle = deque(worker.worker for worker in engine.workers())
    running: dict[int, str] = {}
    leaving: set[str] = set()
    results: dict[int, Result] = {}
    causes: defaultdict[int, list[Cause]] = defaultdict(list)

    def failed(index: int, cause: Cause, error: ExpertGateError) -> None:
        causes[index].append(cause)
        if decide(causes[index], causes[index]) is Decision.FAIL_TASK:
            raise error
        waiting.appendleft(index)

    while len(results) < len(requests):
        while waiting and idle:
            worker, index = idle.popleft(), waiting.popleft()
            running[index] = worker
            engine.submit(index, worker, requests[index])
        raise_if_told()
        for report in engine.wait():
            if isinstance(report, WorkerJoined):
                idle.append(report.worker)
            elif isinstance(report, Ended):
                if report.call not in running:
                    continue  # nobody waits for it
                index, outcome = report.call, report.outcome
                del running[index]
                if report.worker not in leaving:
                    idle.append(report.worker)
                if isinstance(outcome, Raised):
                    error = outcome.error or TaskFailedError(f"A worker failed: {outcome.traceback}")
                    failed(index, outcome.cause, error)
                else:
                    results[index] = outcome.result
            else:
                leaving.add(report.worker)
                idle = deque(worker for worker in idle if worker != report.worker)
                if isinstance(report, WorkerLost):
                    lost = WorkerLostError(f"A worker was lost: {report.message}")
                    for call in [call for call, worker in running.items() if worker == report.worker]:
                        del running[call]
                        failed(call, report.cause, lost)
    return [results[index] for index in range(len(requests))]
