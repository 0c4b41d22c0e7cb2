"""Trains on a Ray cluster of two nodes with one worker each and prints what came out; a process of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.pop("RAY_ADDRESS", None)
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", RAY_AUTH_MODE="disabled")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cloudpickle
from ray.cluster_utils import Cluster

from distributed_eg import ClusterConfig
from tests import helpers

cloudpickle.register_pickle_by_value(helpers)


def main(storage: str) -> None:
    """Two nodes; a worker holds half of a declared GPU and all of a node's CPU, so each node gets one."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, num_gpus=1)
        config = ClusterConfig(
            address=cluster.address, num_workers=2, cpus_per_worker=1, gpus_per_worker=0.5, storage=storage
        )
        benchmark = helpers.tiny_benchmark(helpers.DOMAINS)
        with helpers.tiny_strategy(config, model=helpers.shared_model(), **helpers.SETTINGS) as strategy:
            strategy.train(benchmark.train_stream)
            metrics = strategy.eval(benchmark.test_stream)
            nodes = {worker.node for worker in strategy.workers()}
            outcome = helpers.outcome(strategy, metrics)
        print(json.dumps({"nodes": len(nodes), "outcome": outcome}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
