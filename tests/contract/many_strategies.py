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
FIRST, SECOND = BENCHMARK.train_stream


def strategy(name: str | None = None, **overrides: Any) -> ExpertGateStrategy:
    """One with "auto" workers, with or without a storage."""
    storage = None if name is None else str(FOLDER / name)
    cluster = ClusterConfig(storage=storage, resume=storage is not None, scratch=str(FOLDER / "scratch"))
    return helpers.tiny_strategy(cluster, **overrides)


def sweep() -> dict[str, Any]:
    """Learning rates, none closed; whoever is asked again works again. The one that started Ray closes first."""
    kept = []
    for lr in (0.05, 0.1):
        one = strategy()
        one.optimizer.param_groups[0]["lr"] = lr
        one.train(FIRST)
        kept.append(one)
    cpus, workers = ray.cluster_resources()["CPU"], len(one.workers())
    metrics = kept[0].eval(BENCHMARK.test_stream[:1])
    kept[0].close()
    there = ray.is_initialized()
    kept[1].train(SECOND)
    experts = [helpers.hashes(one) for one in kept]
    kept[1].close()
    gone = not ray.is_initialized()
    return {
        "cpus": cpus,
        "workers": workers,
        "measured": len(metrics) > 0,
        "there": there,
        "gone": gone,
        "experts": experts,
    }


def shut_down() -> dict[str, Any]:
    """By the user, between two calls and in the midst of one; and a cell that is run again, with its storage."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    to_end: list[bool] = []

    def end_ray(progress: Progress) -> None:
        if to_end and progress.state == "done":
            to_end.pop()
            ray.shutdown()

    cell = strategy("run", observer=end_ray)
    cell.train(FIRST)
    ray.shutdown()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    to_end.append(True)
    error = ""
    try:
        cell.train(SECOND)
    except WorkerLostError as lost:
        error = str(lost)
    started_another = ray.is_initialized()
    cell = strategy("run")  # the same cell again
    cell.train(BENCHMARK.train_stream)
    experts = helpers.hashes(cell)
    ray.shutdown()
    metrics = cell.eval(BENCHMARK.test_stream[:1])
    ray.shutdown()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    cell.close()
    kept = ray.is_initialized()
    ray.shutdown()
    return {
        "error": error,
        "started_another": started_another,
        "experts": experts,
        "measured": len(metrics) > 0,
        "users_kept": kept,
    }


def main() -> None:
    """Play all, then look for what is left."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    (FOLDER / "scratch").mkdir()
    seen = {"sweep": sweep(), "shut_down": shut_down()}
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
