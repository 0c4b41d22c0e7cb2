"""Nodes leave, are drained and join, and room is missing, while runs train on one Ray cluster of several nodes.

A process of its own: it plays one story after the other and prints a JSON line for each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.pop("RAY_ADDRESS", None)
os.environ.update(
    RAY_AUTH_MODE="token",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_memory_monitor_refresh_ms="0",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # Ray's own address is that of the loopback then, in every process
    # A node that is gone is missed within about two seconds.
    RAY_health_check_initial_delay_ms="500",
    RAY_health_check_period_ms="500",
    RAY_health_check_timeout_ms="2000",
    RAY_health_check_failure_threshold="2",
)
os.environ.setdefault("RAY_AUTH_TOKEN", "test-suite-token-0123456789abcdef0123456789abcdef")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cloudpickle
import psutil
import ray
from ray._private.state import state
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from distributed_eg import ClusterConfig, ExpertGateStrategy
from distributed_eg.errors import ResourceError
from distributed_eg.runtime.messages import Progress
from distributed_eg.runtime.ray_backend import engine
from distributed_eg.runtime.ray_backend.cluster import NAMESPACE
from distributed_eg.store.storage import TEMPORARY
from tests import helpers
from tests.faults import chaos as kit
from tests.faults.chaos import Chaos, Fault, reports, wait_for

cloudpickle.register_pickle_by_value(helpers)
engine._WATCH_EVERY_S = 0.5
engine._SAY_EVERY_S = 0.2

DEADLINE_S = 60.0
WHERE: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}

Facts = dict[str, Any]


class Theatre:
    """The cluster on which all stories play, the kit in its processes, and a folder for the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.chaos = Chaos(folder / "chaos")
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(folder / "r"), **WHERE}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        # The driver is on the head, which no story takes away.
        ray.init(
            address=self.cluster.address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=kit.runtime_env(self.chaos.folder),
        )

    def have_nodes(self, count: int) -> None:
        """Add nodes of one CPU until there are ``count``, and wait until Ray misses those that were taken away."""
        for _ in range(count - len(self.cluster.worker_nodes)):
            self.cluster.add_node(num_cpus=1, **WHERE)
        wait_for(lambda: sum(n["Alive"] for n in ray.nodes()) == 1 + count, DEADLINE_S, f"{count} nodes")

    def node_of(self, pid: int) -> Any:
        """The node that a worker process runs on: that of its parent, a raylet."""
        raylet = psutil.Process(pid).ppid()
        (node,) = [n for n in self.cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet]
        return node

    def drain(self, node_id: str) -> None:
        """Give notice that a node will go."""
        reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
        accepted, why = GcsClient(address=self.cluster.address).drain_node(node_id, reason, "a test", 0)
        assert accepted, why

    def config(self, storage: str, **options: Any) -> ClusterConfig:
        """Workers of one CPU each, one run directory a name."""
        fixed = {"gpus_per_worker": 0, "checkpoint_every_s": 0, "scratch": str(self.scratch)}
        return ClusterConfig(storage=str(self.folder / "runs" / storage), **{**fixed, **options})


class Run:
    """One training on the cluster: what is seen of it while it goes on."""

    def __init__(self, theatre: Theatre, storage: str, **options: Any) -> None:
        self.progress: list[Progress] = []
        self.said: list[str] = []
        self.strategy: ExpertGateStrategy = helpers.tiny_strategy(
            theatre.config(storage, **options),
            model=helpers.shared_model(),
            observer=self.progress.append,
            **helpers.SETTINGS,
        )

    def train(self, steps: Iterator[None] | None = None) -> Facts:
        """Train four tasks and evaluate; each time the driver has waited for reports, ``steps`` goes on a yield."""
        plot = iter(()) if steps is None else steps

        def step(arrived: list[Any]) -> list[Any]:
            next(plot, None)
            return arrived

        benchmark = helpers.tiny_benchmark(helpers.DOMAINS)
        started = time.monotonic()
        with self.strategy, listening(self.said), reports(engine.RayEngine, step):
            try:
                self.strategy.train(benchmark.train_stream)
            except ResourceError as error:
                return {"error": str(error), "said": self.said, "train_s": time.monotonic() - started}
            assert next(plot, "the end") == "the end", "the training ended before the story"
            workers = self.workers()
            outcome = helpers.outcome(self.strategy, self.strategy.eval(benchmark.test_stream))
        seen = [(p.state, p.task, p.stage.value, p.worker) for p in self.progress if p.epoch is None]
        return {"outcome": outcome, "progress": seen, "workers": workers, "said": self.said}

    def workers(self) -> dict[str, str]:
        """Node of each worker that is ready and stays."""
        return {worker.worker: worker.node for worker in self.strategy.workers()}


@contextmanager
def listening(said: list[str]) -> Iterator[None]:
    """Add the package's warnings to ``said``."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("distributed_eg")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def until(predicate: Callable[[], object], what: str) -> Iterator[None]:
    """Let the driver go on until ``predicate`` holds.

    Raises:
        TimeoutError: it does not in time.
    """
    deadline = time.monotonic() + DEADLINE_S
    while not predicate():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {DEADLINE_S:g} s: {what}")
        yield


def hung(chaos: Chaos, index: int) -> Iterator[None]:
    """Let the driver go on until fault ``index`` has happened."""
    yield from until(lambda: chaos.fired()[index], f"fault {index}")


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for somebody to take note of that."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def lost(theatre: Theatre) -> Facts:
    """A node goes without notice while an expert trains there."""
    theatre.have_nodes(2)
    theatre.chaos.plan(
        Fault("iteration 1 of epoch 1 of task 1", "hang"),
        Fault("iteration 0 of epoch 0 of task 1", "delay", times=9),  # counts how often its first epoch begins
    )
    run, facts = Run(theatre, "lost", num_workers=2), Facts()

    def steps() -> Iterator[None]:
        yield from hung(theatre.chaos, 0)
        pid = theatre.chaos.at(0)
        node = theatre.node_of(pid)
        facts.update(before=run.workers(), node=node.node_id)
        theatre.cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: has_ended(pid), DEADLINE_S, "the worker's end")

    facts.update(run.train(steps()))
    facts.update(first_epochs=theatre.chaos.fired()[1])
    return facts


def joins(theatre: Theatre) -> Facts:
    """A node comes while the only worker is busy."""
    theatre.have_nodes(1)
    theatre.chaos.plan(Fault("begin expert of task 0", "hang"))
    run, facts = Run(theatre, "joins", num_workers="auto"), Facts()

    def steps() -> Iterator[None]:
        yield from hung(theatre.chaos, 0)
        facts.update(before=run.workers())
        theatre.have_nodes(2)
        yield from until(lambda: len(run.workers()) == 2, "a second worker")
        theatre.chaos.release(0)

    return {**run.train(steps()), **facts}


def drained(theatre: Theatre) -> Facts:
    """A node is drained while an expert trains there; when that has ended, another one is ready to start, and the only
    worker that stays is still busy."""
    theatre.have_nodes(2)
    theatre.chaos.plan(Fault("iteration 1 of epoch 1 of task 1", "hang"), Fault("begin expert of task 2", "hang"))
    run, facts = Run(theatre, "drained", num_workers=2), Facts()
    nodes: list[Any] = []

    def steps() -> Iterator[None]:
        yield from hung(theatre.chaos, 0)
        yield from hung(theatre.chaos, 1)
        pid = theatre.chaos.at(0)
        nodes.append(theatre.node_of(pid))
        facts.update(before=run.workers(), node=nodes[0].node_id, placed_before=placed(nodes[0].node_id))
        theatre.drain(nodes[0].node_id)
        yield from until(lambda: len(run.workers()) == 1, "the drain is noticed")
        facts.update(seen_before=sum(p.epoch is None for p in run.progress))
        theatre.chaos.release(0)
        yield from until(lambda: has_ended(pid), "the end of the worker that leaves")
        theatre.chaos.release(1)

    facts.update(run.train(steps()))
    facts.update(placed_after=placed(nodes[0].node_id))
    theatre.cluster.remove_node(nodes[0], allow_graceful=False)
    return facts


def infeasible(theatre: Theatre) -> Facts:
    """A worker asks for more than any node has."""
    theatre.have_nodes(1)
    theatre.chaos.plan()
    return Run(theatre, "room", num_workers=1, cpus_per_worker=64).train()


def busy(theatre: Theatre) -> Facts:
    """Somebody else holds the only CPU: one driver gives up, the next one waits until it is free."""
    theatre.have_nodes(1)
    theatre.chaos.plan()
    actor: Any = ray.remote(Holder)
    holder = actor.options(num_cpus=1).remote()
    ray.get(holder.ready.remote(), timeout=DEADLINE_S)
    impatient = Run(theatre, "room", num_workers=1, startup_timeout_s=1).train()
    patient = Run(theatre, "room", num_workers=1, resume=True)

    def steps() -> Iterator[None]:
        yield from until(lambda: patient.said, "the reason why it waits")
        ray.kill(holder)

    return {**patient.train(steps()), "impatient": impatient}


class Holder:
    """Holds what it is given."""

    def ready(self) -> bool:
        """Whether it is there."""
        return True


def placed(node: str) -> list[str]:
    """Task workers that were ever placed on a node."""
    return sorted(a["ActorID"] for a in actors() if a["Address"]["NodeID"] == node)


def actors() -> list[dict[str, Any]]:
    """All task workers and coordinators of this cluster, whatever became of them."""
    ours = ("TaskWorkerActor", "Coordinator")
    return [a for a in state.actor_table(None).values() if a["ActorClassName"] in ours]


def left(theatre: Theatre) -> Facts:
    """What of ours is still there when all stories are over."""

    def alive() -> list[str]:
        return [actor["ActorClassName"] for actor in actors() if actor["State"] != "DEAD"]

    with_deadline(lambda: not alive() and not ray.util.list_named_actors(all_namespaces=True))
    return {
        "named": ray.util.list_named_actors(all_namespaces=True),
        "alive": alive(),
        "scratch": sorted(os.listdir(theatre.scratch)),
        "temporary": sorted(str(file) for file in theatre.folder.rglob(f"{TEMPORARY}*")),
    }


def with_deadline(predicate: Callable[[], object]) -> None:
    """Wait a moment for what Ray does a little later; who asks sees whether it came to be."""
    try:
        wait_for(predicate, 5, "the end of all actors")
    except TimeoutError as error:
        print(error, file=sys.stderr)


def main() -> None:
    """Play all stories; one that fails is told, too, and the next one is played."""
    with tempfile.TemporaryDirectory(prefix="n", ignore_cleanup_errors=True) as folder:
        started = time.monotonic()
        theatre = Theatre(Path(folder))
        try:
            print(json.dumps({"story": "start", "seconds": time.monotonic() - started}), flush=True)
            for story in (lost, joins, drained, infeasible, busy, left):
                started = time.monotonic()
                try:
                    facts = story(theatre)
                except Exception:
                    facts = {"failed": traceback.format_exc()}
                told = {"story": story.__name__, "seconds": time.monotonic() - started, **facts}
                # In one write, its end included: what others write to the same file comes before or after it.
                print(json.dumps(told) + "\n", end="", flush=True)
        finally:
            ray.shutdown()
            theatre.cluster.shutdown()


if __name__ == "__main__":
    main()
