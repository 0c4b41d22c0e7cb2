"""What a person sees: live progress per task, then the table of results."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from distributed_eg.benchmarks.catalog import BenchmarkLine
from distributed_eg.cli.outcome import RunOutcome, TaskLine, TaskOutcome
from distributed_eg.cli.watch import Watch
from distributed_eg.masking import masked
from distributed_eg.runtime.messages import Progress

if TYPE_CHECKING:
    from distributed_eg.method.backbone_list import BackboneLine
    from distributed_eg.strategy.predictions import Prediction


_WIDTH = 160
"""Columns of what no terminal shows, and so nothing limits."""
_DRAWN_A_SECOND = 4
_ROWS_AROUND = 8
"""Of a terminal, beside the rows of tasks: the table's frame and heading, the bar, what stands above."""


class _Console(Console):
    """Rich's, but one that leaves a reader who went away to ``main``."""

    def on_broken_pipe(self) -> None:
        """Called where the error is handled: let it pass on."""
        raise


class Display:
    """Draws on a terminal and in a notebook; elsewhere prints one line for each expert that is there, and for each
    stage that fails. ``quiet`` says nothing at all. At a prompt of your own::

        display = Display()
        strategy = ExpertGateStrategy(…, observer=display.progress)
        with display.training({0: "cats", 1: "dogs"}):
            strategy.train(stream)
    """

    def __init__(self, *, to_stderr: bool = False, quiet: bool = False) -> None:
        self._console = _Console(stderr=to_stderr, soft_wrap=True, quiet=quiet)
        if not self._console.is_terminal:
            self._console.width = _WIDTH
        self._watch = Watch({})
        self._cell: Callable[[], None] | None = None
        """Draws in a notebook's cell, where one is trained in."""
        self._drawn_s = 0.0

    @contextmanager
    def training(self, names: Mapping[int, str]) -> Iterator[None]:
        """Show the progress of tasks, with their names by label."""
        self._watch = Watch(names)
        self._console.print(f"Training {len(names)} task{'s' * (len(names) != 1)} …", highlight=False)
        rows = max(1, self._console.height - _ROWS_AROUND)
        if self._console.is_jupyter:
            with self._drawn_in_cell(rows):
                yield
            return
        if not self._console.is_terminal:
            yield
            return
        with Live(
            get_renderable=lambda: self._watch.drawn(rows),
            console=self._console,
            refresh_per_second=_DRAWN_A_SECOND,
            transient=True,
            # One that goes to a file stays there.
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        ):
            yield

    def progress(self, progress: Progress) -> None:
        """Take a stage's start or end in."""
        line = self._watch.take(progress)
        if line is not None:
            # Escaped, and not printed without markup, which the live table would be, too.
            self._console.print(escape(line), highlight=False)
        if self._cell is not None and time.monotonic() - self._drawn_s > 1 / _DRAWN_A_SECOND:
            self._cell()
            self._drawn_s = time.monotonic()

    @contextmanager
    def _drawn_in_cell(self, rows: int) -> Iterator[None]:
        """The table in a cell of a notebook. Rich's own needs widgets, into which lines are lost that are printed while
        its thread draws."""
        from IPython.display import display

        cell = display(Padding(self._watch.drawn(rows), 0), display_id=True)
        self._cell = lambda: cell.update(Padding(self._watch.drawn(rows), 0))
        try:
            yield
        finally:
            self._cell = None
            cell.update(Text())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Say that the evaluation runs."""
        self._console.print("Routing the test images …")
        yield

    def interrupted(self, storage: str) -> None:
        """Say how to go on."""
        where = masked(storage)
        self._console.print(
            f"Stopped. What is sealed is kept: the same command with --storage {where} goes on.", highlight=False
        )

    def table(self, outcome: RunOutcome) -> None:
        """Show the results, and where the run directory is."""
        headings = ("task", "parent", "transfer", "related", "gate", "expert", "end to end")
        table = Table(*headings, title="Accuracy on unseen images")
        for task in outcome.tasks:
            parent = "root" if task.parent is None else str(task.parent)
            row = (f"{task.task} {task.name}", parent, task.transfer, _relatedness(task), *_accuracies(task))
            table.add_row(*row)
        table.add_section()
        table.add_row("mean", "", "", "", *_accuracies(outcome))
        self._console.print(table)
        trained = f"Trained in {outcome.train_s:.1f} s, evaluated" if outcome.train_s else "Evaluated"
        self._console.print(f"{trained} in {outcome.eval_s:.1f} s.", highlight=False)
        self._console.print(f"Run directory: {outcome.run_dir}", highlight=False)

    def say(self, text: str) -> None:
        """A line for people."""
        self._console.print(text, highlight=False, markup=False)

    def steps(self, firsts: Sequence[int], total: int) -> Iterator[int]:
        """Each of ``firsts``, with the progress of what is done of ``total``, where somebody watches stderr."""
        console = _Console(stderr=True)
        with Bar(console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("Predicting", total=total)
            for first in firsts:
                bar.update(task, completed=first)
                yield first

    def predictions(self, found: Mapping[str, Prediction]) -> None:
        """Show what each file shows."""
        table = Table("image", "class", "sure", "task", "sure", "or else", "sure")
        for file, said in found.items():
            classes = (_class(said.class_id, said.class_name), _class(said.second_class_id, said.second_class_name))
            second = "" if said.second_confidence is None else f"{said.second_confidence:.3f}"
            row = (
                file,
                classes[0],
                f"{said.confidence:.3f}",
                "none" if said.task is None else str(said.task),
                f"{said.task_confidence:.3f}",
            )
            table.add_row(*map(escape, row), escape(classes[1]), second)
        self._console.print(table)

    def shares(self, by_task: Mapping[int, tuple[int, float, float]]) -> None:
        """Show how many of a task's images were right, and which shares: sent to it, told by their class."""
        if not by_task:
            return
        table = Table("task", "images", "gate", "end to end", title="Accuracy where folders are called as classes")
        for task, (num_images, *shares) in by_task.items():
            table.add_row(str(task), str(num_images), *(f"{share:.3f}" for share in shares))
        table.add_section()
        means = [sum(shares[i] for shares in by_task.values()) / len(by_task) for i in (1, 2)]
        table.add_row("mean", "", *(f"{mean:.3f}" for mean in means))
        self._console.print(table)

    def tasks(self, lines: Sequence[TaskLine]) -> None:
        """Show what a run has learnt."""
        columns = ("task", "label", "classes", "images", "MB", "parent", "transfer", "versions", "finished (UTC)")
        table = Table(*columns)
        for line in lines:
            parent = "root" if line.parent is None else str(line.parent)
            classes = ", ".join(name or str(c) for c, name in line.classes.items())
            sizes = (str(line.num_images), f"{line.num_bytes / 1e6:.1f}", parent, line.transfer, str(line.versions))
            when = line.finished + (" (retired)" if line.is_retired else "")
            table.add_row(str(line.task), str(line.label), escape(classes), *sizes, when)
        self._console.print(table)

    def benchmarks(self, lines: Sequence[BenchmarkLine]) -> None:
        """Show the task sequences that have names."""
        table = Table("benchmark", "tasks", "classes", "images", "licence", "needs", "there")
        for line in lines:
            sizes = ("" if size is None else str(size) for size in (line.num_tasks, line.num_classes))
            table.add_row(line.name, *sizes, line.image, line.licence, line.needs, _yes(line.is_there))
        self._console.print(table)

    def backbones(self, lines: Sequence[BackboneLine]) -> None:
        """Show the backbones that have names."""
        features = ("layer", "features") if any(line.layer for line in lines) else ()
        table = Table("backbone", "million parameters", *features, "default weights", "there")
        for line in lines:
            shape = line.feature_shape or ()
            told = (line.layer or "", f"{'×'.join(map(str, shape))} = {math.prod(shape):,}") if features else ()
            row = (line.name, f"{line.num_parameters / 1e6:.1f}", *told, line.weights, _yes(line.has_weights))
            table.add_row(*map(escape, row))
        self._console.print(table)


def _yes(fact: bool | None) -> str:
    return "" if fact is None else "yes" if fact else "no"


def _class(class_id: int | None, name: str | None) -> str:
    return "" if class_id is None else f"{class_id} {name or ''}".rstrip()


def _accuracies(outcome: TaskOutcome | RunOutcome) -> list[str]:
    values = (outcome.gate_accuracy, outcome.expert_accuracy, outcome.end_to_end_accuracy)
    return [f"{value:.3f}" for value in values]


def _relatedness(task: TaskOutcome) -> str:
    if task.relatedness is None:
        return ""
    return f"{task.relatedness:.3f}" + ("" if task.near_tie is None else f" (as {task.near_tie})")
