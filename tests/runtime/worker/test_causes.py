"""Why stages fail: from what they raised, and from every error that Ray knows."""

from __future__ import annotations

import inspect

import pytest
import ray.exceptions
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from distributed_eg.errors import (
    DamagedFileError,
    DivergedError,
    ExpertGateError,
    HookError,
    InputError,
    StorageError,
    WorkerLostError,
)
from distributed_eg.runtime.ray_backend.errors import Failure, classify
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
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
            Cause.OUT_OF_MEMORY,
        ),
        (RuntimeError("shape mismatch"), Cause.RAISED),
        (raised_from(HookError("x"), MemoryError()), Cause.OUT_OF_MEMORY),
        (raised_from(HookError("x"), raised_from(ValueError(), OSError("x"))), Cause.RAISED),
    ],
    ids=lambda value: value.value if isinstance(value, Cause) else repr(value)[:40],
)
def test_a_cause_is_told_from_what_was_raised(error: Exception, cause: Cause) -> None:
    assert cause_of(error) is cause


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("run", "traceback", cause)


GONE = True
ALIVE = False


@pytest.mark.parametrize("node_is_alive", [True, False])
@pytest.mark.parametrize(
    ("error", "with_node", "without_node"),
    [
        (ActorDiedError(), (Cause.WORKER_LOST, GONE), (Cause.NODE_LOST, GONE)),
        (RayActorError(), (Cause.WORKER_LOST, GONE), (Cause.NODE_LOST, GONE)),
        (ActorUnavailableError("x", None), (Cause.NODE_LOST, GONE), (Cause.NODE_LOST, GONE)),
        (ActorUnschedulableError("x"), (Cause.NODE_LOST, GONE), (Cause.NODE_LOST, GONE)),
        (NodeDiedError("x"), (Cause.NODE_LOST, GONE), (Cause.NODE_LOST, GONE)),
        (OutOfMemoryError("x"), (Cause.OUT_OF_MEMORY, GONE), (Cause.OUT_OF_MEMORY, GONE)),
        (task_error(ValueError("x")), (Cause.RAISED, ALIVE), (Cause.RAISED, ALIVE)),
        (task_error(ObjectLostError("x", "y", "z")), (Cause.NODE_LOST, ALIVE), (Cause.NODE_LOST, ALIVE)),
        (ObjectLostError("x", "y", "z"), (Cause.NODE_LOST, ALIVE), (Cause.NODE_LOST, GONE)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, RayError) else "",
)
def test_rays_errors_are_told_apart(
    error: RayError, with_node: tuple[Cause, bool], without_node: tuple[Cause, bool], node_is_alive: bool
) -> None:
    expected = with_node if node_is_alive else without_node
    assert classify(error, node_is_alive=node_is_alive) == Failure(*expected)


def test_a_preempted_worker_is_not_blamed() -> None:
    error = ActorDiedError()
    error._preempted = True
    assert error.preempted
    assert classify(error, node_is_alive=True) == Failure(Cause.NODE_LOST, worker_is_gone=True)


def test_every_error_that_ray_has_is_classified() -> None:
    """None escapes, whatever a later version adds below the ones that are known."""
    kinds = [kind for _, kind in inspect.getmembers(ray.exceptions, inspect.isclass) if issubclass(kind, RayError)]
    assert len(kinds) > 20
    for kind in kinds:
        error = kind.__new__(kind)
        if isinstance(error, RayTaskError):
            error.cause = ValueError("x")  # type: ignore[attr-defined]
        if isinstance(error, ActorDiedError):
            error._preempted = False
        found = classify(error, node_is_alive=True)
        if isinstance(error, RayActorError):
            assert found.worker_is_gone, kind


def test_ours_are_all_picked_up() -> None:
    """Whatever of our own a stage raises has a cause that the machine knows."""

    def below(kind: type[Exception]) -> list[type[Exception]]:
        return [kind, *(deeper for child in kind.__subclasses__() for deeper in below(child))]

    for kind in below(ExpertGateError):
        assert cause_of(kind("x")) in Cause
