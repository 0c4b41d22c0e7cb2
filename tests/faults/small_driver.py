"""A driver over small tasks, which may be killed at any moment and started again: it goes on with what its run holds.

    python tests/faults/small_driver.py --storage RUN --log LOG --outcome FILE [--tasks 6] [--engine inline|ray] …

The tasks are of a few domains that come again, so that most learn without forgetting from an earlier one. With
``--append`` they come one by one, each following what the run holds, the second one's newer version and a task that is
retired and restored among them. LOG gets a line of JSON for everything that happens, here and on the workers; FILE gets
what came out, once the run is at its end.
"""

from __future__ import annotations

import argparse
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
from avalanche.core import SupervisedPlugin

from distributed_eg import ClusterConfig, ExpertGateStrategy
from distributed_eg.runtime.dispatcher import Progress
from tests import helpers

NUM_DOMAINS = 4
SETTINGS: dict[str, Any] = {**helpers.SETTINGS, "train_epochs": 5}
SAMPLES = 1200
"""Of each task: an epoch takes a few tenths of a second."""

cloudpickle.register_pickle_by_value(helpers)


def note(log: str, what: str, **values: Any) -> None:
    """Append a line to the log; several processes may do so at once."""
    line = json.dumps({"what": what, "at": time.time(), "pid": os.getpid(), **values}) + "\n"
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


class EpochLog(SupervisedPlugin):
    """Notes every epoch that an expert begins; it remembers nothing, as its empty state says."""

    def __init__(self, log: str) -> None:
        super().__init__()
        self._log = log

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Note it."""
        task, epoch = strategy.experience.current_experience, strategy.clock.train_exp_epochs
        note(self._log, "epoch", task=task, epoch=epoch)


def main(arguments: argparse.Namespace) -> None:
    """Train, then write what came out."""
    log = arguments.log
    by_ray = {"address": arguments.address} if arguments.engine == "ray" else {}
    cluster = ClusterConfig(
        engine=arguments.engine,
        storage=arguments.storage,
        scratch=arguments.scratch,
        resume="append" if arguments.append else True,
        checkpoint_every_s=0,
        **by_ray,
    )

    def observe(progress: Progress) -> None:
        note(log, "stage", task=progress.task, stage=progress.stage.value, state=progress.state)

    benchmark = helpers.tiny_benchmark([task % NUM_DOMAINS for task in range(arguments.tasks)], train=SAMPLES)
    with helpers.tiny_strategy(cluster, observer=observe, plugins=[EpochLog(log)], **SETTINGS) as strategy:
        note(log, "training")
        if arguments.append:
            live(strategy, list(benchmark.train_stream), Path(arguments.storage))
        else:
            strategy.train(benchmark.train_stream)
        outcome = helpers.outcome(strategy, {})
        note(log, "trained")
    new = arguments.outcome.with_suffix(".new")
    new.write_text(json.dumps(outcome))
    new.rename(arguments.outcome)


def live(strategy: ExpertGateStrategy, experiences: list[Any], run: Path) -> None:
    """Bring what the run does not hold yet, one call each. A call that ended is noted in the run: given once more, it
    would bring the same images as new data."""
    newer = helpers.tiny_benchmark((0, 1), train=SAMPLES + 8).train_stream[1]
    calls = [strategy.train] * len(experiences)
    calls[3:3], experiences[3:3] = [strategy.update], [newer]
    recorded = run / "stream.json"
    ended = json.loads(recorded.read_text())["num_tasks"] if recorded.exists() else 0
    for number in range(ended, len(calls)):
        if number == 2:
            strategy.retire(0)
        calls[number](experiences[number])
    strategy.restore(0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--log", required=True)
    parser.add_argument("--outcome", required=True, type=Path)
    parser.add_argument("--scratch", help="for features, on each node")
    parser.add_argument("--tasks", type=int, default=6)
    parser.add_argument("--engine", choices=["inline", "ray"], default="inline")
    parser.add_argument("--append", action="store_true", help="bring the tasks one by one, as a run's life does")
    parser.add_argument("--address", help="of a Ray cluster; without it the driver starts Ray itself")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
