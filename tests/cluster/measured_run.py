"""A driver that trains a little, loses a worker, evaluates, and reads what Prometheus would read of it.

    measured_run.py FOLDER METRIC…

Waits until every METRIC is there, or for a minute; prints, as the last line, each one's samples as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from prometheus_client.parser import text_string_to_metric_families

from distributed_eg import ClusterConfig
from tests.helpers import tiny_benchmark, tiny_strategy

DEADLINE_S = 60.0
Samples = Mapping[str, list[tuple[dict[str, str], float]]]


class EndsOneWorker(SupervisedPlugin):  # type: ignore[misc]  # Avalanche's plugins have no types
    """Ends the first worker that comes to the last epoch of an expert."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def before_training_epoch(self, strategy: Any, *_: Any, **__: Any) -> None:
        """The mark says that it was done."""
        if strategy.clock.train_exp_epochs == 2 and not self.mark.exists():
            self.mark.touch()
            os._exit(1)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: its experts have checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""


def scrape(run_id: str) -> Samples:
    """What all processes of the cluster export, where Ray says that they do; of runs, this one."""
    found = defaultdict(list)
    known = Path(os.environ["RAY_TMPDIR"], "ray", "prom_metrics_service_discovery.json")
    for target in [target for group in json.loads(known.read_text()) for target in group["targets"]]:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:  # a node that is only coming up
            continue
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("run", run_id) == run_id:
                    found[sample.name].append((sample.labels, sample.value))
    return found


def main(folder: Path, wanted: list[str]) -> None:
    """Train, evaluate, read."""
    cluster = ClusterConfig(storage=folder / "run", num_workers=2, checkpoint_every_s=0)
    benchmark = tiny_benchmark((0, 1))
    plugin = EndsOneWorker(folder / "ended")
    with tiny_strategy(cluster, train_epochs=3, plugins=[plugin]) as strategy:
        strategy.train(benchmark.train_stream)
        strategy.eval(benchmark.test_stream)
        run_id = json.loads((folder / "run" / "run.json").read_text())["run_id"]
        until = time.monotonic() + DEADLINE_S
        while True:
            found = scrape(run_id)
            tasks = {labels["state"]: value for labels, value in found["ray_distributed_eg_tasks"]}
            if (tasks.get("committed") == 2 and found.keys() >= {*wanted}) or time.monotonic() > until:
                break
            time.sleep(0.5)
    print(json.dumps({name: found.get(name, []) for name in wanted}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
