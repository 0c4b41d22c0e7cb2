"""Every example runs, and says what it is to say."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import distributed_eg

EXAMPLES = Path(distributed_eg.__file__).parent / "examples"
ROOT = EXAMPLES.parents[1]


def run(name: str, *arguments: str) -> list[str]:
    """Lines that an example prints."""
    command = [sys.executable, "-m", f"distributed_eg.examples.{name}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_all_are_tried_here() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert names == {"__init__.py", "ray_job.py", "long_sequence.py", "at_a_prompt.ipynb"}


@pytest.mark.ray
def test_a_ray_job_and_the_same_job_again(tmp_path: Path) -> None:
    first = run("ray_job", str(tmp_path / "run"), "--train-per-task", "24")
    assert len(first) == 9
    assert json.loads(first[0])["transfer"] == "fresh"
    assert json.loads(first[-1]).keys() >= {"Gate_Acc_Stream", "Expert_Acc_Stream", "EndToEnd_Acc_Stream"}
    again = run("ray_job", str(tmp_path / "run"), "--train-per-task", "24")
    assert again == first


def test_a_long_sequence(mnist_root: Path) -> None:
    lines = run("long_sequence", "--data", str(mnist_root), "--tasks", "12", "--engine", "inline")
    assert [line.split()[0] for line in lines[1:]] == ["Gate_Acc_Stream", "Expert_Acc_Stream", "EndToEnd_Acc_Stream"]


def test_the_notebook() -> None:
    """Cell after cell, as a kernel would run them; the last value of each can be shown."""
    cells = json.loads((EXAMPLES / "at_a_prompt.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in code:
        *before, last = ast.parse(cell).body
        exec(compile(ast.Module(before, []), "at_a_prompt.ipynb", "exec"), names)
        if isinstance(last, ast.Expr):
            assert repr(eval(compile(ast.Expression(last.value), "at_a_prompt.ipynb", "eval"), names))
        else:
            exec(compile(ast.Module([last], []), "at_a_prompt.ipynb", "exec"), names)
    assert len(names["routing"].tasks) == 4  # type: ignore[attr-defined]
    assert all(cell.get("outputs") == [] for cell in cells if cell["cell_type"] == "code"), "stored without outputs"
