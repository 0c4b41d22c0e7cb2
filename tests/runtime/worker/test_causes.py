"""Why stages fail, told from what they raised."""

from __future__ import annotations

import pytest
import torch

from distributed_eg.errors import (
    DamagedFileError,
    DivergedError,
    ExpertGateError,
    HookError,
    InputError,
    StorageError,
    WorkerLostError,
)
from distributed_eg.runtime.worker.causes import cause_of
from distributed_eg.schedule.events import Cause


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("x"), Cause.RAISED),
        (InputError("x"), Cause.RAISED),
        (DivergedError("x"), Cause.RAISED),
        (DamagedFileError("another task's file"), Cause.RAISED),
        (StorageError("x"), Cause.STORAGE),
        (WorkerLostError("its data lay on a node that is gone"), Cause.NODE_LOST),
        (MemoryError(), Cause.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), Cause.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), Cause.OUT_OF_MEMORY),
        (RuntimeError("shape mismatch"), Cause.RAISED),
        (raised_from(HookError("x"), MemoryError()), Cause.OUT_OF_MEMORY),
        (raised_from(HookError("x"), raised_from(ValueError(), OSError("x"))), Cause.RAISED),
    ],
    ids=lambda value: value.value if isinstance(value, Cause) else repr(value)[:40],
)
def test_a_cause_is_told_from_what_was_raised(error: Exception, cause: Cause) -> None:
    assert cause_of(error) is cause


def test_ours_are_all_picked_up() -> None:
    """Whatever of our own a stage raises has a cause that the machine knows."""

    def below(kind: type[Exception]) -> list[type[Exception]]:
        return [kind, *(deeper for child in kind.__subclasses__() for deeper in below(child))]

    for kind in below(ExpertGateError):
        assert cause_of(kind("x")) in Cause
