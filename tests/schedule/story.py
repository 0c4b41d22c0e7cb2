"""A machine told one story: what runs, what was started, what was reported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

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
from distributed_eg.schedule.machine import Machine

FEATURES, AUTOENCODER, RELATE, EXPERT = Stage


class Story:
    """A machine that is validated after every event, and what it has asked for.

    With ``tasks`` given, every pull is answered at once: with the next task, then with the end of the stream. Further
    keywords are the machine's.
    """

    def __init__(
        self, tasks: int | None = None, *, workers: int = 0, committed: Collection[int] = (), **machine: Any
    ) -> None:
        self.machine = Machine(committed, **machine)
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

    def lose(self, worker: str, cause: Cause = Cause.WORKER_LOST) -> RunStage | None:
        """A worker goes away; return what it ran."""
        run = next((run for run in self.running.values() if run.worker == worker), None)
        if run is not None:
            del self.running[run.task]
        self.tell(WorkerLost(worker, f"{worker} died", cause))
        return run

    def arrive(self, task: int, *done: Stage, parent: int | None = None, continues: int | None = None) -> None:
        """A task comes, of which an earlier driver left ``done``."""
        self.tell(TaskArrived(task, continues, frozenset(done), parent))

    def finish(self, task: int, parent: int | None = None) -> list[Instruction]:
        """What runs for ``task`` ends well."""
        run = self.running.pop(task)
        return self.tell(StageFinished(task, run.stage, run.attempt, parent))

    def finish_until(self, task: int, stage: Stage, parent: int | None = None) -> None:
        """``task`` goes on until ``stage`` runs."""
        while self.running[task].stage is not stage:
            self.finish(task, parent if self.running[task].stage is RELATE else None)

    def fail(self, task: int, message: str = "boom", cause: Cause = Cause.RAISED) -> list[Instruction]:
        """What runs for ``task`` fails."""
        run = self.running.pop(task)
        return self.tell(StageFailed(task, run.stage, run.attempt, cause, message))

    def finish_all(self, parents: Mapping[int, int | None] | None = None) -> None:
        """Everything that runs ends well, the smallest task first, until nothing runs."""
        while self.running:
            task = min(self.running)
            self.finish(task, (parents or {}).get(task) if self.running[task].stage is RELATE else None)
