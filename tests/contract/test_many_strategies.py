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
    sweep, shut_down = seen["sweep"], seen["shut_down"]
    alone = []
    benchmark = tiny_benchmark((0, 1))
    for lr in (0.05, 0.1):
        with tiny_strategy() as strategy:
            strategy.optimizer.param_groups[0]["lr"] = lr
            strategy.train(benchmark.train_stream)
            alone.append([list(pair) for pair in hashes(strategy)])
    assert (sweep["cpus"], sweep["workers"]) == (1, 1), "more than its one CPU was used"
    assert sweep["there"], "the first one took Ray from the second"
    assert sweep["gone"], "the last one left Ray behind"
    assert sweep["experts"] == [alone[0][:1], alone[1]]
    assert "Ray was shut down" in shut_down["error"]
    assert "resume=True" in shut_down["error"]
    assert not shut_down["started_another"], "a call without Ray started one that nobody ends"
    assert shut_down["experts"] == alone[0]
    assert shut_down["users_kept"], "a Ray of the user's own was shut down"
    assert sweep["measured"]
    assert shut_down["measured"]
    left = seen["left"]
    assert (left["processes"], left["scratch"]) == ([], [])
    assert not any(left["open"])
