"""Trains small tasks on a Ray cluster of a few nodes while something is killed every few seconds; all bytes must be the
same as without that.

    python tests/faults/soak.py --seeds 0 1 2 3 4 [--tasks 30] [--every-s 4] [--faults-for-s 150] [--nodes 3] [--json]

The nodes run on this machine, owned by this process, which is the saboteur, too; the driver is ``small_driver``, a
process of its own. What happens when is drawn from the seed: a worker, the coordinator or the driver gets SIGKILL, the
driver SIGTERM (and is started again each time), a node is lost abruptly, or drained and lost later (and another one
joins). Then the run must come to its end by itself. The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("RAY_ADDRESS", None)
os.environ.update(
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(24),
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_memory_monitor_refresh_ms="0",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # Ray's own address is that of the loopback then, in every process
    # A node that is lost is noticed within about two seconds.
    RAY_health_check_initial_delay_ms="500",
    RAY_health_check_period_ms="500",
    RAY_health_check_timeout_ms="2000",
    RAY_health_check_failure_threshold="2",
)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from tests.faults import leftovers
from tests.faults.chaos import wait_for

KINDS = ("worker", "coordinator", "node", "drain", "driver", "driver-stop")
BAG = (*KINDS, "worker")
"""Drawn from until it is empty, so that every kind has its turn; workers die most often."""
DRAIN_S = 15.0
"""How long after its notice a drained node is lost."""
STOP_S = 10.0
"""How long a driver may take from SIGTERM to its end on a machine that is busy."""
_TARGET_S = 90.0
_AT_WORK = 0.8
_POLL_S = 0.2
_UNDISTURBED_S = 600.0
_PREEMPTION = 2
_MAX_FAILURES = 3


@dataclass
class Figures:
    """One seed's outcome."""

    seed: int
    faults: dict[str, int] = field(default_factory=dict)
    stages_rerun: int = 0
    epochs_lost: int = 0
    tasks_lost: int = 0
    files_differing: int = 0
    left: dict[str, int] = field(default_factory=dict)
    ended_of_ray: int = 0
    """Ray's own processes that did not end with their cluster."""
    slowest_stop_s: float = 0.0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Undisturbed:
    """What a run without faults made."""

    outcome: dict[str, Any]
    sealed: dict[str, str]
    log: list[dict[str, Any]]


class LocalCluster:
    """A head without CPUs and some nodes with one each, all of them processes of this one on the loopback address."""

    def __init__(self, num_nodes: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="sr")  # short: sockets lie below it
        self._cluster = Cluster()
        self.nodes: list[Any] = []
        self.draining: dict[Any, float] = {}
        try:
            self._cluster.add_node(num_cpus=0, include_dashboard=False, temp_dir=self._folder, **self._where)
            self.address = str(self._cluster.address)
            for _ in range(num_nodes):
                self.add()
        except BaseException:
            self.close()
            raise

    @property
    def _where(self) -> dict[str, Any]:
        return {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}

    def add(self) -> None:
        """One node more."""
        self.nodes.append(self._cluster.add_node(num_cpus=1, **self._where))

    def lose(self, node: Any) -> None:
        """A node's processes get SIGKILL."""
        self.draining.pop(node, None)
        if node in self.nodes:
            self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any) -> None:
        """Give notice that a node will be lost."""
        deadline_ms = int((time.time() + DRAIN_S) * 1000)
        client = GcsClient(address=self.address)
        accepted, why = client.drain_node(node.node_id, _PREEMPTION, "the soak takes it away", deadline_ms)
        if not accepted:
            raise RuntimeError(f"the node cannot be drained: {why}")
        self.nodes.remove(node)
        self.draining[node] = time.monotonic()

    def lose_drained(self) -> None:
        """Nodes whose notice is over."""
        for node, since in list(self.draining.items()):
            if time.monotonic() - since > DRAIN_S:
                self.lose(node)

    def actors(self, kind: str) -> list[psutil.Process]:
        """Processes of our actors, by how their titles begin, below the raylets of this cluster."""
        raylets = [node.all_processes["raylet"][0].process.pid for node in self._cluster.list_all_nodes()]
        found = [
            process for pid in raylets if psutil.pid_exists(pid) for process in leftovers.below(psutil.Process(pid))
        ]
        return [process for process in found if leftovers.title(process).startswith(kind)]

    def living_actors(self) -> int:
        """How many actors the cluster knows that are not dead."""
        table = self._cluster.global_state.actor_table(None)
        return sum(actor["State"] != "DEAD" for actor in table.values())

    def close(self) -> None:
        """End every node."""
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


class Driver:
    """The driver's process, and what becomes of it."""

    def __init__(self, folder: Path, tasks: int, address: str | None) -> None:
        self.folder = folder
        self.run, self.scratch, self.log = folder / "run", folder / "scratch", folder / "log"
        self.scratch.mkdir(parents=True)
        self.outcome_file = folder / "outcome.json"
        self.output = folder / "output"
        self.wrong: list[str] = []
        self._command = [sys.executable, str(Path(__file__).with_name("small_driver.py")), "--tasks", str(tasks)]
        paths = {"storage": self.run, "scratch": self.scratch, "log": self.log, "outcome": self.outcome_file}
        for name, path in paths.items():
            self._command += [f"--{name}", str(path)]
        if address is not None:
            self._command += ["--engine", "ray", "--address", address]
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Begin, or go on with what the run holds."""
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(self._command, stdout=output, stderr=output)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end: whether it came to that. One that fails by itself is started again, and is wrong."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        if code == 0:
            return True
        tail = self.output.read_text(errors="replace")[-2000:]
        self.wrong.append(f"the driver ended by itself with exit code {code}: …{tail}")
        if len(self.wrong) > _MAX_FAILURES:
            raise RuntimeError("The driver fails again and again.")
        self.start()
        return False

    def kill(self) -> None:
        """SIGKILL, then start it again."""
        self.process.kill()
        self.process.wait()
        self.start()

    def stop(self) -> float:
        """SIGTERM, then start it again: how long it took to end."""
        begun = any(line["what"] == "training" and line["pid"] == self.process.pid for line in self.notes())
        started = time.monotonic()
        self.process.terminate()
        code = self.process.wait(60)
        took_s = time.monotonic() - started
        # Before it trains, while it imports, Python's own way of ending is as good.
        if code not in ((0, 143) if begun else (0, 143, -signal.SIGTERM)):
            self.wrong.append(f"the driver ended with exit code {code} after SIGTERM")
        if took_s > STOP_S:
            self.wrong.append(f"the driver took {took_s:.1f} s to end after SIGTERM")
        self.start()
        return took_s

    def is_busy(self) -> bool:
        """Whether the process that is there now has begun a stage that has not ended."""
        states = [n["state"] for n in self.notes() if n["what"] == "stage" and n["pid"] == self.process.pid]
        return states.count("started") > states.count("finished") + states.count("failed")

    def notes(self) -> list[dict[str, Any]]:
        """What it noted so far."""
        return leftovers.read_log(self.log)

    def outcome(self) -> dict[str, Any]:
        """What came out; nothing where it has not ended well."""
        return json.loads(self.outcome_file.read_text()) if self.outcome_file.exists() else {"registry": []}


class Saboteur:
    """Makes faults, drawn from a seed."""

    def __init__(self, cluster: LocalCluster, driver: Driver, seed: int, kinds: tuple[str, ...]) -> None:
        self._cluster, self._driver = cluster, driver
        self._random = random.Random(seed)
        self._kinds = kinds
        self._bag: list[str] = []
        self.made: Counter[str] = Counter()
        self.slowest_stop_s = 0.0
        self.census = leftovers.Census()

    def wait(self, every_s: float) -> bool:
        """Wait until the next fault is due: whether the driver came to its end before.

        Most intervals begin when there is work, so that there is some progress; some do not, so that what comes up is
        hit, too.
        """
        interval_s = self._random.uniform(0.5, 1.5) * every_s
        if self._random.random() < _AT_WORK:
            until = time.monotonic() + _TARGET_S
            while not self._driver.is_busy() and time.monotonic() < until:
                if self._driver.wait(_POLL_S):
                    return True
        return self._driver.wait(interval_s)

    def strike(self) -> None:
        """Make the next fault."""
        self.look()
        self._cluster.lose_drained()
        if not self._bag:
            self._bag = self._random.sample(self._kinds, len(self._kinds))
        kind = self._bag.pop()
        made = self._make(kind)
        self.made[kind] += made
        with (self._driver.folder / "faults").open("a") as log:
            print(json.dumps({"what": kind, "at": time.time(), "made": made}), file=log)

    def _make(self, kind: str) -> bool:
        """Whether it could be made: not where the driver had ended."""
        if kind in ("worker", "coordinator"):
            return self._kill(leftovers.WORKER if kind == "worker" else leftovers.COORDINATOR)
        if kind in ("node", "drain"):
            return self._take_node(abruptly=kind == "node")
        return self._end_driver(by_kill=kind == "driver")

    def look(self) -> None:
        """Remember the processes that there are."""
        self.census.look(psutil.Process())

    def _kill(self, kind: str) -> bool:
        """SIGKILL to one of our actors, once there is work, unless the driver ends before that."""
        found: list[psutil.Process] = []

        def is_due() -> bool:
            if self._driver.process.poll() is not None:
                return True
            found[:] = sorted(self._cluster.actors(kind), key=lambda p: p.pid) if self._driver.is_busy() else []
            return bool(found)

        wait_for(is_due, _TARGET_S, f"a stage that runs, and a process {kind}")
        leftovers.end([self._random.choice(found)] if found else [])
        return bool(found)

    def _take_node(self, *, abruptly: bool) -> bool:
        node = self._random.choice(self._cluster.nodes)
        if abruptly:
            self._cluster.lose(node)
        else:
            self._cluster.drain(node)
        self._cluster.add()
        return True

    def _end_driver(self, *, by_kill: bool) -> bool:
        if self._driver.process.poll() is not None:
            return False
        if by_kill:
            self._driver.kill()
        else:
            self.slowest_stop_s = max(self.slowest_stop_s, self._driver.stop())
        return True


def finished(driver: Driver) -> Undisturbed:
    """What came out of a driver that nobody disturbs, once it has ended."""
    code = driver.process.wait(_UNDISTURBED_S)
    if code:
        raise RuntimeError(f"the undisturbed run ended with exit code {code}: {driver.output.read_text()}")
    return Undisturbed(driver.outcome(), leftovers.sealed(driver.run), driver.notes())


def soak(folder: Path, seed: int, options: argparse.Namespace, inline: Driver) -> Figures:
    """One run under faults, once the undisturbed one, ``inline``, has ended."""
    figures = Figures(seed)
    cluster = LocalCluster(options.nodes)
    try:
        undisturbed = finished(inline)
        started = time.monotonic()
        driver = Driver(folder, options.tasks, cluster.address)
        saboteur = Saboteur(cluster, driver, seed, tuple(options.kinds))
        try:
            sabotage(driver, saboteur, options)
        except (TimeoutError, subprocess.TimeoutExpired, RuntimeError) as error:
            figures.wrong.append(str(error))
        finally:
            saboteur.look()
            driver.process.kill()  # where it has not ended
            driver.process.wait()
        figures.left = left_behind(cluster, driver, saboteur.census)
        figures.faults, figures.slowest_stop_s = dict(saboteur.made), round(saboteur.slowest_stop_s, 1)
        figures.wrong += driver.wrong
    finally:
        cluster.close()
    _, figures.ended_of_ray = saboteur.census.wait(40)
    compare(figures, driver, undisturbed)
    figures.seconds = round(time.monotonic() - started, 1)
    return figures


def sabotage(driver: Driver, saboteur: Saboteur, options: argparse.Namespace) -> None:
    """Faults until their time is over or all is trained; then wait for the end."""
    until = time.monotonic() + options.faults_for_s
    while time.monotonic() < until and sum(saboteur.made.values()) < options.max_faults:
        if saboteur.wait(options.every_s):
            return
        saboteur.strike()
    until = time.monotonic() + options.rest_s
    while not driver.wait(1.0):
        saboteur.look()
        if time.monotonic() > until:
            raise TimeoutError(f"the run did not come to its end within {options.rest_s:g} s after the last fault")


def left_behind(cluster: LocalCluster, driver: Driver, census: leftovers.Census) -> dict[str, int]:
    """What is there once the driver has ended, counted by kind."""
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: not census.ours_alive() and not cluster.living_actors(), 20, "the end of all that is ours")
    left = {"processes": len(census.ours_alive()), "actors": cluster.living_actors()}
    return left | leftovers.files_left(driver.run, driver.scratch)


def compare(figures: Figures, driver: Driver, undisturbed: Undisturbed) -> None:
    """Hold what came out against the undisturbed run."""
    outcome, notes = driver.outcome(), driver.notes()
    wanted = {row["task"] for row in undisturbed.outcome["registry"]}
    missing = wanted - {row["task"] for row in outcome["registry"]}
    begun, ended = stages(notes, "started"), stages(notes, "finished")
    figures.stages_rerun = len(begun) - len(set(begun))
    figures.epochs_lost = len(epochs(notes)) - len(epochs(undisturbed.log))
    figures.tasks_lost = len(missing | trained_after_commit(notes))
    differing = leftovers.differing(leftovers.sealed(driver.run), undisturbed.sealed)
    figures.files_differing = len(differing)
    experts_rerun = sum(stage == "expert" for _, stage in begun) - len(wanted)
    if figures.epochs_lost > experts_rerun:
        figures.wrong.append(f"{figures.epochs_lost} epochs lost by {experts_rerun} experts that were run again")
    twice = [task for (task, stage), count in Counter(ended).items() if stage == "expert" and count > 1]
    figures.wrong += [f"task {task} was committed twice" for task in twice]
    figures.wrong += [f"other bytes: {path}" for path in differing[:5]]
    figures.wrong += [f"left behind: {count} {what}" for what, count in figures.left.items() if count]
    if figures.tasks_lost:
        figures.wrong.append(f"{figures.tasks_lost} tasks lost")
    for table in ("registry", "relatedness"):
        if outcome.get(table) != undisturbed.outcome[table]:
            figures.wrong.append(f"the {table} table is another one")


def stages(notes: list[dict[str, Any]], state: str) -> list[tuple[int, str]]:
    """Task and stage of every note of a state."""
    return [(line["task"], line["stage"]) for line in notes if line["what"] == "stage" and line["state"] == state]


def epochs(notes: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Task and epoch of every epoch that was begun."""
    return [(line["task"], line["epoch"]) for line in notes if line["what"] == "epoch"]


def trained_after_commit(notes: list[dict[str, Any]]) -> set[int]:
    """Tasks whose expert was begun again after it was committed."""
    done: set[int] = set()
    lost: set[int] = set()
    for line in notes:
        if line["what"] == "stage" and line["stage"] == "expert":
            if line["state"] == "finished":
                done.add(line["task"])
            elif line["state"] == "started" and line["task"] in done:
                lost.add(line["task"])
    return lost


def told(figures: Figures) -> str:
    """Figures in words."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(figures.faults.items()))
    left = ", ".join(f"{count} {what}" for what, count in figures.left.items())
    lines = [
        f"{sum(figures.faults.values())} faults ({kinds}) in {figures.seconds:.0f} s; {figures.stages_rerun} stages "
        f"run again, {figures.epochs_lost} epochs lost, {figures.tasks_lost} tasks lost, {figures.files_differing} "
        f"files differ; slowest stop {figures.slowest_stop_s} s",
        f"  left behind: {left}; Ray's own processes ended by hand: {figures.ended_of_ray}",
        *(f"  WRONG: {what}" for what in figures.wrong),
    ]
    return "\n".join(lines)


def total(each: list[Figures]) -> Figures:
    """All seeds together."""
    summed = Figures(seed=-1)
    for figures in each:
        summed.faults = dict(Counter(summed.faults) + Counter(figures.faults))
        summed.left = {what: summed.left.get(what, 0) + count for what, count in figures.left.items()}
        for name in ("stages_rerun", "epochs_lost", "tasks_lost", "files_differing", "ended_of_ray", "seconds"):
            setattr(summed, name, getattr(summed, name) + getattr(figures, name))
        summed.slowest_stop_s = max(summed.slowest_stop_s, figures.slowest_stop_s)
    return summed


@contextlib.contextmanager
def working_folder(asked: Path | None) -> Iterator[Path]:
    """The folder that was asked for, which stays, or a temporary one."""
    if asked is not None:
        asked.mkdir(parents=True, exist_ok=True)
        yield asked
        return
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        yield Path(folder)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--every-s", type=float, default=4, help="mean time between two faults")
    parser.add_argument("--faults-for-s", type=float, default=150, help="no faults after that")
    parser.add_argument("--max-faults", type=int, default=1000, help="no faults after so many")
    parser.add_argument("--rest-s", type=float, default=300, help="how long the run may take after the last fault")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=BAG)
    parser.add_argument("--folder", type=Path, help="keep logs and runs there")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser.parse_args()


def main() -> int:
    """Soak every seed, print figures: the exit code."""
    options = parse()
    results = []
    with working_folder(options.folder) as folder:
        inline = Driver(folder / "undisturbed", options.tasks, address=None)
        try:
            for seed in options.seeds:
                results.append(soak(folder / f"seed-{seed}", seed, options, inline))
                print(f"seed {seed}: {told(results[-1])}", file=sys.stderr if options.json else sys.stdout, flush=True)
        finally:
            inline.process.kill()  # where it has not ended yet
    wrong = any(figures.wrong for figures in results)
    if options.json:
        print(json.dumps({"ok": not wrong, "seeds": [asdict(figures) for figures in results]}))
    else:
        print(f"in total: {told(total(results))}")
        print("WRONG" if wrong else "nothing lost, no byte differs, nothing left behind")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
