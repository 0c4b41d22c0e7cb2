"""The two actors: a task worker on the device that Ray assigned, and the coordinator as its driver calls it."""

from __future__ import annotations

import logging
import os
import time
import warnings
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError, RayTaskError

from distributed_eg.errors import ExpertGateError, WorkerLostError
from distributed_eg.runtime.messages import Done, Raised, Request, WorkerSetup
from distributed_eg.runtime.worker.worker import TaskWorker
from distributed_eg.store.records import Record
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact

logger = logging.getLogger(__name__)

CONTROL = "control"
"""The concurrency group whose calls are answered while a stage runs."""

_TIMEOUT_S = 600.0
"""For one call. The first one to a new coordinator, which may come at any time, reads the records of the whole run:
thousands of small files, on an object store perhaps."""


class TaskWorkerActor:
    """A task worker on the device that Ray assigned."""

    def __init__(self, setup: WorkerSetup) -> None:
        device = setup.device or _assigned_device()
        torch.set_num_threads(setup.cluster.threads)
        # Avalanche's import says so in every process, and nothing here needs one.
        warnings.filterwarnings("ignore", message="no QP solver found")
        self._worker = TaskWorker(setup, fetch, torch.device(device))

    def where(self) -> tuple[str, int]:
        """Node and process id."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def run(self, request: Request) -> Done | Raised:
        """Carry out a request."""
        return self._worker.run(request)

    @ray.method(concurrency_group=CONTROL)
    def stop(self) -> None:
        """End the stage that runs, at its next batch, and clear the scratch folder."""
        self._worker.close()


def fetch(reference: Any) -> memoryview:
    """A leaf's bytes, without a copy, straight from the node's object store."""
    try:
        return memoryview(ray.get(reference))
    except ObjectLostError as error:
        raise WorkerLostError(f"The task's data lay on a node that is gone: {error}") from error


def _assigned_device() -> str:
    if not ray.get_gpu_ids():
        return "cpu"
    if torch.cuda.is_available():
        return "cuda:0"  # CUDA_VISIBLE_DEVICES holds what Ray assigned
    logger.warning("Ray assigned a GPU to this worker, but torch finds none: it computes on the CPU.")
    return "cpu"


class RemoteCoordinator:
    """The coordinator actor, called with a deadline; every call may be repeated, for Ray does so after a crash."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def registry(self) -> Registry:
        """Everything recorded so far."""
        registry: Registry = _call(self._handle.registry.remote())
        return registry

    def record(self, record: Record) -> Artifact:
        """Seal a record."""
        artifact: Artifact = _call(self._handle.record.remote(record))
        return artifact

    def export(self) -> None:
        """Write the tables as Parquet."""
        _call(self._handle.export.remote())


def _call(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=_TIMEOUT_S)
    except RayTaskError as error:  # what the coordinator raised, behind Ray's own subclass of it
        raise error.cause if isinstance(error.cause, ExpertGateError) else error from None
    except GetTimeoutError as error:
        raise WorkerLostError(
            f"The coordinator has not answered for {_TIMEOUT_S:.0f} s; everything that it recorded is sealed, and "
            "the run can be resumed."
        ) from error
    except RayError as error:
        raise WorkerLostError(f"The coordinator is gone, and the run can be resumed: {error}") from error


def wait_until_gone(handles: list[Any], deadline_s: float) -> None:
    """Wait until the processes of killed actors have ended, or the deadline passes."""
    until = time.monotonic() + deadline_s
    for handle in handles:
        try:
            while (left_s := until - time.monotonic()) > 0:
                ray.get(handle.__ray_ready__.remote(), timeout=left_s)
        except RayError:  # it answers no more
            continue
