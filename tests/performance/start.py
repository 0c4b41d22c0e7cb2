"""Prints when things happen after the command was given: imports, benchmark, model, Ray, the first stages; JSON.

    python tests/performance/start.py --tasks 30 --num-workers 2

Seconds since the process began. Tiny tasks, so that nearly all of it is the start.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    """Train, note, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--num-workers", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    began, moments = psutil.Process().create_time(), {}

    def note(what: str) -> None:
        moments.setdefault(what, round(time.time() - began, 2))

    from distributed_eg import ClusterConfig
    from distributed_eg.runtime.messages import Progress
    from tests.helpers import tiny_benchmark, tiny_strategy

    note("imported")
    benchmark = tiny_benchmark([task % 20 for task in range(options.tasks)], train=24, test=8)

    def observe(progress: Progress) -> None:
        note(f"first {progress.stage.value} {progress.state}")

    with tiny_strategy(ClusterConfig(num_workers=options.num_workers), observer=observe, train_epochs=1) as strategy:
        note("train begins")
        strategy.train(benchmark.train_stream)
        note(f"{options.tasks} tasks done")
    print(json.dumps(moments))


if __name__ == "__main__":
    main()
