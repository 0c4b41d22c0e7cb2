"""The two actors: a task worker on the device that Ray assigned, and the coordinator as its driver calls it."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distributed_eg.errors import ExpertGateError, InputError, RunInUseError, WorkerLostError, told
from distributed_eg.masking import masked
from distributed_eg.runtime import pickling
from distributed_eg.runtime.coordinator import Coordinator
from distributed_eg.runtime.determinism import CUBLAS, told_of
from distributed_eg.runtime.messages import Epoch, Request, WorkerSetup
from distributed_eg.runtime.ray_backend.cluster import NAMESPACE
from distributed_eg.runtime.worker.causes import cause_of
from distributed_eg.runtime.worker.worker import TaskWorker
from distributed_eg.schedule.events import Cause
from distributed_eg.store.records import Record
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact

logger = logging.getLogger(__name__)

CONTROL = "control"
"""The concurrency group whose calls are answered while a stage runs."""

_TIMEOUT_S = 600.0
"""For one call. The first one to a new coordinator, which may come at any time, reads the records of the whole run:
thousands of small files, on an object store perhaps."""
_NAME_TIMEOUT_S = 20.0
_CONTEXT_BYTES = 600 * 2**20
"""Of a card, for what CUDA keeps for each process that computes there, which torch does not count."""
_LEFT_ALONE = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


class TaskWorkerActor:
    """A task worker on the device that Ray assigned; on the node ``home``, modules are looked for in ``path``, too."""

    def __init__(self, setup: WorkerSetup, home: str, path: Sequence[str]) -> None:
        if ray.get_runtime_context().get_node_id() == home:
            _look_in(path)
        torch.set_num_threads(setup.cluster.threads)
        # Avalanche's import says so in every process, and nothing here needs one.
        warnings.filterwarnings("ignore", message="no QP solver found")
        self._refusal: ExpertGateError | None = None
        self._epoch: Epoch | None = None
        try:
            device, share = torch.device(_assigned_device(setup.device)), setup.cluster.gpus_per_worker
            if device.type != "cpu" and share is not None and share < 1:  # the rest of the card is its neighbours'
                context = _CONTEXT_BYTES / torch.cuda.get_device_properties(device).total_memory
                torch.cuda.set_per_process_memory_fraction(max(share - context, share / 2), device)
            self._worker, self._told = TaskWorker(setup, fetch, device, self._tell), told_of(device)
        except InputError as error:  # of what a constructor raises, Ray hands on the text only
            self._refusal = error
        except Exception as error:
            if cause_of(error) not in (Cause.ACCELERATOR, Cause.OUT_OF_MEMORY):
                raise
            # A card that was just freed may refuse for a moment: another process tries again.
            self._refusal = WorkerLostError(f"Its accelerator refused: {told(error)}")

    def where(self) -> tuple[str, int, str]:
        """Node, process id, and what kind of processor it computes on.

        Raises:
            InputError: no worker can be made from this setup here.
            WorkerLostError: the accelerator refused, perhaps for a moment only.
        """
        if self._refusal is not None:
            raise self._refusal
        return ray.get_runtime_context().get_node_id(), os.getpid(), self._told

    def run(self, request: Request) -> bytes:
        """Carry out a request; what comes of it, pickled, with all tensors on the CPU: the driver may have no GPU."""
        self._epoch = None
        return pickling.dumps(self._worker.run(request), "What a stage gives")

    def _tell(self, epoch: Epoch) -> None:
        self._epoch = epoch

    @ray.method(concurrency_group=CONTROL)
    def epoch(self) -> Epoch | None:
        """How far the expert is that it trains."""
        return self._epoch

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


def _look_in(path: Sequence[str]) -> None:
    """Add the folders of ``path`` that are missing in ``sys.path``, each behind the one that it follows there."""
    for i, folder in enumerate(path):
        if folder not in sys.path:
            sys.path.insert(sys.path.index(path[i - 1]) + 1 if i else 0, folder)


def _assigned_device(asked: str | None) -> str:
    """Where a worker computes: on what Ray assigned, where it was not ``asked`` for the CPU.

    Raises:
        InputError: a GPU was asked for by name, and there is none to compute on.
    """
    if asked == "cpu" or (asked is None and not ray.get_gpu_ids()):
        return "cpu"
    if torch.cuda.is_available():
        # CUDA_VISIBLE_DEVICES holds what Ray assigned, but where Ray was told to leave it alone.
        return f"cuda:{ray.get_gpu_ids()[0]}" if os.environ.get(_LEFT_ALONE) else "cuda:0"
    if asked is not None:
        raise InputError(
            f"device={asked!r} was asked for, but torch {torch.__version__} finds no GPU on this node: install a torch "
            "for its driver there, or leave device out."
        )
    logger.warning("Ray assigned a GPU to this worker, but torch finds none: it computes on the CPU.")
    return "cpu"


def start_worker(setup: WorkerSetup, cpus: float, gpus: float) -> Any:
    """A worker actor, on whatever node has room for it."""
    as_actor: Any = ray.remote(concurrency_groups={CONTROL: 1})  # type: ignore[call-overload]
    # Both are read when CUDA starts: sums of cuBLAS in one order, and memory that others on the card can have back.
    variables = {CUBLAS[0]: CUBLAS[1], "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    options = as_actor(TaskWorkerActor).options(
        num_cpus=cpus,
        num_gpus=gpus,
        scheduling_strategy="SPREAD",
        namespace=NAMESPACE,
        runtime_env={"env_vars": variables} if gpus > 0 else None,
    )
    home = ray.get_runtime_context().get_node_id()
    return options.remote(setup, home, [os.path.abspath(folder) for folder in sys.path])


def start_coordinator(storage_uri: str, run_id: str, generation: int) -> Any:
    """The named actor of this run; one that an ended driver left behind is gone in a moment.

    Raises:
        RunInUseError: another driver on this cluster holds it.
    """
    actor: Any = ray.remote(Coordinator)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    until = time.monotonic() + _NAME_TIMEOUT_S
    while True:
        try:
            return actor.options(
                name=f"coordinator-{run_id}",
                namespace=NAMESPACE,
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=here,
            ).remote(storage_uri, generation)
        except ValueError as error:  # what Ray raises where the name is taken
            if time.monotonic() > until:
                raise RunInUseError(
                    f"The run in {masked(storage_uri)!r} has a coordinator on this Ray cluster already, "
                    f"coordinator-{run_id}: another driver works on it. End that one first."
                ) from error
            time.sleep(0.2)


class RemoteCoordinator:
    """The coordinator actor, called with a deadline; every call may be repeated, for Ray does so after a crash.

    Args:
        handle: the actor.
        require_ray: raises where Ray is not there any more; asked before every call.
        way_on: what is left to the run where the coordinator is gone, as a clause.
    """

    def __init__(self, handle: Any, require_ray: Callable[[], None], way_on: str) -> None:
        self._handle = handle
        self._require_ray = require_ray
        self._way_on = way_on

    def registry(self) -> Registry:
        """Everything recorded so far."""
        registry: Registry = self._call("registry")
        return registry

    def record(self, record: Record) -> Artifact:
        """Seal a record."""
        artifact: Artifact = self._call("record", record)
        return artifact

    def export(self) -> None:
        """Write the tables as Parquet."""
        self._call("export")

    def _call(self, method: str, *arguments: Any) -> Any:
        self._require_ray()
        try:
            return ray.get(getattr(self._handle, method).remote(*arguments), timeout=_TIMEOUT_S)
        except RayTaskError as error:  # what the coordinator raised, behind Ray's own subclass of it
            raise error.cause if isinstance(error.cause, ExpertGateError) else error from None
        except GetTimeoutError as error:
            raise WorkerLostError(
                f"The coordinator has not answered for {_TIMEOUT_S:.0f} s; everything that it recorded is sealed, and "
                f"{self._way_on}."
            ) from error
        except RayError as error:
            raise WorkerLostError(f"The coordinator is gone, and {self._way_on}: {error}") from error


def end_workers(ready: list[Any], others: list[Any], deadline_s: float) -> None:
    """Ask ``ready`` workers to end what they do, wait for that and for their processes' end at most so long each; end
    ``others``, which may not answer."""
    if stopped := [handle.stop.remote() for handle in ready]:
        ray.wait(stopped, num_returns=len(stopped), timeout=deadline_s)
    for handle in [*ready, *others]:
        ray.kill(handle)
    until = time.monotonic() + deadline_s
    for handle in ready:
        try:
            while (left_s := until - time.monotonic()) > 0:
                ray.get(handle.__ray_ready__.remote(), timeout=left_s)
        except RayError:  # it answers no more
            continue
