"""What the machine is told, and the words for stages and failures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from distributed_eg.types import TaskId


class Stage(StrEnum):
    """The stages of a task, in their order. Each ends with something sealed, but for FEATURES, whose result is a
    cache in a node's scratch folder."""

    FEATURES = "features"
    """Images through the backbone; on the run's first task, the standardization statistics too."""
    AUTOENCODER = "autoencoder"
    RELATE = "relate"
    EXPERT = "expert"


class Cause(StrEnum):
    """Why a stage failed; what may help differs by cause."""

    RAISED = "raised"
    """The stage's own code raised: the same input gives the same error again."""
    STORAGE = "storage"
    """The run directory or the scratch folder did not take what the stage wrote: every task would fail by it."""
    OUT_OF_MEMORY = "out of memory"
    ACCELERATOR = "accelerator failed"
    """The worker's GPU, or its driver, reported an error after which nothing more can be computed in that process."""
    WORKER_LOST = "worker lost"
    """The worker's process died, perhaps by the stage's own doing."""
    NODE_LOST = "node lost"
    """The worker's node died, left or was preempted: no stage is to blame."""
    OVERDUE = "overdue"
    """The stage took longer than the run allows, and its worker was ended."""


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker is ready and idle; ``node`` is where its scratch folder lies, ``device`` tells its kind of processor."""

    worker: str
    node: str
    device: str = ""


@dataclass(frozen=True, slots=True)
class WorkerLeaving:
    """A worker will go soon: it finishes what it does and gets nothing new."""

    worker: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker is gone, and with it the stage that it ran."""

    worker: str
    message: str
    cause: Cause = Cause.WORKER_LOST


@dataclass(frozen=True, slots=True)
class TaskArrived:
    """The stream's next task; tasks arrive in order.

    ``continues`` is an earlier task whose autoencoder this one goes on from, where the same label comes again. ``done``
    are the stages whose results an earlier driver left sealed, ``parent`` what RELATE gave where it is among them.
    """

    task: TaskId
    continues: TaskId | None = None
    done: frozenset[Stage] = frozenset()
    parent: TaskId | None = None


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """No further task will arrive."""


@dataclass(frozen=True, slots=True)
class StageFinished:
    """A stage's result is sealed and recorded."""

    task: TaskId
    stage: Stage
    attempt: int
    parent: TaskId | None = None
    """After RELATE: the task whose expert the new one starts from; None for the pretrained root."""


@dataclass(frozen=True, slots=True)
class StageFailed:
    """A stage gave no result."""

    task: TaskId
    stage: Stage
    attempt: int
    cause: Cause
    message: str
    error: Exception | None = None
    """What it raised, where that is an error of this package."""
    details: str = ""
    """The traceback of what it raised."""


Event: TypeAlias = WorkerJoined | WorkerLeaving | WorkerLost | TaskArrived | StreamEnded | StageFinished | StageFailed
