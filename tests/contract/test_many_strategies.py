"""Several strategies in one process share its Ray, whoever started it, whoever ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import hashes, tiny_benchmark, tiny_strategy

pytestmark = pytest.mark.ray

SCRIPT = Path(__file__).with_name("many_strategies.py")


def test_they_work_whoever_ends_ray_and_leave_nothing(tmp_path: Path) -> None:
    """What they train is what they would train alone; see the script for its stories."""
    process = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr[-6000:]
    seen = json.loads(process.stdout.splitlines()[-1])
    alone = []
    benchmark = tiny_benchmark((0, 1))
    for lr in (0.05, 0.1):
        with tiny_strategy() as strategy:
            strategy.optimizer.param_groups[0]["lr"] = lr
            strategy.train(benchmark.train_stream)
            alone.append([list(pair) for pair in hashes(strategy)])
    error = seen.pop("error")
    assert "Ray was shut down" in error
    assert "resume=True" in error
    assert seen == {
        "another was started": False,
        "resumed": alone[0],
        "the user's was kept": True,
        "cpus": 1,
        "beside it": alone[1],
        "workers": [0, 1],
        "as before": True,
        "kept for the other": True,
        "kept for nobody": False,
        "left": {"processes": [], "scratch": [], "open": [False, False]},
    }
