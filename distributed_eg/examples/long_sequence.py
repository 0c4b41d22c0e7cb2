"""For who benchmarks long task sequences: class pairs of MNIST in many rotations, a small network, seconds a task.

python -m distributed_eg.examples.long_sequence --data DIR --tasks 200
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy, make_benchmark
from distributed_eg.benchmarks.benchmark import part_of


def small_network() -> nn.Module:
    """A network of your own: the layer before its head gives the features that tasks are told apart by."""
    features = nn.Sequential(nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))


def main() -> None:
    """Train, evaluate, print seconds a task and the three accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of torchvision's datasets")
    parser.add_argument("--tasks", type=int, default=200, help="of 1,080")
    parser.add_argument("--engine", choices=["ray", "inline"], default="ray")
    options = parser.parse_args()
    torch.manual_seed(0)  # of the network's first weights
    whole = make_benchmark("pairs:split-mnist", data=options.data, image_size=32, train_per_task=40, test_per_task=10)
    benchmark = part_of(whole, range(options.tasks), 0, 0)
    model = ExpertGate(benchmark.shape, arch=small_network(), autoencoder="linear", gate_score="shared")
    with ExpertGateStrategy(
        model=model,
        optimizer=torch.optim.SGD(model.expert.parameters(), lr=0.01, momentum=0.9),
        train_mb_size=8,
        train_epochs=2,
        ae_latent_dim=20,
        evaluator=None,
        cluster=ClusterConfig(engine=options.engine),
    ) as strategy:
        started = time.perf_counter()
        strategy.train(benchmark.scenario.streams["train"])
        print(f"{(time.perf_counter() - started) / options.tasks:.2f} s a task")
        metrics = strategy.eval(benchmark.scenario.streams["test"])
    for name in ("Gate_Acc_Stream", "Expert_Acc_Stream", "EndToEnd_Acc_Stream"):
        print(name, round(next(value for key, value in metrics.items() if key.startswith(name)), 3))


if __name__ == "__main__":
    main()
