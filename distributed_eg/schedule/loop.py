"""The loop of a driver: what happened is told to the machine, and what it asks for is done through ports.

What a stage left is recorded before the machine hears of it, so what runs next always finds what it needs; and it is
recorded only if it comes from an attempt that still runs.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

from distributed_eg.schedule import events
from distributed_eg.schedule.events import Cause, Event, StageFailed, StageFinished, TaskArrived, WorkerLost
from distributed_eg.schedule.instructions import ReportFailure, RunStage
from distributed_eg.schedule.machine import Machine
from distributed_eg.types import TaskId

Result = TypeVar("Result")
Result_contra = TypeVar("Result_contra", contravariant=True)


class Ports(Protocol[Result_contra]):
    """What the loop asks of the world around it."""

    def pull(self) -> TaskArrived | None:
        """The stream's next task, with what is sealed of it already; None at the stream's end."""

    def submit(self, run: RunStage) -> None:
        """Begin a stage on its worker; its end is told to the loop under the same attempt number."""

    def record(self, run: RunStage, result: Result_contra) -> TaskId | None:
        """Seal what a stage left; after RELATE the parent that it chose."""

    def commit(self, task: TaskId) -> None:
        """A task is sealed; told once for each, in order of arrival."""

    def give_up(self, failure: ReportFailure) -> None:
        """A task will not be trained."""


class Loop(Generic[Result]):
    """One call of training: told every event, until its machine is done."""

    def __init__(self, machine: Machine, ports: Ports[Result]) -> None:
        self.machine = machine
        self.runs: dict[int, RunStage] = {}
        """What runs now, by attempt number."""
        self._ports = ports
        self._order: deque[TaskId] = deque()
        """Tasks that arrived, and were neither committed nor given up."""

    def finished(self, attempt: int, result: Result) -> None:
        """A stage ended well; ignored where that attempt does not run: it was given up, or reports twice."""
        run = self.runs.get(attempt)
        if run is not None:
            parent = self._ports.record(run, result)
            self.tell(StageFinished(run.task, run.stage, attempt, parent))

    def failed(
        self, attempt: int, cause: Cause, message: str, *, error: Exception | None = None, details: str = ""
    ) -> None:
        """A stage gave no result; ignored as in ``finished``."""
        run = self.runs.get(attempt)
        if run is not None:
            self.tell(StageFailed(run.task, run.stage, attempt, cause, message, error, details))

    def tell(self, event: Event) -> None:
        """Tell the machine, and do what it says until it asks for nothing more."""
        told = [event]
        for event in told:
            if isinstance(event, WorkerLost):
                self.runs = {attempt: run for attempt, run in self.runs.items() if run.worker != event.worker}
            elif isinstance(event, (StageFinished, StageFailed)):
                del self.runs[event.attempt]
            for instruction in self.machine.handle(event):
                if isinstance(instruction, RunStage):
                    self.runs[instruction.attempt] = instruction
                    self._ports.submit(instruction)
                elif isinstance(instruction, ReportFailure):
                    self._order.remove(instruction.task)
                    self._ports.give_up(instruction)
                elif (arrival := self._ports.pull()) is not None:
                    self._order.append(arrival.task)
                    told.append(arrival)
                else:
                    told.append(events.StreamEnded())
            self._commit()

    def _commit(self) -> None:
        while self._order and self.machine.is_committed(self._order[0]):
            self._ports.commit(self._order.popleft())
