"""What every error of Ray's means for a call on a worker."""

from __future__ import annotations

import inspect

import pytest
import ray.exceptions
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

from distributed_eg.runtime.ray_backend.errors import classify
from distributed_eg.schedule.events import Cause


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
    assert classify(error, node_is_alive=node_is_alive) == expected


def test_a_preempted_worker_is_not_blamed() -> None:
    error = ActorDiedError()
    error._preempted = True
    assert error.preempted
    assert classify(error, node_is_alive=True) == (Cause.NODE_LOST, True)


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
        _, worker_is_gone = classify(error, node_is_alive=True)
        if isinstance(error, RayActorError):
            assert worker_is_gone, kind
