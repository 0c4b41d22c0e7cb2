"""SIGTERM while a script trains on Ray: it ends in a moment, leaves nothing, and the run goes on later.

Ctrl-C is tested with the command, whose exit code is its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from distributed_eg import ClusterConfig
from distributed_eg.store.storage import TEMPORARY
from tests.faults.chaos import Chaos, Fault
from tests.helpers import DOMAINS, SETTINGS, hashes, tiny_benchmark, tiny_strategy

pytestmark = [pytest.mark.ray, pytest.mark.faults]

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import cloudpickle
from pathlib import Path
from tests import helpers
from tests.faults import chaos
cloudpickle.register_pickle_by_value(helpers)
import ray
from distributed_eg import ClusterConfig

storage, folder = sys.argv[2:4]
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         namespace="distributed-eg", runtime_env=chaos.runtime_env(Path(folder)))
config = ClusterConfig(num_workers=1, gpus_per_worker=0, storage=storage, resume=True, scratch=sys.argv[4])
try:
    with helpers.tiny_strategy(config, **helpers.SETTINGS) as strategy:
        strategy.train(helpers.tiny_benchmark(helpers.DOMAINS).train_stream)
finally:
    ray.shutdown()
    print(json.dumps({"closed_at_s": time.monotonic()}))
"""
LIMIT_S = 3.0


class Driver:
    """A process that trains on a Ray of its own, under a plan."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.chaos = Chaos(folder / "chaos")
        self.started: list[psutil.Process] = []

    def start(self) -> subprocess.Popen[str]:
        """Begin, in a session of its own, as from a terminal."""
        arguments = [str(REPOSITORY), str(self.run), str(self.chaos.folder), str(self.scratch)]
        environment = {**os.environ, "RAY_ADDRESS": ""}
        environment.pop("RAY_ADDRESS")
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def require_nothing_left(self) -> None:
        """No process, lock or temporary file."""
        _, alive = psutil.wait_procs(self.started, timeout=20)
        assert [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
        assert list(self.scratch.rglob("*")) == []
        assert list(self.run.rglob(f"*{TEMPORARY}*")) == []
        newest = max((self.run / "sessions").iterdir())
        assert json.loads(newest.read_text())["open"] is False


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    found = Driver(tmp_path)
    yield found
    for process in found.started:
        if process.is_running():
            process.kill()


def test_it_ends_within_three_seconds_and_is_resumed(driver: Driver) -> None:
    """In the middle of an expert's epoch. The clock stops when all is closed: Python then tidies up at its own pace."""
    driver.chaos.plan(Fault("iteration 1 of epoch 1 of task 1", "hang"))
    process = driver.start()
    driver.chaos.at(0, 120)
    driver.started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors[-3000:]
    assert json.loads(output.splitlines()[-1])["closed_at_s"] - started < LIMIT_S
    driver.require_nothing_left()
    driver.chaos.clear()
    ended = []
    for storage in (str(driver.run), None):
        cluster = ClusterConfig(
            engine="inline", storage=storage, resume=storage is not None, scratch=str(driver.scratch)
        )
        with tiny_strategy(cluster, **SETTINGS) as strategy:
            strategy.train(tiny_benchmark(DOMAINS).train_stream)
            ended.append(hashes(strategy))
    assert ended[0] == ended[1]
    driver.require_nothing_left()
