"""The Ray engine: a pool of warm task worker actors, and the coordinator actor; what Ray says becomes our reports.

The driver owns the workers: actors that a coordinator created would die with its process.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from distributed_eg.config import ClusterConfig
from distributed_eg.errors import ExpertGateError, InputError, ResourceError, WorkerLostError
from distributed_eg.runtime.coordinator import Coordinator, CoordinatorApi, Record
from distributed_eg.runtime.engine import Ended, Lost, Report
from distributed_eg.runtime.registry import Registry
from distributed_eg.runtime.requests import CloseRequest, Done, Raised, Request, WorkerSetup
from distributed_eg.runtime.shipping import Shipper
from distributed_eg.runtime.worker import TaskWorker
from distributed_eg.schedule.events import WorkerJoined
from distributed_eg.store.records import StageTiming
from distributed_eg.store.sealing import Artifact
from distributed_eg.types import TaskId

logger = logging.getLogger(__name__)

NAMESPACE = "distributed-eg"
_CALL_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 5.0
_POLL_S = 1.0
_MAX_REPLACEMENTS = 20


class _TaskWorkerActor:
    """A task worker on the device that Ray assigned."""

    def __init__(self, name: str, setup: WorkerSetup) -> None:
        device = setup.device or _assigned_device()
        torch.set_num_threads(setup.threads)
        # Avalanche's import says so in every process, and nothing here needs one.
        warnings.filterwarnings("ignore", message="no QP solver found")
        self._worker = TaskWorker(setup, _fetch, torch.device(device))

    def where(self) -> tuple[str, int]:
        """Node and process id."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def run(self, request: Request) -> Done | Raised:
        """Carry out a request."""
        return self._worker.run(request)


def _fetch(reference: Any) -> memoryview:
    """A leaf's bytes, without a copy, straight from the node's object store."""
    return memoryview(ray.get(reference))


def _assigned_device() -> str:
    if not ray.get_gpu_ids():
        return "cpu"
    if torch.cuda.is_available():
        return "cuda:0"  # CUDA_VISIBLE_DEVICES holds what Ray assigned
    logger.warning("Ray assigned a GPU to this worker, but torch finds none: it computes on the CPU.")
    return "cpu"


@dataclass
class _Worker:
    name: str
    handle: Any
    ready: Any
    since: float
    node: str | None = None
    calls: dict[Any, int] = field(default_factory=dict)


class _RemoteCoordinator:
    """The coordinator actor, called with a deadline."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def registry(self) -> Registry:
        """Everything recorded so far."""
        return _call(self._handle.registry.remote())

    def record(self, record: Record) -> Artifact:
        """Seal a record."""
        return _call(self._handle.record.remote(record))

    def note_timings(self, task: TaskId, timings: list[StageTiming]) -> None:
        """Keep who did what for how long."""
        _call(self._handle.note_timings.remote(task, timings))

    def export(self) -> None:
        """Write the tables as Parquet."""
        _call(self._handle.export.remote())


def _call(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=_CALL_TIMEOUT_S)
    except RayTaskError as error:  # what the coordinator raised, behind Ray's own subclass of it
        raise error.cause if isinstance(error.cause, ExpertGateError) else error from None
    except GetTimeoutError as error:
        raise WorkerLostError(f"The coordinator has not answered for {_CALL_TIMEOUT_S:.0f} s.") from error
    except RayError as error:
        raise WorkerLostError(f"The coordinator is gone: {error}") from error


class RayEngine:
    """Worker actors and a coordinator actor on a Ray cluster.

    Args:
        config: where and how many.
        storage_uri: the run directory.
        run_id: names the coordinator inside the cluster.
    """

    def __init__(self, config: ClusterConfig, storage_uri: str, run_id: str) -> None:
        self._config = config
        self._storage_uri = storage_uri
        self._run_id = run_id
        self.shipper = Shipper(self)
        self.coordinator: CoordinatorApi
        self._owns_ray = False
        self._setup: WorkerSetup | None = None
        self._pool: dict[str, _Worker] = {}
        self._starting: dict[str, _Worker] = {}
        self._coordinator: Any = None
        self._num_named = 0
        self._num_replaced = 0

    def put(self, data: bytes) -> Any:
        """Keep a leaf's bytes in the object store; a NumPy array is read there without a copy."""
        return ray.put(np.frombuffer(data, dtype=np.uint8))

    def start(self) -> None:
        """Attach to the cluster or start Ray on this machine; start the coordinator."""
        if not ray.is_initialized():
            address = self._config.address or os.environ.get("RAY_ADDRESS")
            if address:
                try:
                    ray.init(address=address, namespace=NAMESPACE, logging_level=logging.WARNING)
                except ConnectionError as error:
                    raise ResourceError(f"No Ray cluster answers at {address!r}: {error}") from error
            else:
                ray.init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, math.ceil((self._config.num_workers or 1) * self._cpus)),
                    include_dashboard=False,
                    namespace=NAMESPACE,
                    logging_level=logging.WARNING,
                )
            self._owns_ray = True
        machines = {node["NodeManagerAddress"] for node in _alive_nodes()}
        if len(machines) > 1 and self._config.storage is None:
            self.close()
            raise InputError(
                f"The cluster has {len(machines)} machines: give ClusterConfig(storage=…), a folder or URI that all of "
                "them see."
            )
        self._refuse_infeasible()
        actor: Any = ray.remote(Coordinator)
        self._coordinator = actor.options(
            name=f"coordinator-{self._run_id}", namespace=NAMESPACE, num_cpus=0, max_restarts=-1, max_task_retries=-1
        ).remote(self._storage_uri)
        self.coordinator = _RemoteCoordinator(self._coordinator)

    @property
    def _cpus(self) -> float:
        return self._config.cpus_per_worker

    @property
    def _gpus(self) -> float:
        if self._config.gpus_per_worker is not None:
            return self._config.gpus_per_worker
        return 1.0 if any(node["Resources"].get("GPU", 0) >= 1 for node in _alive_nodes()) else 0.0

    def add_workers(self, setup: WorkerSetup, num_tasks: int | None) -> None:
        """Grow the pool to ``num_workers``, or to what the cluster holds, at most one a task."""
        self._setup = setup
        wanted = self._config.num_workers
        if wanted is None:
            fits = sum(_workers_on(node, self._cpus, self._gpus) for node in _alive_nodes())
            wanted = fits if num_tasks is None else min(fits, num_tasks)
        while len(self._pool) + len(self._starting) < max(1, wanted):
            self._spawn()

    def workers(self) -> list[WorkerJoined]:
        """Workers that are ready."""
        return [WorkerJoined(worker.name, worker.node or "") for worker in self._pool.values()]

    def submit(self, call: int, worker: str, request: Request) -> None:
        """Begin a call on a worker."""
        state = self._pool[worker]
        state.calls[state.handle.run.remote(request)] = call

    def wait(self) -> list[Report]:
        """Reports since the last call; waits up to a second for the first."""
        references: dict[Any, _Worker] = {worker.ready: worker for worker in self._starting.values()}
        references.update({ref: worker for worker in self._pool.values() for ref in worker.calls})
        if not references:
            raise WorkerLostError("No worker is left, and none is coming up.")
        done, _ = ray.wait(list(references), num_returns=1, timeout=_POLL_S)
        more, _ = ray.wait(list(references), num_returns=len(references), timeout=0)
        reports: deque[Report] = deque()
        for reference in dict.fromkeys([*done, *more]):
            worker = references[reference]
            if worker.name in self._starting:
                reports.extend(self._started(worker))
            elif worker.name in self._pool:
                reports.append(self._ended(worker, reference))
        self._refuse_late_workers()
        return list(reports)

    def close(self) -> None:
        """End the actors and, where ``start`` began it, Ray."""
        if not ray.is_initialized():  # Ray's own exit came first, and took the actors with it
            return
        by_node = {worker.node: worker for worker in self._pool.values()}
        cleared: list[Any] = [worker.handle.run.remote(CloseRequest()) for worker in by_node.values()]
        if cleared:
            ray.wait(cleared, num_returns=len(cleared), timeout=_CLOSE_TIMEOUT_S)
        for worker in [*self._pool.values(), *self._starting.values()]:
            ray.kill(worker.handle)
        if self._coordinator is not None:
            ray.kill(self._coordinator)
        self._pool.clear()
        self._starting.clear()
        self._coordinator = None
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    def _spawn(self) -> None:
        name = f"worker-{self._num_named}"
        self._num_named += 1
        actor: Any = ray.remote(_TaskWorkerActor)
        # cuBLAS reads this when it starts: without it, its sums differ from run to run.
        environment = {"env_vars": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}} if self._gpus > 0 else None
        handle = actor.options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            scheduling_strategy="SPREAD",
            namespace=NAMESPACE,
            runtime_env=environment,
        ).remote(name, self._setup)
        self._starting[name] = _Worker(name, handle, handle.where.remote(), time.monotonic())

    def _started(self, worker: _Worker) -> list[Report]:
        del self._starting[worker.name]
        try:
            worker.node, pid = ray.get(worker.ready)
        except RayError as error:
            self._num_replaced += 1
            if not (self._pool or self._starting) or self._num_replaced > _MAX_REPLACEMENTS:
                raise WorkerLostError(f"The worker {worker.name} did not come up: {error}") from error
            logger.warning("%s did not come up, another takes its place: %s", worker.name, str(error).splitlines()[0])
            self._spawn()
            return []
        self._pool[worker.name] = worker
        logger.debug("%s is ready: node %s, process %d", worker.name, worker.node, pid)
        return [WorkerJoined(worker.name, worker.node or "")]

    def _ended(self, worker: _Worker, reference: Any) -> Report:
        call = worker.calls.pop(reference)
        try:
            return Ended(call, worker.name, ray.get(reference))
        except RayActorError as error:
            return self._lost(worker, call, str(error))
        except RayError as error:
            return Ended(call, worker.name, Raised(None, str(error), str(error), 0.0))

    def _lost(self, worker: _Worker, call: int, message: str) -> Lost:
        logger.warning("%s is lost, with what it was doing: %s", worker.name, message.splitlines()[0])
        del self._pool[worker.name]
        self._num_replaced += 1
        if self._num_replaced <= _MAX_REPLACEMENTS:
            self._spawn()
        return Lost(worker.name, message, (call, *worker.calls.values()))

    def _refuse_infeasible(self) -> None:
        nodes = _alive_nodes()
        if any(_workers_on(node, self._cpus, self._gpus) for node in nodes):
            return
        offers = ", ".join(
            f"{n['NodeManagerAddress']}: {n['Resources'].get('CPU', 0):g} CPU, {n['Resources'].get('GPU', 0):g} GPU"
            for n in nodes
        )
        message = (
            f"A worker asks for {self._cpus:g} CPU and {self._gpus:g} GPU, which no node has ({offers}); lower "
            "cpus_per_worker or gpus_per_worker, or add a node."
        )
        self.close()
        raise ResourceError(message)

    def _refuse_late_workers(self) -> None:
        if self._pool or not self._starting:
            return
        waited_s = time.monotonic() - min(worker.since for worker in self._starting.values())
        if waited_s > self._config.startup_timeout_s:
            raise ResourceError(
                f"No worker came up within {waited_s:.0f} s: each asks for {self._cpus:g} CPU and {self._gpus:g} GPU, "
                f"and the cluster has {ray.available_resources()} free. Wait for other jobs, lower the demand, or "
                "raise startup_timeout_s."
            )


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _workers_on(node: dict[str, Any], cpus: float, gpus: float) -> int:
    resources = node["Resources"]
    by_cpu = resources.get("CPU", 0) // cpus if cpus else math.inf
    # A fraction of a GPU never spans two GPUs.
    by_gpu = resources.get("GPU", 0) // gpus if gpus >= 1 else math.inf
    if 0 < gpus < 1:
        by_gpu = resources.get("GPU", 0) * (1 // gpus)
    fits = min(by_cpu, by_gpu)
    return int(fits) if math.isfinite(fits) else 1
