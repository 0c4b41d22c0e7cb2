"""The inline engine: the same stages in this process, one after the other, without Ray."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from distributed_eg.errors import WorkerLostError
from distributed_eg.runtime.coordinator import Coordinator, CoordinatorApi
from distributed_eg.runtime.determinism import reproducible, told_of
from distributed_eg.runtime.engine import Ended, Listener, Report
from distributed_eg.runtime.messages import Epoch, Evaluated, Progress, Raised, Request, WorkerSetup
from distributed_eg.runtime.shipping import Shipper
from distributed_eg.runtime.worker.worker import TaskWorker
from distributed_eg.schedule.events import Cause, WorkerJoined

_WORKER = "inline"
_NODE = "here"


class InlineEngine:
    """One worker in this process."""

    def __init__(self, storage_uri: str, generation: int) -> None:
        self.shipper = Shipper(self)
        self.coordinator: CoordinatorApi = Coordinator(storage_uri, generation)
        self.listener: Listener | None = None
        self._raised: Exception | None = None
        """By the listener."""
        self._worker: TaskWorker | None = None
        self._reports: deque[Report] = deque()
        self._calls: deque[tuple[int | None, Request]] = deque()

    def put(self, data: bytes) -> Any:
        """Keep a leaf's bytes as they are."""
        return data

    def get(self, reference: Any) -> bytes:
        """A leaf's bytes."""
        return bytes(reference)

    def observe(self, seen: Progress | Evaluated) -> None:
        """Nobody watches one process."""

    def start(self) -> None:
        """Nothing to start."""

    def add_workers(self, setup: WorkerSetup, num_tasks: int | None) -> None:
        """Make this process a worker."""
        if self._worker is None:
            self._device = torch.device(setup.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self._threads = setup.cluster.threads
            self._worker = TaskWorker(setup, lambda data: data, self._device, self._tell)
            self._joined = WorkerJoined(_WORKER, _NODE, told_of(self._device))
            self._reports.append(self._joined)

    def workers(self) -> list[WorkerJoined]:
        """This process, once it is a worker."""
        return [] if self._worker is None else [self._joined]

    def submit(self, call: int | None, worker: str, request: Request) -> None:
        """Queue a call; ``wait`` carries it out."""
        self._calls.append((call, request))

    def wait(self) -> list[Report]:
        """Carry out the oldest call.

        Raises:
            WorkerLostError: the accelerator failed, with which a process cannot go on.
        """
        if self._calls and self._worker is not None:
            call, request = self._calls.popleft()
            outcome = self._worker.run(request)
            if self._raised is not None:
                raised, self._raised = self._raised, None
                raise raised
            if isinstance(outcome, Raised) and outcome.cause is Cause.ACCELERATOR:
                raise WorkerLostError(
                    f"The accelerator failed, and nothing more can be computed in this process: {outcome.message}. "
                    "What is sealed is kept: where the run has a storage, a new process resumes it."
                )
            self._reports.append(Ended(call, _WORKER, outcome))
        reports = list(self._reports)
        self._reports.clear()
        return reports

    def _tell(self, epoch: Epoch) -> None:
        """Told in the middle of a stage, which neither what a listener draws at random changes, nor what it raises."""
        if self.listener is None or self._raised is not None:
            return
        try:
            with reproducible(0, self._threads, self._device):
                self.listener(_WORKER, epoch)
        except Exception as error:
            self._raised = error

    def begin(self) -> bool:
        """Always: nothing takes the worker away."""
        return True

    def end(self) -> None:
        """Forget what is queued."""
        self._calls.clear()
        self._reports.clear()

    def close(self) -> None:
        """Remove the scratch folder."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
