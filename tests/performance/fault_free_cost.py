"""Prints what surviving faults costs where there are none: alternating runs of this tree and of an earlier one.

    git worktree add /tmp/earlier ed61c49
    python tests/performance/fault_free_cost.py --earlier /tmp/earlier --pairs 5

Both trees train the same two experts (EfficientNet-Lite0 on embedded images) side by side on two workers of one thread,
for a minute and more each, in processes of their own, and must come to the same bytes. The earlier tree has neither
leases, checkpoints, verified writes nor records of what arrived.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


def train(num_epochs: int) -> dict[str, Any]:
    """Train two tasks; return how long that took, and what came of it."""
    import torch
    from avalanche.training.plugins import EvaluationPlugin

    from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy, make_benchmark

    benchmark = make_benchmark("embedded")
    model = ExpertGate(benchmark.shape, arch="efficientnet_lite0", autoencoder="linear")
    with (
        tempfile.TemporaryDirectory() as folder,
        ExpertGateStrategy(
            model=model,
            optimizer=torch.optim.SGD(model.expert.parameters(), lr=1e-3, momentum=0.9),
            train_mb_size=16,
            train_epochs=num_epochs,
            evaluator=EvaluationPlugin(loggers=[]),
            # Above what any pair reaches: the second expert does not wait for the first.
            cluster=ClusterConfig(num_workers=2, storage=str(Path(folder) / "run")),
            reference=benchmark.scenario.train_stream[2].dataset,
        ) as strategy,
    ):
        started = time.perf_counter()
        strategy.train(benchmark.scenario.train_stream[:2])
        train_s = time.perf_counter() - started
        table = strategy.registry
        return {
            "train_s": train_s,
            "experts_s": table["train_s"].to_pylist(),
            "parents": table["parent"].to_pylist(),
            "sha256": table["expert_sha256"].to_pylist(),
        }


def run(tree: Path, num_epochs: int) -> dict[str, Any]:
    """``train`` in a process that imports ``tree``."""
    done = subprocess.run(
        [sys.executable, str(HERE), "--one", "--epochs", str(num_epochs)],
        env={**os.environ, "PYTHONPATH": str(tree), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Alternate, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--earlier", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--one", action="store_true", help="train once, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(train(arguments.epochs)))
        return
    trees = {"earlier": arguments.earlier, "now": HERE.parents[2]}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for pair in range(arguments.pairs):
        for name in sorted(trees, reverse=pair % 2 == 1):
            runs[name].append(run(trees[name], arguments.epochs))
            print(name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
    assert len({json.dumps(one["sha256"]) for found in runs.values() for one in found}) == 1, "the bytes differ"
    medians = {name: statistics.median(one["train_s"] for one in found) for name, found in runs.items()}
    print(
        json.dumps(
            {
                "train_s": {name: [round(one["train_s"], 2) for one in found] for name, found in runs.items()},
                "median_s": {name: round(median, 2) for name, median in medians.items()},
                "cost_percent": round(100 * (medians["now"] / medians["earlier"] - 1), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
