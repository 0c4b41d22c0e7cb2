"""A short run of ``driver_kills``: the command, its figures, and what it finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.long]

COMMAND = [sys.executable, str(Path(__file__).with_name("driver_kills.py")), "--json"]


def test_a_driver_that_is_killed_at_random_moments_is_resumed() -> None:
    """Two kills: one while it trains, one towards its end."""
    done = subprocess.run(
        [*COMMAND, "--kills", "2", "--tasks", "2", "--seed", "24"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert [kill["equal"] for kill in figures["kills"]] == [True, True]
