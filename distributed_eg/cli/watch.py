"""How a training goes: what each task does now, what is worth a line, and how long the rest may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from distributed_eg.runtime.messages import Progress
from distributed_eg.schedule.events import Stage


class Watch:
    """Of each task the last that was told, and when.

    Args:
        names: of the tasks, by label; one that is missing is told by its number.
        clock: seconds.
    """

    def __init__(self, names: Mapping[int, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._names = names
        self._clock = clock
        self._begun = 0.0
        self._last: dict[int, tuple[Progress, float]] = {}
        """By label; the least recently told first."""

    def take(self, progress: Progress) -> str | None:
        """Note it; a line, where it is worth one: an expert is there, or a stage failed."""
        if not self._last:  # not before: until then workers come up
            self._begun = self._clock()
        _, since = self._last.pop(progress.label, (None, self._clock()))
        self._last[progress.label] = (progress, since if progress.state == "training" else self._clock())
        task = f"task {progress.task} {self._names.get(progress.label, '')}"
        if progress.state == "failed":
            return f"{task}: {progress.stage.value} failed after {progress.seconds:.1f} s on {progress.worker}"
        if not _has_ended(progress):
            return None
        if progress.state == "kept":
            return f"{task}: kept"
        return f"{task}: expert from {_parent(progress)}, {progress.seconds:.1f} s on {progress.worker}{self._to_go()}"

    def drawn(self, rows: int) -> RenderableType:
        """A bar over all tasks, and ``rows`` of them: those at work before those that ended."""
        ended = [label for label, (progress, _) in self._last.items() if _has_ended(progress)]
        working = [label for label, (progress, _) in self._last.items() if not _has_ended(progress)]
        places = {label: place for place, label in enumerate([*self._names, *sorted(self._last.keys() - self._names)])}
        shown = sorted([*reversed(working), *reversed(ended)][:rows], key=places.__getitem__)
        table = Table("task", "stage", "loss", "worker", "parent", "seconds")
        for label in shown:
            table.add_row(*self._cells(*self._last[label]))
        bar = Table.grid(padding=(0, 1))
        count = f"{len(ended)} of {self._num_tasks} tasks{self._to_go()}"
        bar.add_row(ProgressBar(total=max(1, self._num_tasks), completed=len(ended), width=40), count)
        return Group(table, bar)

    @property
    def _num_tasks(self) -> int:
        """Those that have names, and those that came without one."""
        return len(self._names.keys() | self._last.keys())

    def _cells(self, progress: Progress, since: float) -> tuple[str, ...]:
        stage, loss, seconds = progress.stage.value, "", f"{progress.seconds:.1f}"
        if (epoch := progress.epoch) is not None:
            stage, loss = f"{stage}, epoch {epoch.number} of {epoch.total}", f"{epoch.loss:.3g}"
        if progress.state in ("started", "training"):
            stage, seconds = f"[yellow]{stage} …", f"{self._clock() - since:.0f}"
        elif progress.state == "failed":
            stage = f"[red]{stage} failed"
        elif progress.state == "kept":
            stage, seconds = f"[green]{stage} kept", ""
        elif _has_ended(progress):
            stage = "[green]done"
        name = escape(f"{progress.task} {self._names.get(progress.label, '')}")
        is_related = progress.stage is Stage.EXPERT or (progress.stage is Stage.RELATE and progress.state != "started")
        return name, stage, loss, progress.worker, _parent(progress) if is_related else "", seconds

    def _to_go(self) -> str:
        """How long the tasks take that have neither ended nor failed, at the pace of those that this training did; kept
        ones say nothing about it."""
        told = [progress for progress, _ in self._last.values()]
        done = sum(_has_ended(progress) and progress.state == "finished" for progress in told)
        left = self._num_tasks - sum(_has_ended(progress) or progress.state == "failed" for progress in told)
        if not done or not left:
            return ""
        return f", about {timedelta(seconds=round((self._clock() - self._begun) / done * left))} to go"


def _has_ended(progress: Progress) -> bool:
    return progress.stage is Stage.EXPERT and progress.state in ("finished", "kept")


def _parent(progress: Progress) -> str:
    return "root" if progress.parent is None else f"task {progress.parent}"
