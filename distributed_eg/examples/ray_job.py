"""For who submits Ray jobs: a run on the cluster that the job is on, which the same command goes on with.

ray job submit -- python -m distributed_eg.examples.ray_job s3://bucket/run-1
"""

from __future__ import annotations

import argparse
import json

import torch

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy, make_benchmark


def main() -> None:
    """Train the embedded task sequence, evaluate it, print where each expert came from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", help="run directory that every node sees")
    parser.add_argument("--train-per-task", type=int, default=240)
    parser.add_argument("--test-per-task", type=int, default=120)
    options = parser.parse_args()
    benchmark = make_benchmark("embedded", train_per_task=options.train_per_task, test_per_task=options.test_per_task)
    model = ExpertGate(benchmark.shape, arch="efficientnet_lite0", autoencoder="linear", gate_score="shared")
    with ExpertGateStrategy(
        model=model,
        optimizer=torch.optim.SGD(model.expert.parameters(), lr=1e-3, momentum=0.9),
        train_mb_size=16,
        train_epochs=3,
        ae_latent_dim=50,
        rel_thresh=0.7,
        transform=benchmark.transform,
        evaluator=None,
        # In a job RAY_ADDRESS says which cluster; resume: what an earlier attempt of the job has sealed is kept.
        cluster=ClusterConfig(storage=options.storage, resume=True),
    ) as strategy:
        strategy.train(benchmark.scenario.streams["train"])
        metrics = strategy.eval(benchmark.scenario.streams["test"])
        for row in strategy.registry.to_pylist():
            print(json.dumps({name: row[name] for name in ("task", "parent", "transfer", "worker")}))
    print(json.dumps({name.split("/")[0]: value for name, value in metrics.items() if "_Stream/" in name}))


if __name__ == "__main__":
    main()
