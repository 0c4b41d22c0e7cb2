"""What the machine asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from distributed_eg.schedule.events import Stage, StageFailed
from distributed_eg.types import TaskId


@dataclass(frozen=True, slots=True)
class RunStage:
    """Run a stage on a worker, and report its end with the same attempt number."""

    task: TaskId
    stage: Stage
    attempt: int
    worker: str
    with_statistics: bool = False
    """FEATURES of the task whose features give the run's standardization statistics."""


@dataclass(frozen=True, slots=True)
class PullTask:
    """A worker would be idle: bring the stream's next task, or say that the stream has ended."""


@dataclass(frozen=True, slots=True)
class ReportFailure:
    """A task will not be trained: its own stage failed for good, or ``message`` names what it needed.

    ``message`` tells the cause of every attempt, all of which are in ``failures``.
    """

    task: TaskId
    stage: Stage
    message: str
    failures: tuple[StageFailed, ...] = ()


Instruction: TypeAlias = RunStage | PullTask | ReportFailure
