"""What a person sees: live progress per task, then the table of results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from distributed_eg.cli.outcome import RunOutcome, TaskOutcome
from distributed_eg.masking import masked
from distributed_eg.runtime.messages import Progress
from distributed_eg.schedule.events import Stage


class _Console(Console):
    """Rich's, but one that leaves a reader who went away to ``main``."""

    def on_broken_pipe(self) -> None:
        """Called where the error is handled: let it pass on."""
        raise


class Display:
    """Draws on a terminal; elsewhere prints one line for each stage that ends."""

    def __init__(self, *, to_stderr: bool) -> None:
        self._console = _Console(stderr=to_stderr, soft_wrap=True)
        self._names: Sequence[str] = ()
        self._cells: dict[tuple[int, Stage], str] = {}
        self._live: Live | None = None

    @contextmanager
    def training(self, names: Sequence[str]) -> Iterator[None]:
        """Show the progress of the tasks called ``names``."""
        self._names = names
        self._console.print(f"Training {len(names)} tasks …")
        if not self._console.is_terminal:
            yield
            return
        with Live(self._progress_table(), console=self._console, refresh_per_second=4) as self._live:
            yield

    def progress(self, progress: Progress) -> None:
        """Take a stage's start or end in."""
        cells = {
            "started": f"[yellow]{progress.worker} …",
            "finished": f"[green]{progress.seconds:.1f} s",
            "kept": "[green]kept",
            "failed": "[red]failed",
        }
        self._cells[progress.task, progress.stage] = cells[progress.state]
        if self._live is not None:
            self._live.update(self._progress_table())
        elif progress.state != "started":
            how = {"finished": "", "failed": " failed"}.get(progress.state)
            told = f"{how}, {progress.seconds:.1f} s on {progress.worker}" if how is not None else " kept"
            line = f"task {progress.task} {self._names[progress.task]}: {progress.stage.value}{told}"
            self._console.print(line, highlight=False)

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
        self._console.print(
            f"Trained in {outcome.train_s:.1f} s, evaluated in {outcome.eval_s:.1f} s.", highlight=False
        )
        self._console.print(f"Run directory: {outcome.run_dir}", highlight=False)

    def _progress_table(self) -> Table:
        table = Table("task", *(stage.value for stage in Stage))
        for task, name in enumerate(self._names):
            table.add_row(f"{task} {name}", *(self._cells.get((task, stage), "") for stage in Stage))
        return table


def _accuracies(outcome: TaskOutcome | RunOutcome) -> list[str]:
    values = (outcome.gate_accuracy, outcome.expert_accuracy, outcome.end_to_end_accuracy)
    return [f"{value:.3f}" for value in values]


def _relatedness(task: TaskOutcome) -> str:
    if task.relatedness is None:
        return ""
    return f"{task.relatedness:.3f}" + ("" if task.near_tie is None else f" (as {task.near_tie})")
