"""Prints what becomes of a long sequence: time a task by quarters, driver memory, tables, evaluation, opening; JSON.

    python tests/performance/long_sequence.py --tasks 1000 --num-workers 2

Tiny tasks (24 images of 16×16, a network of 4,000 parameters), so that nearly everything is what a task costs beside
its training. Memory is the driver's own, noted as experts end; ``open_s`` is another process's, without imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.runtime.messages import Progress
from tests.helpers import SHAPE, tiny_benchmark

_OPEN = """
import sys, time
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Storage
started = time.perf_counter()
Registry.read(Storage(sys.argv[1]))
print(time.perf_counter() - started)
"""


class Net(nn.Module):
    """Of 4,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3))
        self.head = nn.Linear(24, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


def main() -> None:
    """Train, evaluate, open, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--engine", choices=["ray", "inline"], default="ray")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.manual_seed(0)
    benchmark = tiny_benchmark([task % 20 for task in range(options.tasks)], train=24, test=8)
    model = ExpertGate(SHAPE, arch=Net(), autoencoder="linear")
    committed: list[tuple[float, int]] = []
    process = psutil.Process()

    def observe(progress: Progress) -> None:
        if progress.stage.value == "expert" and progress.state == "finished":
            committed.append((time.perf_counter(), process.memory_info().rss))

    with tempfile.TemporaryDirectory() as folder:
        storage = str(Path(folder) / "run")
        by_engine = {"num_workers": options.num_workers} if options.engine == "ray" else {}
        with ExpertGateStrategy(
            model=model,
            optimizer=torch.optim.SGD(model.expert.parameters(), lr=0.05),
            train_mb_size=12,
            train_epochs=1,
            eval_mb_size=8,
            ae_latent_dim=8,
            evaluator=EvaluationPlugin(loggers=[]),
            observer=observe,
            cluster=ClusterConfig(engine=options.engine, storage=storage, **by_engine),  # type: ignore[arg-type]
        ) as strategy:
            started = time.perf_counter()
            strategy.train(benchmark.train_stream)
            trained = time.perf_counter()
            strategy.eval(benchmark.test_stream)
            evaluated = time.perf_counter()
            _ = strategy.registry, strategy.relatedness
            told = time.perf_counter()
        opened = subprocess.run([sys.executable, "-c", _OPEN, storage], capture_output=True, text=True, check=True)
    print(json.dumps(figures(committed, options.tasks) | {
        "train_s": round(trained - started, 1),
        "eval_s": round(evaluated - trained, 1),
        "tables_s": round(told - evaluated, 2),
        "open_s": round(float(opened.stdout), 2),
    }))  # fmt: skip


def figures(committed: list[tuple[float, int]], num_tasks: int) -> dict[str, Any]:
    """Milliseconds a task in each quarter, from the first tenth on, and memory at a tenth and at the end."""
    tenth = num_tasks // 10
    rest = committed[tenth:]
    size = len(rest) // 4
    quarters = [rest[i * size : (i + 1) * size] for i in range(4)]
    per_task = [round(1000 * (part[-1][0] - part[0][0]) / (len(part) - 1), 1) for part in quarters]
    mb = {"driver_mb_at_tenth": committed[tenth][1] // 2**20, "driver_mb": committed[-1][1] // 2**20}
    return {"tasks": num_tasks, "ms_per_task": per_task, **mb}


if __name__ == "__main__":
    main()
