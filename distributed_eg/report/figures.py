"""The report's figures as plotly.js takes them: traces and layout, colours apart, which the page's theme gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed_eg.method.calibration import Calibration
from distributed_eg.report.timeline import Timeline
from distributed_eg.store.evaluations import EvaluationRecord
from distributed_eg.types import NOBODY, TaskId

_MOST_BARS = 40
"""Tasks that are drawn as bars; of more, each is a point."""
_MOST_NUMBERS = 14
"""Tasks whose heat map has numbers in its cells."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure, and what the page needs to know of it."""

    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int
    """Pixels."""
    tasks: list[TaskId] = field(default_factory=list)
    """In the order of its categories: those that are searched for are marked."""
    axes: str = ""
    """Which of its axes, "x" and "y", tasks stand on."""


def accuracy_figure(series: Mapping[str, Sequence[float | None]], names: Sequence[str], tasks: list[TaskId]) -> Figure:
    """Accuracies, of a task each, beside each other: one trace for each of ``series``."""
    points = len(names) > _MOST_BARS
    kind: dict[str, Any] = {"type": "scatter", "mode": "markers"} if points else {"type": "bar"}
    data = [
        {**kind, "name": name, "x": list(names), "y": _rounded(values), "hovertemplate": "task %{x}: %{y:.3f}"}
        for name, values in series.items()
    ]
    layout = {
        "xaxis": {"type": "category", "title": {"text": "task"}},
        "yaxis": {"range": [0, 1.02], "title": {"text": "accuracy"}},
        "barmode": "group",
        "legend": _LEGEND,
    }
    return Figure(data, layout, 340, tasks, "x")


def relatedness_figure(order: list[TaskId], relatedness: Mapping[tuple[TaskId, TaskId], float]) -> Figure:
    """A heat map of pairs of tasks: how related the later one is to the earlier."""
    rows = [[relatedness.get((a, b), relatedness.get((b, a))) for a in order] for b in order]
    shown = [[None if value is None else round(value, 3) for value in row] for row in rows]
    hover = "tasks %{y} and %{x}: %{z:.3f}"
    least = max(-1.0, min(relatedness.values()))
    return _heat_map(order, shown, hover, "relatedness", least, titles=("task", "task"), digits=".2f")


def confusion_figure(order: list[TaskId], evaluation: EvaluationRecord) -> Figure:
    """A heat map: a row for each right task, a column for each task whose expert answered; shares of the row."""
    counts = Counter({(route.right, route.chosen): route.num_samples for route in evaluation.routes})
    outside = [NOBODY] if any(NOBODY in pair for pair in counts) else []
    known = {task for pair in counts for task in pair} | {*evaluation.tasks}
    places = [*(task for task in order if task in known), *outside]
    rows = [[counts[right, chosen] for chosen in places] for right in places]
    shares = [[round(count / (sum(row) or 1), 3) for count in row] for row in rows]
    hover = "of task %{y} to the expert of task %{x}: %{text} images (%{z:.1%})"
    titles = ("task whose expert answered", "right task")
    figure = _heat_map(places, shares, hover, "share of the task's images", 0.0, titles=titles)
    figure.data[0]["text"] = rows
    if len(places) <= _MOST_NUMBERS:
        figure.data[0]["texttemplate"] = "%{text}"
    return figure


def reliability_figure(calibration: Calibration) -> Figure:
    """How often the gate is right where it is as sure as that."""
    bins = [bin for bin in calibration.bins if bin[0]]
    largest = max(count for count, _, _ in bins)
    data: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, 1], "name": "as sure as right", "hoverinfo": "skip"},
        {
            "type": "scatter",
            "mode": "markers",
            "name": "held-out images",
            "x": _rounded([confidence for _, _, confidence in bins]),
            "y": _rounded([right for _, right, _ in bins]),
            "customdata": [count for count, _, _ in bins],
            "marker": {"size": [round(6 + 16 * (count / largest) ** 0.5, 1) for count, _, _ in bins]},
            "hovertemplate": "%{customdata} images: %{x:.3f} sure, %{y:.3f} right",
        },
    ]
    data[0]["line"] = {"dash": "dot"}
    axis = {"range": [-0.04, 1.04]}
    layout = {
        "xaxis": {**axis, "title": {"text": "mean confidence"}},
        "yaxis": {**axis, "title": {"text": "share that is right"}},
        "legend": _LEGEND,
    }
    return Figure(data, layout, 380)


def timeline_figure(times: Timeline) -> Figure:
    """A row for each worker, a bar for each stage, coloured by its kind."""
    data: list[dict[str, Any]] = []
    for kind in dict.fromkeys(stage.stage for stage in times.stages):
        own = [(start, stage) for start, stage in zip(times.starts_s, times.stages, strict=True) if stage.stage == kind]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": kind,
                "base": [round(start, 2) for start, _ in own],
                "x": [round(stage.seconds, 2) for _, stage in own],
                "y": [stage.worker for _, stage in own],
                "customdata": [stage.task for _, stage in own],
                "hovertemplate": f"task %{{customdata}}, {kind}: %{{x}} s from second %{{base}}",
            }
        )
    pauses = [
        {"type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot"}}
        for at in times.pauses_s
    ]
    layout = {
        "barmode": "overlay",
        "bargap": 0.3,
        "xaxis": {"title": {"text": "seconds of work"}, "range": [0, times.length_s * 1.01]},
        "yaxis": {"type": "category", "autorange": "reversed"},
        "shapes": pauses,
        "legend": _LEGEND,
    }
    return Figure(data, layout, 150 + 34 * min(len(times.idle), 40))


_LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


def _heat_map(
    order: list[TaskId],
    rows: Sequence[Sequence[float | None]],
    hover: str,
    what: str,
    least: float,
    *,
    titles: tuple[str, str],
    digits: str = "",
) -> Figure:
    names = [task_name(task) for task in order]
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": rows,
        "coloraxis": "coloraxis",
        "hovertemplate": f"{hover}<extra></extra>",
        "hoverongaps": False,
    }
    if digits and len(order) <= _MOST_NUMBERS:
        trace["texttemplate"] = f"%{{z:{digits}}}"
    few = len(order) <= _MOST_BARS
    axis = {"type": "category", "showgrid": False, "constrain": "domain", **({"dtick": 1} if few else {})}
    layout = {
        "xaxis": {**axis, "title": {"text": titles[0]}},
        "yaxis": {**axis, "title": {"text": titles[1]}, "autorange": "reversed"},
        "coloraxis": {
            "cmin": least,
            "cmax": 1,
            "colorbar": {"title": {"text": what, "side": "right"}, "thickness": 12},
        },
    }
    return Figure([trace], layout, min(640, 240 + 28 * len(order)), order, "xy")


def task_name(task: TaskId) -> str:
    """How a task is called on an axis."""
    return "none" if task == NOBODY else str(task)


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in values]
