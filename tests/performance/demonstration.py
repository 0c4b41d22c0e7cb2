"""Prints what `distributed-eg run` comes to with its defaults, for every seed and number of threads.

    python tests/performance/demonstration.py --seeds 0 1 2 3 4 --threads 1 2

One JSON line a run: means over the eight embedded tasks, the accuracy of each expert, and seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile


def main() -> None:
    """Every run in a process of its own, as from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engine", choices=["ray", "inline"], default="inline")
    options = parser.parse_args()
    for threads in options.threads:
        for seed in options.seeds:
            arguments = ["run", "--json", "--seed", str(seed), "--threads", str(threads), "--engine", options.engine]
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "distributed_eg", *arguments, "--storage", f"{folder}/run"]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            experts = [task["expert_accuracy"] for task in found["tasks"]]
            told = {
                "seed": seed,
                "threads": threads,
                "gate": round(found["gate_accuracy"], 3),
                "expert": round(found["expert_accuracy"], 3),
                "end_to_end": round(found["end_to_end_accuracy"], 3),
                "experts": [round(accuracy, 3) for accuracy in experts],
                "train_s": round(found["train_s"], 1),
                "eval_s": round(found["eval_s"], 1),
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
