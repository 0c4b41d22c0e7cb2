"""The Ray engine: a pool of warm task worker actors, and the coordinator actor; what Ray says becomes our reports.

The driver owns the workers: actors that a coordinator created would die with its process. Ray restarts no worker: one
that is lost is replaced by a new one, wherever there is room then.
"""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from distributed_eg.config import ClusterConfig
from distributed_eg.errors import InputError, ResourceError, WorkerLostError
from distributed_eg.runtime.coordinator import CoordinatorApi
from distributed_eg.runtime.engine import Ended, Listener, Report
from distributed_eg.runtime.messages import Raised, Request, WorkerSetup
from distributed_eg.runtime.ray_backend.actors import (
    RemoteCoordinator,
    end_workers,
    fetch,
    start_coordinator,
    start_worker,
)
from distributed_eg.runtime.ray_backend.cluster import Node, nodes, refuse_infeasible
from distributed_eg.runtime.ray_backend.errors import classify
from distributed_eg.runtime.ray_backend.listening import Listening
from distributed_eg.runtime.ray_backend.metrics import Metrics
from distributed_eg.runtime.ray_backend.session import SESSION
from distributed_eg.runtime.shipping import Shipper
from distributed_eg.schedule.events import Cause, WorkerJoined, WorkerLeaving, WorkerLost

logger = logging.getLogger(__name__)

_POLL_S = 0.2
"""Ray looks at signals between waits only, and whoever presses Ctrl-C should not wait for long."""
_WATCH_EVERY_S = 5.0
_SAY_EVERY_S = 30.0
_CLOSE_TIMEOUT_S = 1.0
_START_S = 20.0
"""A worker that has not come up after this time may be waiting for room."""
_MAX_FAILED_STARTS = 20
"""Workers that did not come up, one after the other, while none was there: the cluster is at fault then. What is lost
while it works is bounded by the budgets of the stages that it worked on."""


@dataclass
class _Call:
    number: int | None
    since: float


@dataclass
class _Worker:
    name: str
    handle: Any
    ready: Any
    since: float
    node: str | None = None
    device: str = ""
    leaving: bool = False
    calls: dict[Any, _Call] = field(default_factory=dict)


class RayEngine:
    """Worker actors and a coordinator actor on a Ray cluster.

    Args:
        config: where and how many.
        storage_uri: the run directory.
        run_id: names the coordinator inside the cluster.
        generation: the driver's number in the run's lease.
    """

    def __init__(self, config: ClusterConfig, storage_uri: str, run_id: str, generation: int) -> None:
        self._config = config
        self._storage_uri = storage_uri
        self._run_id = run_id
        self._generation = generation
        self._cpus = config.cpus_per_worker
        self._gpus = 0.0
        self.shipper = Shipper(self)
        self.observe = Metrics(run_id).observe
        self.coordinator: CoordinatorApi
        self.listener: Listener | None = None
        self._listening = Listening()
        self._at_rest = False
        self._setup: WorkerSetup | None = None
        self._num_tasks: int | None = None
        self._pool: dict[str, _Worker] = {}
        self._starting: dict[str, _Worker] = {}
        self._misfits: list[_Worker] = []
        """On another kind of processor than the first one: they get nothing to do, and keep others away."""
        self._device: str | None = None
        self._coordinator: Any = None
        self._num_named = 0
        self._num_failed_starts = 0
        self._watched_at = self._said_at = time.monotonic()
        self._without_worker_since = time.monotonic()

    def put(self, data: bytes) -> Any:
        """Keep a leaf's bytes in the object store; a NumPy array is read there without a copy."""
        self._require_ray()
        return ray.put(np.frombuffer(data, dtype=np.uint8))

    def get(self, reference: Any) -> memoryview:
        """A leaf's bytes, where they lie in this node's object store."""
        self._require_ray()
        return fetch(reference)

    def start(self) -> None:
        """Attach to the cluster or start Ray on this machine; start the coordinator."""
        self._at_rest = False
        self.give_way()  # what an earlier Ray held is gone
        SESSION.enter(self, self._config, self._cpus)
        self.shipper = Shipper(self)
        there = nodes()
        if len({node.address for node in there}) > 1 and self._config.storage is None:
            raise InputError(
                f"The cluster has {len({node.address for node in there})} machines: give ClusterConfig(storage=…), a "
                "folder or URI that all of them see."
            )
        # The same for every worker of a run, whatever nodes join later.
        asked = self._config.gpus_per_worker
        self._gpus = (1.0 if any(node.gpus >= 1 for node in there) else 0.0) if asked is None else asked
        refuse_infeasible(there, self._cpus, self._gpus, is_shared=SESSION.is_shared(self))
        self._coordinator = start_coordinator(self._storage_uri, self._run_id, self._generation)
        self.coordinator = RemoteCoordinator(self._coordinator, self._require_ray, self._config.way_on)

    def begin(self) -> bool:
        """Work from now on, where all is there still: Ray may have been shut down, or others may have needed room."""
        with SESSION.lock:
            if not SESSION.holds(self) or self._coordinator is None:
                return False
            self._at_rest = False
            SESSION.works(self)
            return True

    def add_workers(self, setup: WorkerSetup, num_tasks: int | None) -> None:
        """Grow the pool to ``num_workers``, or to what the cluster holds, at most one a task."""
        self._require_ray()
        self._setup, self._num_tasks = setup, num_tasks
        self._without_worker_since = self._said_at = time.monotonic()
        self._grow(nodes())

    def workers(self) -> list[WorkerJoined]:
        """Workers that are ready, and stay."""
        return [WorkerJoined(w.name, w.node or "", w.device) for w in self._pool.values() if not w.leaving]

    def submit(self, call: int | None, worker: str, request: Request) -> None:
        """Begin a call on a worker."""
        self._require_ray()
        state = self._pool[worker]
        state.calls[state.handle.run.remote(request)] = _Call(call, time.monotonic())

    def wait(self) -> list[Report]:
        """Reports since the last call, lost workers first; waits a moment for the first."""
        self._require_ray()
        references: dict[Any, _Worker] = {worker.ready: worker for worker in self._starting.values()}
        references.update({ref: worker for worker in self._pool.values() for ref in worker.calls})
        if not references:
            raise WorkerLostError(f"No worker is left, and none is coming up; {self._config.way_on}.")
        ray.wait(list(references), num_returns=1, timeout=_POLL_S)
        done, _ = ray.wait(list(references), num_returns=len(references), timeout=0)
        reports: list[Report] = []
        for reference in done:
            worker = references[reference]
            if worker.name in self._starting:
                reports.extend(self._started(worker))
            elif worker.name in self._pool:
                reports.append(self._ended(worker, reference))
        self._listening.hear([(w.name, w.handle) for w in self._pool.values() if w.calls], self.listener)
        reports.extend(self._end_overdue())
        if time.monotonic() - self._watched_at > _WATCH_EVERY_S:
            self._watched_at = time.monotonic()
            reports.extend(self._watch(nodes()))
        self._refuse_long_waits()
        # Whoever is told of an ended call may give that worker another one at once.
        return sorted(reports, key=lambda report: not isinstance(report, WorkerLost))

    def end(self) -> None:
        """End the workers whose answers are not wanted any more; others are kept until somebody needs their room."""
        if SESSION.holds(self):
            busy = [w for w in self._pool.values() if any(call.number is not None for call in w.calls.values())]
            self._stop(busy)
            for worker in busy:
                del self._pool[worker.name]
        self._at_rest = True

    def is_at_rest(self) -> bool:
        """Whether no call of the strategy works with it."""
        return self._at_rest

    def num_workers(self) -> int:
        """How many workers it holds, or asks for."""
        return len(self._pool) + len(self._starting) + len(self._misfits)

    def close(self) -> None:
        """End the actors and, where nobody else in this process uses a Ray that was started here, Ray."""
        with SESSION.lock:
            self.give_way()
            SESSION.leave(self)

    def give_way(self) -> None:
        """End the actors: another strategy of this process needs their room."""
        with SESSION.lock:
            if SESSION.holds(self):  # else Ray's own end came first, and took the actors with it
                self._stop([*self._pool.values(), *self._starting.values(), *self._misfits])
                if self._coordinator is not None:
                    ray.kill(self._coordinator)
            self._listening = Listening()
            self._pool.clear()
            self._starting.clear()
            self._misfits.clear()
            self._coordinator = None

    def _require_ray(self) -> None:
        """Ray's own calls would start another one."""
        if not SESSION.holds(self):
            raise WorkerLostError(
                "Ray was shut down in this process while the strategy worked, and its workers are gone. What is sealed "
                "is kept: train what strategy.registry lacks, or make a new strategy with ClusterConfig(storage=…, "
                "resume=True) on the same storage and give it the same stream."
            )

    def _stop(self, workers: list[_Worker]) -> None:
        """Ask workers to end what they do, wait a moment, end them."""
        ready = [worker.handle for worker in workers if worker.name in self._pool]
        end_workers(ready, [w.handle for w in workers if w.name not in self._pool], _CLOSE_TIMEOUT_S)

    def _grow(self, there: list[Node]) -> None:
        asked = self._config.num_workers
        fits = sum(node.room_for(self._cpus, self._gpus) for node in there if not node.leaving)
        useful = fits if self._num_tasks is None else min(fits, self._num_tasks)
        wanted = useful if asked == "auto" else asked
        staying = sum(not worker.leaving for worker in self._pool.values()) + len(self._misfits)
        late = time.monotonic() - _START_S
        num_waiting = sum(worker.since < late for worker in self._starting.values())
        num_new = max(0, max(1, wanted) - staying - len(self._starting))
        if num_waiting or num_new:
            free = sum(node.room_for(self._cpus, self._gpus) for node in nodes(free=True) if not node.leaving)
            SESSION.make_room(self, num_waiting + num_new - free)
        for _ in range(num_new):
            self._spawn()

    def _spawn(self) -> None:
        assert self._setup is not None
        name = f"worker-{self._num_named}"
        self._num_named += 1
        handle = start_worker(self._setup, self._cpus, self._gpus)
        self._starting[name] = _Worker(name, handle, handle.where.remote(), time.monotonic())

    def _started(self, worker: _Worker) -> list[Report]:
        del self._starting[worker.name]
        try:
            worker.node, pid, worker.device = ray.get(worker.ready)
        except RayError as error:
            self._num_failed_starts += 1
            ray.kill(worker.handle)
            if not self._pool:
                if isinstance(cause := getattr(error, "cause", None), InputError):
                    raise cause from None
                if self._num_failed_starts > _MAX_FAILED_STARTS or getattr(error, "actor_init_failed", False):
                    raise WorkerLostError(f"The worker {worker.name} did not come up: {error}") from error
                self._spawn()
            # Else a node that joined may be at fault, and the next look at the nodes tries again.
            logger.warning("%s did not come up, another takes its place: %s", worker.name, str(error).split("\n")[0])
            return []
        self._num_failed_starts = 0
        self._device = self._device or worker.device
        if worker.device != self._device:
            self._misfits.append(worker)
            says = "%s computes on another kind of processor (%s) than the run's other workers (%s), which would give "
            says += "other bytes: it gets nothing to do. Give each kind of machine a run of its own."
            logger.warning(says, worker.name, worker.device, self._device)
            return []
        self._pool[worker.name] = worker
        logger.debug("%s is ready: node %s, process %d", worker.name, worker.node, pid)
        return [WorkerJoined(worker.name, worker.node or "", worker.device)]

    def _ended(self, worker: _Worker, reference: Any) -> Report:
        call = worker.calls.pop(reference)
        try:
            outcome = pickle.loads(ray.get(reference))
        except RayError as error:
            alive = not worker.leaving and any(node.id == worker.node for node in nodes())
            cause, worker_is_gone = classify(error, node_is_alive=alive)
            if worker_is_gone:
                return self._lose(worker, str(error), cause)
            outcome = Raised(None, str(error), str(error), 0.0, cause)
        if isinstance(outcome, Raised) and outcome.cause is Cause.ACCELERATOR:  # all that follows there would fail, too
            return self._lose(worker, outcome.message, outcome.cause)
        return Ended(call.number, worker.name, outcome)

    def _lose(self, worker: _Worker, message: str, cause: Cause) -> WorkerLost:
        """Take a worker out, with its process where that still runs; another takes its place."""
        del self._pool[worker.name]
        ray.kill(worker.handle)
        if not worker.leaving:
            says = "%s is lost (%s), another takes its place: %s"
            logger.warning(says, worker.name, cause.value, message.split("\n")[0])
            self._spawn()
        return WorkerLost(worker.name, message, cause)

    def _end_overdue(self) -> list[Report]:
        limit_s = self._config.stage_timeout_s or float("inf")
        now = time.monotonic()
        late = [w for w in self._pool.values() if any(now - call.since > limit_s for call in w.calls.values())]
        message = f"It took longer than stage_timeout_s={limit_s:g}, and its worker was ended."
        return [self._lose(worker, message, Cause.OVERDUE) for worker in late]

    def _watch(self, there: list[Node]) -> list[Report]:
        """Use nodes that joined; leave nodes that go, once what runs there has ended."""
        reports: list[Report] = []
        leaving = {node.id for node in there if node.leaving}
        for worker in list(self._pool.values()):
            if worker.node in leaving and not worker.leaving:
                logger.warning("The node of %s is being drained: it finishes its stage and gets no other.", worker.name)
                worker.leaving = True
                reports.append(WorkerLeaving(worker.name))
            elif worker.leaving and not worker.calls:
                reports.append(self._lose(worker, "Its node is being drained.", Cause.NODE_LOST))
        self._grow(there)
        return reports

    def _refuse_long_waits(self) -> None:
        """Say why there is no worker yet; give up where none comes in time."""
        now = time.monotonic()
        if self._pool or not self._starting:
            self._without_worker_since = self._said_at = now
            return
        waited_s = now - self._without_worker_since
        free, there = ray.available_resources(), ray.cluster_resources()
        offers = " and ".join(f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        wait = "Wait for " + ("the other strategies of this process" if SESSION.others_work(self) else "other jobs")
        why = f"each asks for {self._cpus:g} CPU and {self._gpus:g} GPU, and {offers} are free, or a start takes them"
        if waited_s > self._config.startup_timeout_s:
            raise ResourceError(
                f"No worker came up within {waited_s:.0f} s: {why}. {wait}, lower the demand, or raise "
                f"startup_timeout_s; {self._config.way_on}."
            )
        if now - self._said_at > _SAY_EVERY_S:
            self._said_at = now
            logger.warning("Still waiting for a worker after %.0f s: %s.", waited_s, why)
