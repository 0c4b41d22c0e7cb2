"""What a person who waits sees of a training: which lines, which rows, how long it may take."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from distributed_eg.cli import display
from distributed_eg.cli.display import Display
from distributed_eg.cli.watch import Watch
from distributed_eg.runtime.messages import Epoch, Progress, State
from distributed_eg.schedule.events import Stage

NAMES = {0: "cats", 7: "dogs [old]", 9: "cars"}


def told(task: int, stage: Stage, state: State, **others: Any) -> Progress:
    label = list(NAMES)[task]
    return Progress(task, label, stage, state, **{"worker": "worker-1", "seconds": 1.25, **others})


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def text_of(watch: Watch, rows: int = 20) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(watch.drawn(rows))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_only_experts_and_failures_are_worth_a_line() -> None:
    watch = Watch(NAMES, Clock())
    early = (Stage.FEATURES, Stage.AUTOENCODER, Stage.RELATE)
    quiet = [watch.take(told(0, stage, state)) for stage in early for state in ("started", "finished", "kept")]
    assert quiet == [None] * 9
    assert watch.take(told(0, Stage.RELATE, "failed")) == "task 0 cats: relate failed after 1.2 s on worker-1"
    assert watch.take(told(2, Stage.EXPERT, "started")) is None
    line = watch.take(told(2, Stage.EXPERT, "finished", parent=0))
    assert line is not None
    assert line.startswith("task 2 cars: expert from task 0, 1.2 s on worker-1")
    assert watch.take(told(1, Stage.EXPERT, "kept")) == "task 1 dogs [old]: kept"


def test_the_time_to_go_follows_from_what_was_trained_and_not_from_what_was_kept() -> None:
    clock = Clock()
    watch = Watch(NAMES, clock)
    watch.take(told(0, Stage.EXPERT, "kept"))
    assert "1 of 3 tasks\n" in "\n".join(line.rstrip() for line in text_of(watch).splitlines()) + "\n"
    clock.now += 90
    line = watch.take(told(1, Stage.EXPERT, "finished", parent=None))
    assert line == "task 1 dogs [old]: expert from root, 1.2 s on worker-1, about 0:01:30 to go"
    assert "2 of 3 tasks, about 0:01:30 to go" in text_of(watch)
    watch.take(told(2, Stage.EXPERT, "failed"))
    assert "2 of 3 tasks\n" in "\n".join(line.rstrip() for line in text_of(watch).splitlines()) + "\n"
    line = watch.take(told(2, Stage.EXPERT, "finished", parent=0))
    assert line is not None
    assert "to go" not in line


def test_what_runs_is_shown_with_its_worker_its_parent_and_the_seconds_so_far() -> None:
    clock = Clock()
    watch = Watch(NAMES, clock)
    watch.take(told(0, Stage.EXPERT, "finished", parent=None))
    watch.take(told(1, Stage.EXPERT, "started", parent=0, worker="worker-5"))
    watch.take(told(2, Stage.AUTOENCODER, "started"))
    clock.now += 12
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text_of(watch).splitlines() if "│" in line]
    assert rows == [
        ["0 cats", "done", "", "worker-1", "root", "1.2"],
        ["1 dogs [old]", "expert …", "", "worker-5", "task 0", "12"],
        ["2 cars", "autoencoder …", "", "worker-1", "", "12"],
    ]
    assert "0 cats" not in text_of(watch, rows=2), "what is at work comes first"
    assert "1 dogs" in text_of(watch, rows=2)


def test_an_expert_is_shown_with_its_epoch_and_its_loss() -> None:
    clock = Clock()
    watch = Watch(NAMES, clock)
    watch.take(told(0, Stage.EXPERT, "started", parent=None))
    clock.now += 5
    assert watch.take(told(0, Stage.EXPERT, "training", parent=None, epoch=Epoch(0, 2, 3, 0.41234))) is None
    clock.now += 5
    (row,) = [line for line in text_of(watch).splitlines() if "0 cats" in line]
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["0 cats", "expert, epoch 2 of 3 …", "0.412", "worker-1", "root", "10"]
    watch.take(told(0, Stage.EXPERT, "finished", parent=None))
    assert "epoch" not in text_of(watch)


def test_tasks_without_a_name_are_told_by_their_number() -> None:
    watch = Watch({}, Clock())
    watch.take(told(1, Stage.EXPERT, "started", parent=None))
    watch.take(told(0, Stage.EXPERT, "finished", parent=None))
    assert [line.split()[1] for line in text_of(watch).splitlines() if "worker-1" in line] == ["0", "1"]
    assert "1 of 2 tasks" in text_of(watch)


def test_a_retried_stage_is_at_work_again() -> None:
    watch = Watch(NAMES, Clock())
    watch.take(told(0, Stage.EXPERT, "failed"))
    assert "expert failed" in text_of(watch)
    watch.take(told(0, Stage.EXPERT, "started"))
    assert "failed" not in text_of(watch)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_lines_stay_and_the_table_is_drawn_on_terminals_only(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()

    def console(**settings: Any) -> Console:
        del settings["stderr"]
        return Console(file=file, force_terminal=is_terminal, width=120, **settings)

    monkeypatch.setattr(display, "_Console", console)
    shown = Display(to_stderr=False)
    with shown.training(NAMES):
        shown.progress(told(1, Stage.EXPERT, "finished", parent=None))
        shown.progress(told(0, Stage.EXPERT, "started", parent=1))
    text = file.getvalue()
    assert text.count("task 1 dogs [old]: expert from root") == 1
    assert ("0 of 3 tasks" in text) == is_terminal
    assert "[green]" not in text
    assert "[yellow]" not in text


def test_quiet_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    shown = Display(to_stderr=True, quiet=True)
    with shown.training(NAMES):
        shown.progress(told(1, Stage.EXPERT, "finished"))
    assert capfd.readouterr() == ("", "")
