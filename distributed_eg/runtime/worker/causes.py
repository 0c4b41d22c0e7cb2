"""Why a call on a worker failed, told from the exception that it raised there."""

from __future__ import annotations

import torch

from distributed_eg.errors import DamagedFileError, StorageError, WorkerLostError
from distributed_eg.schedule.events import Cause

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch says, in a plain RuntimeError, where the machine has no memory left."""


def cause_of(error: BaseException) -> Cause:
    """The cause of a failed stage, looked for in ``error`` and in what it was raised from."""
    if isinstance(error, DamagedFileError):  # a file of another task: writing again does not help this one
        return Cause.RAISED
    if isinstance(error, StorageError):
        return Cause.STORAGE
    if isinstance(error, WorkerLostError):  # data that lay on a lost node
        return Cause.NODE_LOST
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Cause.OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY):
        return Cause.OUT_OF_MEMORY
    return Cause.RAISED if error.__cause__ is None else cause_of(error.__cause__)
