"""The page: sections of HTML, figures as JSON, and plotly.js, all in one text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from distributed_eg.errors import InputError
from distributed_eg.report import figures, markup
from distributed_eg.report.facts import RunFacts, TaskFacts
from distributed_eg.report.figures import Figure
from distributed_eg.report.markup import Cell
from distributed_eg.report.order import clustered
from distributed_eg.report.timeline import timeline
from distributed_eg.store.evaluations import EvaluatedExperience, EvaluationRecord
from distributed_eg.types import NEAR_TIE, NOBODY, TaskId

NO_EVALUATION = "No evaluation of this run is recorded: distributed-eg eval, or strategy.eval, records one."

_SERIES: dict[str, Callable[[EvaluatedExperience], float]] = {
    "gate": lambda experience: experience.gate_accuracy,
    "expert": lambda experience: experience.expert_accuracy,
    "end to end": lambda experience: experience.end_to_end_accuracy,
}


def plotly_js() -> str:
    """The library that draws the figures.

    Raises:
        InputError: the package that has it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(
            "A report's figures are drawn by plotly, which is not installed: pip install 'distributed-eg[report]'."
        ) from error
    return str(get_plotlyjs())


def page_of(runs: Sequence[RunFacts], library: str) -> str:
    """The page about one run, or several side by side; ``library`` is plotly.js."""
    drawn: dict[str, Figure] = {}

    def draw(figure: Figure) -> str:
        drawn[f"figure-{len(drawn)}"] = figure
        return f'<div class="plot" id="figure-{len(drawn) - 1}" style="min-height: {figure.height}px"></div>'

    names = _names_of(runs)
    title = f"Expert Gate: {', '.join(names)}"
    sections = [_side_by_side(names, runs, draw)] if len(runs) > 1 else []
    sections += [_run(name, run, draw) for name, run in zip(names, runs, strict=True)]
    room = files("distributed_eg.report")
    style, script = ((room / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # Inside a script element only "<" could end it.
    data = json.dumps({name: asdict(figure) for name, figure in drawn.items()}, separators=(",", ":"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{_POLICY}<link rel="icon" href="data:,">'
        f"<title>{markup.text(title)} – distributed-eg</title><style>{style}</style></head><body>"
        f"<header><h1>{markup.text(title)}</h1></header>{_SEARCH}<main>{''.join(sections)}</main>"
        f'<script type="application/json" id="figures">{data.replace("<", chr(92) + "u003c")}</script>'
        f"<script>{library}</script><script>{script}</script></body></html>\n"
    )


_POLICY = (  # nothing is fetched, nor sent anywhere
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:\">"
)

_SEARCH = (
    '<search class="search"><div><input id="search" type="search" placeholder="Find tasks: number, label or class" '
    'aria-label="Find tasks"><span id="found" class="faint" role="status"></span></div></search>'
)

Draw = Callable[[Figure], str]


def _side_by_side(names: Sequence[str], runs: Sequence[RunFacts], draw: Draw) -> str:
    """Headline figures and accuracies of several runs."""
    headline = [_headline(run) for run in runs]
    columns = list(dict.fromkeys(name for values in headline for name in values))
    lines = [[name, *(values.get(c) for c in columns)] for name, values in zip(names, headline, strict=True)]
    parts = ["<h2>Side by side</h2>", markup.table(["run", *columns], lines)]
    by_label = [{label: e for e in _experiences(run.newest) for label in e.labels[:1]} for run in runs]
    labels = sorted({label for of_run in by_label for label in of_run})
    if not labels:
        return "".join([*parts, f"<p>{NO_EVALUATION}</p>"])
    series: dict[str, list[float | None]] = {}
    for name, of_run in zip(names, by_label, strict=True):
        for what, value in _SERIES.items():
            series[f"{name}: {what}"] = [value(of_run[label]) if label in of_run else None for label in labels]
    end_to_end = {name: series[f"{name}: end to end"] for name in names}
    figure = figures.accuracy_figure(end_to_end, [str(label) for label in labels], [])
    figure.layout["xaxis"]["title"]["text"] = "task label"
    rows = [[label, *(values[i] for values in series.values())] for i, label in enumerate(labels)]
    parts += ["<h3>End-to-end accuracy by task label</h3>", draw(figure)]
    headings = ["label", *series]
    inside = markup.csv_link("runs.csv", headings, rows) + markup.table(headings, rows)
    return "".join([*parts, markup.details("All accuracies", inside)])


def _run(name: str, run: RunFacts, draw: Draw) -> str:
    """Everything about one run."""
    order = clustered([task.task for task in run.tasks], run.relatedness)
    parts = [f"<h2>{markup.text(name)}</h2>"]
    parts.append(f'<p class="faint">Run {markup.text(run.record.run_id)}, <code>{markup.text(run.shown)}</code></p>')
    parts += [markup.tiles(_headline(run)), *_measured(run, order, draw)]
    parts.append("<h3>How sure the gate may be</h3>")
    calibration = run.calibration
    if calibration.error is None:
        parts.append("<p>Not known: no held-out images were asked at the gate's temperature.</p>")
    else:
        parts.append(
            f'<p class="faint">Expected calibration error {calibration.error:.3f} at temperature {calibration.temp:.4g}'
            ", on images that were held out of training; points grow with their number.</p>"
        )
        parts.append(draw(figures.reliability_figure(calibration)))
    parts.append("<h3>Who came from whom</h3>")
    ties = sum(bool(task.ties) for task in run.tasks)
    tied = f"; ≈ marks the {ties} that another task was as related to, but for {NEAR_TIE}" if ties else ""
    parts.append(
        '<p class="faint">Each expert starts from the most related earlier one: without forgetting (LwF), or '
        f"fine-tuned. The number is the relatedness{tied}.</p>{markup.tree(run.tasks)}"
    )
    if run.relatedness:
        parts.append(
            '<h3>Relatedness</h3><p class="faint">Of two tasks, how related the later one was to the earlier; related '
            "tasks stand together.</p>"
        )
        parts.append(draw(figures.relatedness_figure(order, run.relatedness)))
    return "".join([*parts, _work(run, draw), _about(run)])


def _measured(run: RunFacts, order: list[TaskId], draw: Draw) -> list[str]:
    """What the newest evaluation came to, and which others there are."""
    evaluation = run.newest
    if evaluation is None:
        return [f"<h3>Accuracy</h3><p>{NO_EVALUATION}</p>"]
    experiences = evaluation.experiences
    of = [_task_of(run, experience) for experience in experiences]
    names = _unique([_name_of(e, task) for e, task in zip(experiences, of, strict=True)])
    series = {name: [value(e) for e in experiences] for name, value in _SERIES.items()}
    headings = ["task", "label", "classes", "stream", "images", *series, "unknown"]
    rows: list[list[Cell]] = []
    for i, (e, task) in enumerate(zip(experiences, of, strict=True)):
        classes = "" if task is None else ", ".join(task.classes)
        accuracies = (values[i] for values in series.values())
        rows.append([names[i], ", ".join(map(str, e.labels)), classes, e.stream, e.num_samples, *accuracies])
        rows[-1].append(e.unknown_share)
    places = [NOBODY if task is None else task.task for task in of]
    since = [task.task for task in run.tasks if task.task not in evaluation.tasks and not task.is_retired]
    lag = f" Trained since: tasks {', '.join(map(str, since))}." if since else ""
    parts = [
        f'<h3>Accuracy per task</h3><p class="faint">Evaluation {evaluation.number}, {markup.text(evaluation.finished)}'
        f", version {markup.text(evaluation.version or 'unknown')}, seed {evaluation.seed}.{lag}</p>",
        draw(figures.accuracy_figure(series, names, places)),
        markup.csv_link("accuracy.csv", headings, rows),
        markup.table(headings, rows, of),
        "<h3>Where the gate sent the images</h3>",
        draw(figures.confusion_figure(order, evaluation)),
    ]
    if len(run.evaluations) > 1:
        lines: list[list[Cell]] = []
        for each in reversed(run.evaluations):
            streams = ", ".join(sorted({experience.stream for experience in each.experiences}))
            lines.append([each.number, each.finished, streams, len(each.tasks), *_means(each).values()])
        headings = ["evaluation", "finished", "streams", "tasks", *_SERIES]
        parts.append(markup.details(f"All {len(lines)} evaluations", markup.table(headings, lines)))
    return parts


def _work(run: RunFacts, draw: Draw) -> str:
    """Who did what, when, and how long nobody had anything to do."""
    parts = ["<h3>Workers and stages</h3>"]
    times = timeline(run.stages)
    if times.stages:
        parts.append(draw(figures.timeline_figure(times)))
    if len(times.stages) < len(run.stages):
        missing = len(run.stages) - len(times.stages)
        parts.append(f"<p>Of {missing} of {len(run.stages)} stages it is not known when they began.</p>")
    workers = sorted({stage.worker for stage in run.stages})
    rows: list[list[Cell]] = []
    for worker in workers:
        own = [stage for stage in run.stages if stage.worker == worker]
        idle = times.idle.get(worker)
        rows.append([worker, len(own), sum(stage.seconds for stage in own), idle])
    return "".join([*parts, markup.table(["worker", "stages", "busy, s", "share idle"], rows)])


def _about(run: RunFacts) -> str:
    """Settings, versions, hashes."""
    record = run.record
    settings = {"method": record.method, "threads": record.threads, "backbone": record.backbone}
    lines = [*_flat(settings), *_flat({"settings": record.settings})]
    around = [*_flat({"libraries": record.libraries}), *_flat({"machine": record.machine})]
    hashes: list[list[Cell]] = [
        [task.task, task.label, task.autoencoder_sha256, task.expert_sha256, task.num_bytes] for task in run.tasks
    ]
    headings = ["task", "label", "autoencoder", "expert", "bytes"]
    return (
        "<h3>What it was made with</h3>"
        + markup.details("Settings", markup.table(["setting", "value"], lines))
        + markup.details("Libraries and machine", markup.table(["what", "version or kind"], around))
        + markup.details("Hashes of weights (SHA-256)", markup.table(headings, hashes, run.tasks))
    )


def _headline(run: RunFacts) -> dict[str, Cell]:
    means: dict[str, Cell] = {} if run.newest is None else {f"{n} accuracy": v for n, v in _means(run.newest).items()}
    return {
        "tasks": len(run.tasks),
        **means,
        "calibration error": run.calibration.error,
        "classes": sum(len(task.classes) for task in run.tasks),
        "training images": sum(task.num_images for task in run.tasks),
        "weights": f"{sum(task.num_bytes for task in run.tasks) / 1e6:,.1f} MB",
        "stages took": f"{sum(stage.seconds for stage in run.stages):,.0f} s",
        "workers": len({stage.worker for stage in run.stages}),
    }


def _means(evaluation: EvaluationRecord) -> dict[str, float]:
    """Means over the experiences, as the command prints them."""
    experiences = evaluation.experiences
    return {name: sum(map(value, experiences)) / len(experiences) for name, value in _SERIES.items()}


def _experiences(evaluation: EvaluationRecord | None) -> Sequence[EvaluatedExperience]:
    return () if evaluation is None else evaluation.experiences


def _task_of(run: RunFacts, experience: EvaluatedExperience) -> TaskFacts | None:
    return run.by_label.get(experience.labels[0]) if len(experience.labels) == 1 else None


def _name_of(experience: EvaluatedExperience, task: TaskFacts | None) -> str:
    return f"{experience.stream} {experience.index}".strip() if task is None else str(task.task)


def _names_of(runs: Sequence[RunFacts]) -> list[str]:
    """Short names of runs: the last part of their directories."""
    return _unique([run.shown.rstrip("/").rpartition("/")[2] or run.record.run_id for run in runs])


def _unique(names: Sequence[str]) -> list[str]:
    """Names of which none is there twice: what comes again gets a number."""
    return [name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[list[Cell]]:
    """Nested values as lines of a dotted name and a text."""
    lines: list[list[Cell]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            lines += _flat(value, f"{prefix}{name}.")
        else:
            lines.append([f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)])
    return lines
