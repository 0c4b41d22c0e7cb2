"""Every example runs, and says what it is to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

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
    small = ("--train-per-task", "24", "--test-per-task", "12")
    first = run("ray_job", str(tmp_path / "run"), *small)
    assert len(first) == 9
    assert json.loads(first[0])["transfer"] == "fresh"
    assert json.loads(first[-1]).keys() >= {"Gate_Acc_Stream", "Expert_Acc_Stream", "EndToEnd_Acc_Stream"}
    again = run("ray_job", str(tmp_path / "run"), *small)
    assert again == first


def test_a_long_sequence(mnist_root: Path) -> None:
    lines = run("long_sequence", "--data", str(mnist_root), "--tasks", "12", "--engine", "inline")
    assert [line.split()[0] for line in lines[1:]] == ["Gate_Acc_Stream", "Expert_Acc_Stream", "EndToEnd_Acc_Stream"]


class Client(NotebookClient):  # type: ignore[misc]  # nbclient's traits have no types
    """Keeps what cells drew over what they had shown."""

    drawn: list[str]

    def process_message(self, msg: dict[str, Any], cell: nbformat.NotebookNode, cell_index: int) -> Any:
        if msg["msg_type"] == "update_display_data":
            self.drawn.append(msg["content"]["data"]["text/plain"])
        return super().process_message(msg, cell, cell_index)


@pytest.fixture(scope="module")
def executed() -> nbformat.NotebookNode:
    """The notebook after a kernel has run it from its first cell to its last, and what was drawn as it ran."""
    notebook = nbformat.read(EXAMPLES / "at_a_prompt.ipynb", as_version=4)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code"] == [[]] * 7, "stored without outputs"
    client = Client(notebook, timeout=280, kernel_name="python3")
    client.drawn = notebook.metadata["drawn"] = []
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    return notebook


def test_each_cell_of_the_notebook_shows_what_it_is_to(executed: nbformat.NotebookNode) -> None:
    results = [
        output.data["text/plain"]
        for cell in executed.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    names, parents, related, routing, predictions = results
    assert "cat-flower-rocket" in names
    assert parents.count("'task'") == 3
    assert related.count("'candidate'") == 3  # of three tasks: 0 + 1 + 2
    assert routing.startswith("(tensor([")
    assert predictions.count("Prediction(") == 4


def test_in_a_notebook_progress_is_drawn_and_lines_stay(executed: nbformat.NotebookNode) -> None:
    (training,) = [cell for cell in executed.cells if "strategy.train" in cell.source]
    *drawn, last = executed.metadata["drawn"]
    assert any("epoch 1 of 1 …" in table for table in drawn)
    assert last.strip() == "", "the table goes at the end"
    said = "".join(output.get("data", {}).get("text/plain", "") for output in training.outputs)
    assert "Training 3 tasks" in said
    assert said.count(": expert from ") == 3
