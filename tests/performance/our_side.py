"""Prints our timings for the run that Avalanche's own strategy is measured on: Split-MNIST, AlexNet, JSON.

    python tests/performance/our_side.py --data ../shared/data --num-workers 2

Five tasks of two digits, 128 training and 64 test images each at 227×227, AlexNet with fixed random weights, batch 32,
one expert epoch, two autoencoder epochs; memory is the sum over this process and its workers. Four of the experts learn
without forgetting, whose teacher looks at each image, too; with --fine-tune none does, as in a bare loop.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import threading
import time
import warnings

import psutil
import torch
from avalanche.training.plugins import EvaluationPlugin

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy, make_benchmark
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Storage


class PeakMemory(threading.Thread):
    """Samples the proportional memory of this process and of its workers; shared pages count once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self.done = threading.Event()

    def run(self) -> None:
        """Sample until told to stop."""
        me = psutil.Process(os.getpid())
        while not self.done.wait(0.5):
            workers = [c for c in me.children(recursive=True) if "TaskWorker" in " ".join(_cmdline(c))]
            self.peak_bytes = max(self.peak_bytes, sum(_pss(process) for process in (me, *workers)))


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--num-workers", type=int, help="as many as there are CPUs where not given; ray only")
    parser.add_argument("--engine", choices=["ray", "inline"], default="ray")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--autoencoder", choices=["sgd", "linear"], default="sgd")
    parser.add_argument("--fine-tune", action="store_true", help="no expert learns without forgetting")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    memory = PeakMemory()
    memory.start()
    benchmark = make_benchmark("split-mnist", data=arguments.data, image_size=227, train_per_task=128, test_per_task=64)
    linear = arguments.autoencoder == "linear"
    model = ExpertGate(benchmark.shape, pretrained_flag=False, autoencoder=arguments.autoencoder)
    workers = "auto" if arguments.num_workers is None else arguments.num_workers
    cluster = ClusterConfig(engine=arguments.engine, num_workers=workers, threads=arguments.threads)
    with ExpertGateStrategy(
        model=model,
        optimizer=torch.optim.SGD(model.expert.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4),
        train_mb_size=32,
        train_epochs=1,
        eval_mb_size=32,
        cluster=cluster,
        rel_thresh=math.inf if arguments.fine_tune else 0.85,
        evaluator=EvaluationPlugin(loggers=[]),
        **({} if linear else {"ae_train_mb_size": 32, "ae_train_epochs": 2, "ae_lr": 1e-3}),
    ) as strategy:
        started = time.perf_counter()
        strategy.train(benchmark.scenario.train_stream)
        trained = time.perf_counter()
        metrics = strategy.eval(benchmark.scenario.test_stream)
        evaluated = time.perf_counter()
        per_task = [round(seconds, 2) for seconds in strategy.registry["train_s"].to_pylist()]
        transfers = strategy.registry["transfer"].to_pylist()
        manifests = Registry.read(Storage(strategy.run_dir or "")).manifests.values()
        autoencoder_bytes = sum(manifest.autoencoder.size_bytes for manifest in manifests)
    memory.done.set()
    streams = {name.split("/")[0]: round(value, 4) for name, value in metrics.items() if "_Stream" in name}
    answer = {
        "transfers": transfers,
        "train_s": round(trained - started, 2),
        "stage_s_per_task": per_task,
        "eval_s": round(evaluated - trained, 2),
        "peak_mb": memory.peak_bytes // 2**20,
        "autoencoders_mb": round(autoencoder_bytes / 1e6, 1),
        "accuracy": streams,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
