"""What Ray's errors mean for a call on a worker: the only place that tells them apart.

A worker actor is never restarted by Ray: one that is gone is replaced by a new one. What Ray says of a call that failed
is never proof that the call did not run.
"""

from __future__ import annotations

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

from distributed_eg.schedule.events import Cause


def classify(error: RayError, *, node_is_alive: bool) -> tuple[Cause, bool]:
    """Why a worker's call failed, and whether its worker is gone, so that it cannot be asked again.

    Args:
        error: what ``ray.get`` of the call raised.
        node_is_alive: whether the worker's node is there.
    """
    if isinstance(error, RayTaskError):
        # The worker answers requests with values: what it raises came before or after the request itself.
        lost = isinstance(error.cause, ObjectLostError | NodeDiedError)
        return Cause.NODE_LOST if lost else Cause.RAISED, False
    if isinstance(error, OutOfMemoryError):  # Ray's memory monitor ended the process
        return Cause.OUT_OF_MEMORY, True
    if isinstance(error, ActorUnavailableError | ActorUnschedulableError | NodeDiedError):
        return Cause.NODE_LOST, True
    if isinstance(error, ActorDiedError) and error.preempted:
        return Cause.NODE_LOST, True
    if isinstance(error, RayActorError):
        return Cause.WORKER_LOST if node_is_alive else Cause.NODE_LOST, True
    if isinstance(error, ObjectLostError):  # the answer lay on a node that is gone, or with an owner that is
        return Cause.NODE_LOST, not node_is_alive
    return Cause.RAISED, False
