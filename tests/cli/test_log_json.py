"""``--log-json``: what a collector of logs reads from stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_eg import ClusterConfig
from distributed_eg.cli import main
from distributed_eg.cli.log_json import JsonFormatter
from tests.helpers import tiny_benchmark, tiny_strategy


@pytest.fixture
def lines() -> Iterator[Any]:
    """A function that gives what was logged as JSON so far, of a run called "runs/7"."""
    found: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(self.format(record))

    ours, handler = logging.getLogger("distributed_eg"), Keeps()
    handler.setFormatter(JsonFormatter("runs/7"))
    ours.addHandler(handler)
    level = ours.level
    ours.setLevel(logging.DEBUG)
    yield lambda: [json.loads(line) for line in found]
    ours.removeHandler(handler)
    ours.setLevel(level)


def test_every_stage_is_told_with_run_task_stage_attempt_and_worker(lines: Any, tmp_path: Path) -> None:
    cluster = ClusterConfig(engine="inline", storage=tmp_path / "run", resume=True)
    with tiny_strategy(cluster, train_epochs=1) as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
    told = [line for line in lines() if "state" in line]
    seen = [(line["task"], line["stage"], line["state"]) for line in told]
    for task in (0, 1):
        for stage in ("features", "autoencoder", "relate", "expert"):
            assert seen.index((task, stage, "started")) < seen.index((task, stage, "finished"))
    assert {line["run"] for line in told} == {"runs/7"}
    assert {line["worker"] for line in told} == {"inline"}
    attempts = [line["attempt"] for line in told if line["state"] == "started"]
    assert len(set(attempts)) == len(attempts) == 8
    assert all(line["seconds"] > 0 for line in told if line["state"] == "finished")
    before = len(lines())
    with tiny_strategy(cluster, train_epochs=1) as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
    again = [(line["task"], line["state"]) for line in lines()[before:] if "state" in line]
    assert again == [(task, "kept") for task in (0, 1) for _ in range(4)]


def test_what_goes_wrong_keeps_its_traceback_on_one_line(lines: Any) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("distributed_eg.x").exception("It went %s\nhere", "wrong")
    (line,) = lines()
    assert (line["level"], line["logger"], line["message"]) == ("ERROR", "distributed_eg.x", "It went wrong\nhere")
    assert "ValueError: two\nlines" in line["traceback"]
    assert line["time"].endswith("+00:00")


def test_stderr_is_json_to_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With --json, also what the command ends with."""
    (tmp_path / "mine.py").write_text(
        "import warnings\ndef tasks():\n    warnings.warn('of theirs')\n    raise OSError('no disk')\n"
    )
    root, ours = logging.getLogger(), logging.getLogger("distributed_eg")
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler()])
    level = ours.level
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["run", f"{tmp_path}/mine.py:tasks", "--json", "--log-json", "--storage", f"{tmp_path}/run"])
    finally:
        logging.captureWarnings(False)
        ours.setLevel(level)
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    told = [json.loads(line) for line in err.splitlines()]
    assert {line["run"] for line in told} == {f"{tmp_path}/run"}
    assert "raised in line 4: OSError: no disk" in told[-1]["message"]
    assert told[-1]["level"] == "ERROR"
