"""What Ray's errors mean for a call on a worker: the only place that tells them apart.

A worker actor is never restarted by Ray: one that is gone is replaced by a new one. What Ray says of a call that failed
is never proof that the call did not run.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call failed; ``worker_is_gone`` where its worker cannot be asked again."""

    cause: Cause
    worker_is_gone: bool


def classify(error: RayError, *, node_is_alive: bool) -> Failure:
    """What ``error``, from ``ray.get`` of a worker's call, means; ``node_is_alive`` tells of the worker's node."""
    if isinstance(error, RayTaskError):
        # The worker answers requests with values: what it raises came before or after the request itself.
        lost = isinstance(error.cause, ObjectLostError | NodeDiedError)
        return Failure(Cause.NODE_LOST if lost else Cause.RAISED, worker_is_gone=False)
    if isinstance(error, OutOfMemoryError):  # Ray's memory monitor ended the process
        return Failure(Cause.OUT_OF_MEMORY, worker_is_gone=True)
    if isinstance(error, ActorUnavailableError | ActorUnschedulableError | NodeDiedError):
        return Failure(Cause.NODE_LOST, worker_is_gone=True)
    if isinstance(error, ActorDiedError) and error.preempted:
        return Failure(Cause.NODE_LOST, worker_is_gone=True)
    if isinstance(error, RayActorError):
        return Failure(Cause.WORKER_LOST if node_is_alive else Cause.NODE_LOST, worker_is_gone=True)
    if isinstance(error, ObjectLostError):  # the answer lay on a node that is gone, or with an owner that is
        return Failure(Cause.NODE_LOST, worker_is_gone=not node_is_alive)
    return Failure(Cause.RAISED, worker_is_gone=False)
