"""Prints how often the gate is right on ten tasks of MNIST and Fashion-MNIST: per task, per dataset, per recipe.

    python tests/performance/gate_figures.py --data ../shared/data linear mixed sgd-adagrad sgd-defaults

Two classes a task, 400 training and 200 test images a task, efficientnet_lite0 with its ImageNet weights at 96×96.
Experts are not trained: they do not take part in the gate. One JSON line a recipe.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy, make_benchmark
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Storage

# The tasks of the two datasets alternate: each dataset has small and large ones.
SIZES = [40, 40, 400, 400, 40, 40, 400, 400, 40, 40]
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"autoencoder": "linear", "ae_latent_dim": 50},
    "mixed": {"autoencoder": "linear", "ae_latent_dim": 50, "train_per_task": SIZES},
    "sgd-adagrad": {
        "autoencoder": "sgd",
        "ae_optimizer": "adagrad",
        "ae_lr": 1e-2,
        "ae_train_mb_size": 12,
        "ae_train_epochs": 20,
    },
    "sgd-defaults": {"autoencoder": "sgd"},
}


def measure(name: str, data: str, engine: str) -> dict[str, Any]:
    """Train the gate over all tasks and route every test image."""
    settings = dict(RECIPES[name])
    benchmark = make_benchmark(
        "split-mnist+fashion",
        data=data,
        image_size=96,
        train_per_task=settings.pop("train_per_task", 400),
        test_per_task=200,
    )
    model = ExpertGate(benchmark.shape, arch="efficientnet_lite0", autoencoder=settings.pop("autoencoder"))
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=1e-3)
    cluster = ClusterConfig(engine=engine)  # type: ignore[arg-type]
    with ExpertGateStrategy(
        model=model,
        optimizer=optimizer,
        train_epochs=0,
        eval_mb_size=32,
        cluster=cluster,
        evaluator=EvaluationPlugin(loggers=[]),
        **settings,
    ) as strategy:
        started = time.perf_counter()
        strategy.train(benchmark.scenario.train_stream)
        train_s = time.perf_counter() - started
        records = Registry.read(Storage(strategy.run_dir or "")).relatedness
        shares = [record.own_error / record.variance for _, record in sorted(records.items())]
        model.eval()
        gate, domain = [], []
        for task, experience in enumerate(benchmark.scenario.test_stream):
            images = [experience.dataset[i][0] for i in range(len(experience.dataset))]
            routed = torch.cat([model.gate(torch.stack(images[i : i + 32])).tasks for i in range(0, len(images), 32)])
            gate.append((routed == task).double().mean().item())
            same = [benchmark.domains[int(t)] == benchmark.domains[task] for t in routed]
            domain.append(sum(same) / len(same))
    per_dataset = {
        name: sum(d for d, where in zip(domain, benchmark.domains, strict=True) if where == name)
        / benchmark.domains.count(name)
        for name in dict.fromkeys(benchmark.domains)
    }
    small = [right for right, size in zip(gate, SIZES, strict=True) if size == min(SIZES)]
    return {
        "recipe": name,
        "gate_mean": round(sum(gate) / len(gate), 4),
        "gate_min": min(gate),
        "gate_per_task": gate,
        "dataset_accuracy": per_dataset,
        "own_error_share_of_variance": [round(share, 3) for share in shares],
        "mean_of_the_tasks_that_are_small_in_mixed": round(sum(small) / len(small), 4),
        "train_s": round(train_s, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--data", required=True)
    parser.add_argument("--engine", choices=["ray", "inline"], default="inline")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    for recipe in arguments.recipes:
        print(json.dumps(measure(recipe, arguments.data, arguments.engine)), flush=True)
