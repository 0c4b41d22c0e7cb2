"""A session: one driver's work on one run, from training and evaluation calls to requests on an engine's workers."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

from distributed_eg.errors import ExpertGateError, TaskFailedError, WorkerLostError
from distributed_eg.runtime.dispatcher import Observer, OnCommit, Training
from distributed_eg.runtime.engine import Ended, Engine, Lost
from distributed_eg.runtime.messages import (
    EvaluateRequest,
    EvaluateResult,
    Raised,
    ReferenceRequest,
    Request,
    Result,
    TaskInput,
    WorkerSetup,
)
from distributed_eg.runtime.resuming import is_whole
from distributed_eg.runtime.shipping import Shipped
from distributed_eg.schedule.events import Cause, WorkerJoined, WorkerLeaving
from distributed_eg.schedule.machine import Machine
from distributed_eg.schedule.retry import Decision, decide
from distributed_eg.store.records import StatisticsRecord
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Storage
from distributed_eg.types import OnTaskFailure

logger = logging.getLogger(__name__)

_TASKS_AHEAD = 4
_ATTEMPTS_PER_DRIVER = 10**9


class Session:
    """One driver's work on one run.

    Args:
        engine: where requests run; started.
        storage: the run directory.
        setup: what its workers are made from.
        on_task_failure: whether other tasks go on after one failed.
        observer: told of every stage that starts or ends.
    """

    def __init__(
        self,
        engine: Engine,
        storage: Storage,
        setup: WorkerSetup,
        on_task_failure: OnTaskFailure,
        observer: Observer | None = None,
    ) -> None:
        self._engine = engine
        self._storage = storage
        self._setup = setup
        self._on_task_failure = on_task_failure
        self._observer = observer
        self._calls = itertools.count()
        # Numbers of a later driver lie above all that an earlier one can have given out.
        self._first_attempt = setup.generation * _ATTEMPTS_PER_DRIVER
        self._has_reference = False
        self._recorded = engine.coordinator.registry().snapshot()
        self.registry = Registry(statistics=self._whole_statistics())
        """What this driver has seen: a resumed run's tasks come in as the stream brings them again."""

    def _whole_statistics(self) -> StatisticsRecord | None:
        record = self._recorded.statistics
        if record is None or not _counts(record, self._recorded):
            return None
        artifacts = [a for a in (record.artifact, record.root_autoencoder) if a is not None]
        return record if all([is_whole(self._storage, artifact) for artifact in artifacts]) else None

    def fit_reference(self, data: Shipped) -> None:
        """Statistics and the root's autoencoder from a reference dataset, where the run has none yet."""
        if self.registry.statistics is None:
            self._engine.add_workers(self._setup, 1)
            (record,) = self._run_all([ReferenceRequest(data)])
            assert isinstance(record, StatisticsRecord)
            self.adopt_reference(record)

    def adopt_reference(self, record: StatisticsRecord) -> None:
        """Take statistics, and the root's autoencoder, that are sealed in the run directory already."""
        if self.registry.statistics != record:
            self._engine.coordinator.record(record)
            self.registry.statistics = record
        self._has_reference = True

    def train(self, inputs: Iterator[TaskInput], num_tasks: int | None, trainer: Shipped, on_commit: OnCommit) -> None:
        """Train every task of ``inputs``, pulled one by one as workers become free.

        ``on_commit`` is told of each committed task and its training log, in task order.

        Raises:
            TaskFailedError: tasks failed; every task that did not need a failed one is committed. Where one task failed
                by an error of ours, that error is raised itself.
            Exception: what ``inputs`` raised, once everything that it gave before is done.
        """
        known = self.registry.statistics
        if known is not None and not self._has_reference and not _counts(known, self.registry):
            self.registry.statistics = None
        self._engine.add_workers(self._setup, num_tasks)
        # A stream of unknown length may not fit in memory: it is read a little ahead of the work only.
        ahead = _TASKS_AHEAD if num_tasks is None else None
        machine = Machine(
            self.registry.manifests,
            has_statistics=self.registry.statistics is not None,
            tasks_per_worker=ahead,
            first_attempt=self._first_attempt,
            stop_on_failure=self._on_task_failure == "stop",
        )
        training = Training(
            self._engine,
            self._storage,
            self._recorded,
            self.registry,
            machine,
            inputs,
            trainer,
            self._calls,
            self._observer,
        )
        try:
            training.run(on_commit)
        except Exception:
            self._export_anyway()
            raise
        finally:
            self._first_attempt = machine.next_attempt
            if not machine.done:
                self._engine.abandon_calls()
        self._engine.coordinator.export()

    def _export_anyway(self) -> None:
        """Write the tables, after an error that must not be hidden by another one."""
        try:
            self._engine.coordinator.export()
        except ExpertGateError as error:
            logger.warning(
                "The tables were not written; they are exports only, and the next driver writes them. %s", error
            )

    def evaluate(self, requests: Sequence[EvaluateRequest]) -> list[EvaluateResult]:
        """Carry out ``requests`` on the workers; results in their order."""
        self._engine.add_workers(self._setup, len(requests))
        try:
            results = self._run_all(requests)
        except BaseException:
            self._engine.abandon_calls()
            raise
        return [result for result in results if isinstance(result, EvaluateResult)]

    def _run_all(self, requests: Sequence[Request]) -> list[Result]:
        waiting = deque(range(len(requests)))
        idle = deque(worker.worker for worker in self._engine.workers())
        running: dict[int, int] = {}
        results: dict[int, Result] = {}
        causes: defaultdict[int, list[Cause]] = defaultdict(list)
        leaving: set[str] = set()

        def failed(call: int, cause: Cause, error: ExpertGateError) -> None:
            index = running.pop(call)
            causes[index].append(cause)
            if decide(causes[index], causes[index]) is Decision.FAIL_TASK:
                raise error
            waiting.appendleft(index)

        while len(results) < len(requests):
            while waiting and idle:
                index, call = waiting.popleft(), next(self._calls)
                running[call] = index
                self._engine.submit(call, idle.popleft(), requests[index])
            for report in self._engine.wait():
                if isinstance(report, WorkerJoined):
                    idle.append(report.worker)
                elif isinstance(report, WorkerLeaving | Lost):
                    leaving.add(report.worker)
                    idle = deque(worker for worker in idle if worker != report.worker)
                if isinstance(report, Lost):
                    for call in running.keys() & set(report.calls):
                        failed(call, report.cause, WorkerLostError(f"A worker was lost: {report.message}"))
                elif isinstance(report, Ended) and report.call in running:
                    if report.worker not in leaving:
                        idle.append(report.worker)
                    if isinstance(report.outcome, Raised):
                        failed(report.call, report.outcome.cause, _error_of(report.outcome))
                    else:
                        results[running.pop(report.call)] = report.outcome.result
        return [results[index] for index in range(len(requests))]


def _counts(statistics: StatisticsRecord, registry: Registry) -> bool:
    """Whether statistics are the run's for good. Those of a first task that failed before anything was learnt under
    them are not: its data may have been corrected since."""
    return statistics.root_autoencoder is not None or bool(registry.autoencoders)


def _error_of(raised: Raised) -> ExpertGateError:
    return raised.error or TaskFailedError(f"A worker failed: {raised.traceback}")
