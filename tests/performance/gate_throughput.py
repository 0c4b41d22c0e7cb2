"""Prints how fast the stacked gate is, in samples a second and as a share of this machine's own matrix products.

    python tests/performance/gate_throughput.py --tasks 10 100 1000 --threads 2 [--device cuda]

Autoencoders of random weights; each line of JSON is a median over alternating runs of the gate and of one plain product
of two large matrices. A multiplication and an addition count as two operations, and only those of matrix products. Then
whole routings by the two scores of the same tasks in turns, strangeness included, and how long a gate takes to make.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from distributed_eg.method.autoencoder import AutoencoderStack, stack_autoencoders
from distributed_eg.method.gate import Gate
from distributed_eg.method.linear_autoencoder import LinearAutoencoder
from distributed_eg.method.sgd_autoencoder import SgdAutoencoder
from distributed_eg.method.shared_score import kept_rows
from distributed_eg.method.standardize import Statistics
from distributed_eg.method.summary import RANK, TaskSummary
from distributed_eg.types import AutoencoderKind

SHAPES: tuple[tuple[AutoencoderKind, int, int], ...] = (
    *(("linear", 9216, 100), ("linear", 11520, 50)),
    *(("sgd", 9216, 100), ("sgd", 11520, 50)),
)


def stack_of(kind: AutoencoderKind, num_tasks: int, num_features: int, size: int, device: str) -> AutoencoderStack:
    """A stack whose weights are all the same task's: memory for them is there once more, in the stack."""
    one = torch.rand(size, num_features, device=device) / num_features**0.5
    mean, bias = torch.rand(num_features, device=device), torch.zeros(size, device=device)
    if kind == "linear":
        return stack_autoencoders([LinearAutoencoder(one, bias + 1, mean, torch.tensor(100))] * num_tasks)
    return stack_autoencoders([SgdAutoencoder(one, bias, one.T.contiguous(), mean)] * num_tasks)


def seconds_of(work: Callable[[], object], device: str) -> float:
    """One call, to its end."""
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(kind: AutoencoderKind, num_tasks: int, num_features: int, size: int, options: argparse.Namespace) -> None:
    """Alternate, print."""
    device = options.device
    features = torch.rand(options.batch, num_features, device=device)
    left, right = torch.rand(2048, 4096, device=device), torch.rand(4096, 4096, device=device)
    stack = stack_of(kind, num_tasks, num_features, size, device)
    operations = 2 * options.batch * num_features * size * num_tasks * (1 if kind == "linear" else 2)
    gate, product = (lambda: stack.errors(features)), (lambda: left @ right)
    pairs = [(seconds_of(gate, device), seconds_of(product, device)) for _ in range(1 + options.repeats)][1:]
    gate_s, peak = statistics.median(g for g, _ in pairs), 2 * 2048 * 4096 * 4096 / min(p for _, p in pairs)
    told = {"kind": kind, "tasks": num_tasks, "features": num_features, "size": size, "batch": options.batch}
    figures = {"samples_per_s": round(options.batch / gate_s, 1), "of_peak": round(operations / gate_s / peak, 3)}
    print(json.dumps({**told, **figures, "peak_gflops": round(peak / 1e9, 1)}), flush=True)


def compare_scores(num_tasks: int, num_features: int, options: argparse.Namespace) -> None:
    """Route by residuals of 50 directions and by the shared score of two classes a task, in turns; print."""
    device, rows = options.device, min(RANK, kept_rows(num_tasks, num_features))
    directions = [torch.rand(50, num_features) / num_features**0.5 for _ in range(num_tasks)]
    ones, many = torch.ones(50), torch.tensor(400)
    autoencoders = tuple(LinearAutoencoder(d, ones, torch.rand(num_features), many) for d in directions)
    energy = torch.tensor(float(2 * rows * num_features), dtype=torch.float64)
    summaries = tuple(
        TaskSummary(
            *(torch.arange(2), torch.tensor([180, 180]), torch.rand(2, num_features)),
            *(torch.randn(rows, num_features), energy),
        )
        for _ in range(num_tasks)
    )
    standard = Statistics(torch.zeros(num_features), torch.ones(num_features), 400).to(device)
    tasks, limits = tuple(range(num_tasks)), (1.0,) * num_tasks
    features = torch.randn(options.batch, num_features, device=device)
    gates, made_s = {}, {}
    for name, known in (("residual", ()), ("shared", summaries)):
        gates[name] = Gate(tasks, autoencoders, standard, 2.0, None, known, limits=limits)
        made_s[name] = seconds_of(lambda gate=gates[name]: gate.route(features[:1]), device)
    turns = [
        {name: seconds_of(lambda gate=gate: gate.route(features), device) for name, gate in gates.items()}
        for _ in range(1 + options.repeats)
    ][1:]
    took_ms = {name: 1e3 * statistics.median(turn[name] for turn in turns) for name in gates}
    told = {"tasks": num_tasks, "features": num_features, "batch": options.batch, "directions_a_task": rows}
    figures = {f"{name}_ms": round(ms, 1) for name, ms in took_ms.items()}
    figures |= {f"{name}_made_s": round(seconds, 1) for name, seconds in made_s.items()}
    asked = len(gates["shared"].route(features).tasks.unique())
    times = round(took_ms["residual"] / took_ms["shared"], 1)
    print(json.dumps({**told, **figures, "tasks_asked": asked, "times_as_fast": times}), flush=True)


@torch.no_grad()
def main() -> None:
    """Every shape for every number of tasks that fits in memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--most-gb", type=float, default=6, help="larger stacks are left out")
    parser.add_argument("--scores-only", action="store_true", help="only the routings by the two scores")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for kind, num_features, size in () if options.scores_only else SHAPES:
        for num_tasks in options.tasks:
            stack_gb = 4e-9 * num_tasks * num_features * size * (1 if kind == "linear" else 2)
            if stack_gb > options.most_gb:
                print(json.dumps({"kind": kind, "tasks": num_tasks, "left_out_gb": round(stack_gb, 1)}), flush=True)
            else:
                measure(kind, num_tasks, num_features, size, options)
    for num_tasks in options.tasks:
        compare_scores(num_tasks, 11520, options)


if __name__ == "__main__":
    main()
