"""A short run of ``driver_kills``: the command, its figures, and what it finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.long]

COMMAND = [sys.executable, str(Path(__file__).with_name("driver_kills.py")), "--json"]


@pytest.mark.parametrize("stream", [["--tasks", "2"], ["--tasks", "4", "--append", "--engine", "ray"]])
def test_a_driver_that_is_killed_at_random_moments_is_resumed(stream: list[str]) -> None:
    """Two kills: one while it trains, one towards its end."""
    done = subprocess.run(
        [*COMMAND, "--kills", "2", "--seed", "24", *stream], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert [kill["equal"] for kill in figures["kills"]] == [True, True]
