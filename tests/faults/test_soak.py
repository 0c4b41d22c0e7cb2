"""A short soak: the command, its figures, and that nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.long]

SMALL = ["--seeds", "0", "--tasks", "6", "--nodes", "2", "--every-s", "3", "--max-faults", "4"]
KINDS = ["worker", "coordinator", "node", "driver"]


def test_a_run_over_which_everything_is_killed_once_ends_with_the_same_bytes() -> None:
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), *SMALL, "--kinds", *KINDS, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = json.loads(done.stdout.splitlines()[-1])["seeds"]
    assert figures["faults"] == dict.fromkeys(KINDS, 1)
    assert figures["stages_rerun"] >= 1
    assert (figures["tasks_lost"], figures["files_differing"], figures["wrong"]) == (0, 0, [])
    assert not any(figures["left"].values())
