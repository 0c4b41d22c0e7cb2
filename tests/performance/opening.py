"""Prints what it takes to open a finished run and bring one more task: JSON, one line for each length and task size.

    python tests/performance/opening.py --tasks 10 200 --images 24 2400

Every earlier task was trained by another process, and its images are gone. Times are this package's own, without
imports: until the run is open (``open_s``), until an evaluation of 24 images has ended (``eval_s``), until the further
task is sealed (``append_s``); memory is how much more the process holds afterwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distributed_eg import ClusterConfig
from tests.helpers import SETTINGS, tiny_benchmark, tiny_strategy


def build(run: Path, num_tasks: int, num_images: int) -> None:
    """A run of tasks that are all alike but for their noise."""
    cluster = ClusterConfig(engine="inline", storage=str(run))
    with tiny_strategy(cluster, **SETTINGS, train_epochs=1) as strategy:
        strategy.train(tiny_benchmark([task % 4 for task in range(num_tasks)], train=num_images).train_stream)


def append(run: Path, num_tasks: int) -> dict[str, float]:
    """Open it, evaluate, bring task ``num_tasks``: seconds and MB."""
    benchmark = tiny_benchmark([task % 4 for task in range(num_tasks + 1)], train=24)
    further = benchmark.train_stream[-1]
    process = psutil.Process()
    before_bytes = process.memory_info().rss
    started = time.perf_counter()
    with tiny_strategy(ClusterConfig(engine="inline", storage=str(run), resume="append"), **SETTINGS) as strategy:
        num_known = len(strategy.registry)
        opened = time.perf_counter()
        strategy.eval(benchmark.test_stream[:1])
        asked = time.perf_counter()
        strategy.train(further)
        ended = time.perf_counter()
        assert len(strategy.registry) == num_known + 1
    return {
        "open_s": round(opened - started, 3),
        "eval_s": round(asked - opened, 3),
        "append_s": round(ended - asked, 3),
        "memory_mb": round((process.memory_info().rss - before_bytes) / 2**20, 1),
    }


def main() -> None:
    """Build, open in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 200])
    parser.add_argument("--images", type=int, nargs="+", default=[24, 2400], help="of each earlier task")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open is not None:
        print(json.dumps(append(options.open, options.tasks[0])))
        return
    for num_tasks in options.tasks:
        for num_images in options.images:
            with tempfile.TemporaryDirectory() as folder:
                build(Path(folder) / "run", num_tasks, num_images)
                command = [sys.executable, __file__, "--tasks", str(num_tasks), "--open", str(Path(folder) / "run")]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(json.dumps({"tasks": num_tasks, "images": num_images, **json.loads(done.stdout)}), flush=True)


if __name__ == "__main__":
    main()
