"""Pieces of HTML: whatever comes from a run is escaped here."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from urllib.parse import quote

from distributed_eg.report.facts import TaskFacts
from distributed_eg.types import TaskId

Cell = str | int | float | None
"""Floats are shown with three digits; None as nothing."""


def text(value: Cell) -> str:
    """A value as people read it."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def tiles(values: Mapping[str, Cell]) -> str:
    """Headline figures; those without a value are left out."""
    items = [
        f"<div><dt>{escape(n)}</dt><dd>{text(value)}</dd></div>" for n, value in values.items() if value is not None
    ]
    return f'<dl class="tiles">{"".join(items)}</dl>'


def table(headings: Sequence[str], rows: Iterable[Sequence[Cell]], of: Sequence[TaskFacts | None] | None = None) -> str:
    """A table that scrolls by itself; ``of``: the task of each row, by which it is found."""
    lines = list(rows)
    numeric = [all(not isinstance(row[i], str) for row in lines) for i in range(len(headings))]
    kinds = [' class="number"' if is_numeric else "" for is_numeric in numeric]
    head = "".join(f"<th{kind}>{escape(heading)}</th>" for kind, heading in zip(kinds, headings, strict=True))
    body = [
        f"<tr{'' if task is None else found_by(task)}>"
        + "".join(f"<td{kind}>{text(value)}</td>" for kind, value in zip(kinds, row, strict=True))
        + "</tr>"
        for row, task in zip(lines, of or [None] * len(lines), strict=True)
    ]
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="wide" tabindex="0"><table>{inside}</table></div>'


def csv_link(file: str, headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A link that saves a table as comma-separated values."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows([headings, *rows])
    data = quote(sink.getvalue())
    return f'<p><a download="{escape(file)}" href="data:text/csv;charset=utf-8,{data}">Download as CSV</a></p>'


def details(summary: str, inside: str) -> str:
    """What is seen once somebody asks for it."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def found_by(task: TaskFacts) -> str:
    """The attributes of an element that a search finds: by number, label and class names."""
    words = " ".join([f"task {task.task} label {task.label}", *task.classes]).lower()
    return f' data-task="{task.task}" data-search="{escape(words)}"'


def tree(tasks: Sequence[TaskFacts]) -> str:
    """Who came from whom, as nested lists: how, how related, and who else would have been as good."""
    children: dict[TaskId | None, list[TaskFacts]] = {}
    for task in tasks:
        children.setdefault(task.parent, []).append(task)
    parts = ['<div class="tree" tabindex="0"><ul><li>pretrained root']
    open_lists = [iter(children.get(None, []))]
    parts.append("<ul>")
    while open_lists:
        try:
            task = next(open_lists[-1])
        except StopIteration:
            open_lists.pop()
            parts.append("</ul></li>")
            continue
        parts.append(f"<li><span{found_by(task)}>{_edge(task)} <b>{task.task}</b> {_names(task)}</span>{_ties(task)}")
        if task.task in children:
            parts.append("<ul>")
            open_lists.append(iter(children[task.task]))
        else:
            parts.append("</li>")
    return "".join([*parts, "</ul></div>"])


_WAYS = {"lwf": "LwF", "finetune": "fine-tuned", "fresh": "first", "continue": "continued"}


def _edge(task: TaskFacts) -> str:
    related = "" if task.relatedness is None else f" {task.relatedness:.3f}"
    way = _WAYS.get(task.transfer, task.transfer)
    return f'<span class="edge {escape(task.transfer)}">{escape(way)}{related}</span>'


def _names(task: TaskFacts) -> str:
    notes = [f"{task.num_versions} versions"] * (task.num_versions > 1) + ["retired"] * task.is_retired
    return escape(", ".join(task.classes)) + "".join(f' <span class="faint">({note})</span>' for note in notes)


def _ties(task: TaskFacts) -> str:
    others = ", ".join("the root" if other is None else str(other) for other in task.ties)
    return f' <span class="tie">≈ as related to {others}</span>' if others else ""
