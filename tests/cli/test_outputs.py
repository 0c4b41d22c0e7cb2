"""What the command prints to: readers that go away, and places that must not learn a secret."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from distributed_eg.cli import main
from distributed_eg.cli.display import Display
from distributed_eg.store.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
RUN = "tests/store/old_runs/finished"


def unread(arguments: list[str], stream: str, cwd: Path = ROOT) -> tuple[int, str]:
    """Exit code, and what the other stream gets, of a command whose stdout or stderr nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "distributed_eg", *arguments],
            **streams,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr if stream == "stdout" else done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["run", "--help"], ["verify", "--help"], ["gc", "--help"], ["simulate", "--help"]),
        *(["verify", RUN], ["verify", RUN, "--json"], ["gc", RUN, "--dry-run"], ["gc", RUN, "--dry-run", "--json"]),
        *(["simulate", "--schedules", "5", "--processes", "1", "--json"], ["simulate", "--replay", "3"]),
    ],
    ids=" ".join,
)
def test_it_ends_quietly_where_nobody_reads(arguments: list[str]) -> None:
    code, err = unread(arguments, "stdout")
    assert code == 141
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


@pytest.mark.parametrize("arguments", [["verify", "nowhere"], ["verify", RUN, "--json"], ["frobnicate"]], ids=" ".join)
def test_it_ends_quietly_where_nobody_reads_its_errors(arguments: list[str], tmp_path: Path) -> None:
    assert unread(arguments, "stderr")[0] == 141


@pytest.mark.parametrize("arguments", [["--help"], ["verify", RUN], ["simulate", "--replay", "3"]], ids=" ".join)
def test_output_that_a_full_disk_does_not_take_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "distributed_eg", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot be written: [Errno 28] No space left on device" in done.stderr


def test_a_run_s_progress_passes_the_error_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the run is closed on its way to ``main``, and goes on where it is resumed."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", nobody)
        with pytest.raises(BrokenPipeError), Display(to_stderr=False).training(["a"]):
            pass
        with pytest.raises(BrokenPipeError):
            Display(to_stderr=False).interrupted("run")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what is left in the buffer


def test_a_pipe_of_somebody_else_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed_eg.store import verification

    def broken(_: object) -> None:
        raise BrokenPipeError(32, "a socket of Ray's")

    monkeypatch.setattr(verification, "verify", broken)
    with pytest.raises(BrokenPipeError, match="Ray's"):
        main(["verify", str(ROOT / RUN)])


SECRET = "hunter2hunter2"


@pytest.fixture
def secret_uri(request: pytest.FixtureRequest) -> str:
    """A run in memory, behind a URI that holds a password."""
    pytest.importorskip("fsspec")
    storage = Storage(f"fsspec+memory://AKIA0:{SECRET}@bucket-{uuid.uuid4().hex}/run")
    for path in Storage(ROOT / RUN).walk():
        storage.write(path, (ROOT / RUN / path).read_bytes())
    return storage.uri


@pytest.mark.parametrize("harmed", [None, "run.json", "statistics.json", "tasks/00001/manifest.json"])
@pytest.mark.parametrize("arguments", [["verify"], ["verify", "--json"], ["gc"], ["gc", "--json"]], ids=" ".join)
def test_no_output_tells_a_secret(
    arguments: list[str], harmed: str | None, secret_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if harmed is not None:
        Storage(secret_uri).write(harmed, b"{")
    with contextlib.suppress(SystemExit):
        main([*arguments, secret_uri])
    done = capfd.readouterr()
    assert done.out + done.err
    assert SECRET not in done.out + done.err
    assert "AKIA0" not in done.out + done.err


@pytest.mark.parametrize("name", ["verify", "gc"])
@pytest.mark.parametrize(
    "uri",
    [f"s3://AKIA0:{SECRET}/{SECRET}@b/r", f"s3://b/r?access_key=AKIA0&secret_key={SECRET}", f"x://AKIA0:{SECRET}@b"],
)
def test_no_error_tells_a_secret(name: str, uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, uri])
    done = capfd.readouterr()
    assert "***" in done.err
    assert SECRET not in done.out + done.err
    assert "AKIA0" not in done.out + done.err


@pytest.mark.parametrize("name", ["storage", "weights", "data", "address"])
def test_an_empty_option_is_refused_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", f"--{name}", ""])
    assert stopped.value.code == 2
    assert f"--{name} is ''" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["verify", "gc"])
def test_an_empty_run_is_not_this_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, ""])
    assert stopped.value.code == 2
    assert "The run directory is ''" in capsys.readouterr().err


@pytest.mark.parametrize("lr", ["nan", "inf", "-1"])
def test_a_learning_rate_that_is_none_is_refused(lr: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--lr", lr])
    assert stopped.value.code == 2
    assert "--lr is" in capsys.readouterr().err


def test_a_home_that_no_shell_put_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As in ``--storage=~/run``."""
    import shutil

    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(ROOT / RUN, tmp_path / "run")
    main(["verify", "~/run", "--json"])
    assert json.loads(capsys.readouterr().out)["damages"] == []
