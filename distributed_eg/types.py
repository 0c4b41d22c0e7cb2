"""Small values that several rooms of the package share; plain, frozen, free of any library."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

TaskId: TypeAlias = int
"""Position in the order of arrival, from 0. A label is the user's name for a task, any integer.

A label that comes again brings the next version of its task, which is worked on under a number of its own; users see
it under the task's first number."""

Transfer: TypeAlias = Literal["fresh", "finetune", "lwf", "continue"]
"""How an expert starts: from the pretrained root without a choice, fine-tuned from its parent, with learning without
forgetting from its parent, or from the earlier version of its own task."""

TransferRule: TypeAlias = Literal["threshold", "best"]
"""How an expert learns from its parent: as its relatedness says, or both ways, of which the better is kept."""

OnRepeat: TypeAlias = Literal["continue", "error", "new_expert"]
"""What a label that comes again means: its expert goes on, it is refused, or its task starts anew."""

OnTaskFailure: TypeAlias = Literal["continue", "stop"]
"""What follows when a task failed for good: the others go on, or the run ends once what runs has ended."""

RelatednessUnit: TypeAlias = Literal["own_error", "variance"]
"""What the difference of two errors is divided by: the paper's Er_k, or the task's own variance."""

AutoencoderKind: TypeAlias = Literal["sgd", "linear"]

GateScore: TypeAlias = Literal["residual", "shared"]
"""What the gate compares tasks by: the error of each autoencoder, as in the paper, or the distance to the tasks'
classes under one covariance."""

Unknown: TypeAlias = Literal["expert", "root", "abstain"]
"""Who answers for an image that is strange to every task: the nearest expert, the pretrained root, or nobody."""

NEAR_TIE = 0.001
"""Candidates whose relatedness differs by less are as good as each other: other seeds or images could choose either."""

NOBODY: TaskId = -1
"""Stands for a task where no expert answers, or none is right."""


@dataclass(frozen=True, slots=True)
class RelatednessRow:
    """How well one candidate's autoencoder explains a task's validation features.

    ``candidate`` is None for the pretrained root. Errors are mean squared distances per sample.
    """

    task: TaskId
    candidate: TaskId | None
    error: float
    own_error: float
    variance: float
    unit: RelatednessUnit
    relatedness: float
    chosen: bool
    transfer: Transfer | None
    """How the expert starts, on the chosen row; None on the others."""


@dataclass(frozen=True, slots=True)
class TransferChoice:
    """Where a task's expert starts: ``parent`` is None for the pretrained root."""

    parent: TaskId | None
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class TransformStep:
    """One of torchvision's transforms: its name, ``v2.`` before those of ``torchvision.transforms.v2``, and what it is
    made with, as JSON values."""

    name: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """What an image goes through before the network, as data; equal ones do the same."""

    mode: str
    """Pillow's name for what images are converted to first, such as RGB."""
    steps: tuple[TransformStep, ...]


def derive_seed(run_seed: int, task: TaskId, purpose: str) -> int:
    """A 63-bit seed that depends on the run, the task and the purpose only, never on worker, attempt or order."""
    digest = hashlib.sha256(f"{run_seed}/{task}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
