"""Several strategies in one process, on one CPU, while Ray comes and goes; prints what it saw as a line of JSON.

python tests/contract/many_strategies.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.pop("RAY_ADDRESS", None)
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", RAY_memory_monitor_refresh_ms="0")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cloudpickle
import psutil
import ray

from distributed_eg import ClusterConfig, ExpertGateStrategy
from distributed_eg.errors import WorkerLostError
from distributed_eg.runtime.messages import Progress
from tests import helpers

cloudpickle.register_pickle_by_value(helpers)

FOLDER = Path(sys.argv[1])
BENCHMARK = helpers.tiny_benchmark((0, 1))
USERS: dict[str, Any] = {"address": "local", "num_cpus": 1, "include_dashboard": False, "log_to_driver": False}
FIRST, SECOND = BENCHMARK.train_stream


def strategy(name: str | None = None, **overrides: Any) -> ExpertGateStrategy:
    """One with "auto" workers, with or without a storage."""
    storage = None if name is None else str(FOLDER / name)
    cluster = ClusterConfig(storage=storage, resume=storage is not None, scratch=str(FOLDER / "scratch"))
    return helpers.tiny_strategy(cluster, **overrides)


def play() -> dict[str, Any]:
    """The stories, one after the other, for every start of Ray and of a worker takes seconds."""
    seen: dict[str, Any] = {}
    to_end: list[bool] = []

    def end_ray(progress: Progress) -> None:
        if to_end and progress.state == "finished":
            to_end.pop()
            ray.shutdown()

    # The user's own Ray, which the user ends in the midst of a call.
    ray.init(**USERS)
    cell = strategy("run", observer=end_ray)
    cell.train(FIRST)
    to_end.append(True)
    try:
        cell.train(SECOND)
    except WorkerLostError as lost:
        seen["error"] = str(lost)
    seen["another was started"] = ray.is_initialized()

    # The same cell of a notebook again, on a new Ray of the user's: what held the storage is closed once collected.
    ray.init(**USERS)
    cell = strategy("run")
    cell.train(BENCHMARK.train_stream)
    seen["resumed"] = helpers.hashes(cell)
    seen["the user's was kept"] = ray.is_initialized()

    # Shut down between two calls: the strategy starts one itself.
    ray.shutdown()
    first = cell.eval(BENCHMARK.test_stream)
    seen["cpus"] = ray.cluster_resources()["CPU"]

    # Another learning rate while the first strategy is kept, whose workers hold all there is; then the first one again.
    other = strategy()
    other.optimizer.param_groups[0]["lr"] = 0.1
    other.train(BENCHMARK.train_stream)
    seen["beside it"] = helpers.hashes(other)
    seen["workers"] = [len(one.workers()) for one in (cell, other)]
    seen["as before"] = cell.eval(BENCHMARK.test_stream) == first
    cell.close()
    seen["kept for the other"] = ray.is_initialized()
    other.close()
    seen["kept for nobody"] = ray.is_initialized()
    return seen


def main() -> None:
    """Play all, then look for what is left."""
    os.sched_getaffinity = lambda pid: {0}  # as under taskset, but not as slow
    (FOLDER / "scratch").mkdir()
    seen = play()
    until = time.monotonic() + 30
    while (children := psutil.Process().children(recursive=True)) and time.monotonic() < until:
        time.sleep(0.1)
    seen["left"] = {
        "processes": [child.name() for child in children],
        "scratch": [str(path) for path in (FOLDER / "scratch").rglob("*")],
        "open": [json.loads(file.read_text())["open"] for file in (FOLDER / "run" / "sessions").iterdir()],
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
