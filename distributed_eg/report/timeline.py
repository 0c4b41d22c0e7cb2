"""When workers did what: stages on the run's own clock, which stands still while nobody works on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distributed_eg.report.facts import StageFacts

_PAUSE_S = 600.0
"""A run that nobody works on for longer was not running."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Stages whose start is known, in order of it."""

    stages: tuple[StageFacts, ...]
    starts_s: tuple[float, ...]
    """Of each, on the run's clock."""
    pauses_s: tuple[float, ...]
    """Where that clock stood still."""
    length_s: float
    idle: dict[str, float]
    """Of each worker, the share of the periods it worked in that it did nothing."""


def timeline(stages: Sequence[StageFacts]) -> Timeline:
    """Lay out the stages whose start is known."""
    timed = sorted([(s.started_s, s) for s in stages if s.started_s is not None], key=lambda pair: pair[0])
    starts: list[float] = []
    pauses: list[float] = []
    busy: dict[tuple[str, int], float] = {}
    ends = [0.0]  # of each period, on the run's clock
    latest_s = timed[0][0] if timed else 0.0
    shift_s = latest_s
    for started_s, stage in timed:
        if started_s - latest_s > _PAUSE_S:
            pauses.append(latest_s - shift_s)
            shift_s += started_s - latest_s
            ends.append(ends[-1])
        starts.append(started_s - shift_s)
        latest_s = max(latest_s, started_s + stage.seconds)
        ends[-1] = latest_s - shift_s
        key = stage.worker, len(pauses)
        busy[key] = busy.get(key, 0.0) + stage.seconds
    lengths = [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]
    idle: dict[str, float] = {}
    for worker in sorted({worker for worker, _ in busy}):
        periods = [period for of, period in busy if of == worker]
        there_s = sum(lengths[period] for period in periods)
        idle[worker] = max(0.0, 1 - sum(busy[worker, period] for period in periods) / there_s) if there_s else 0.0
    return Timeline(tuple(stage for _, stage in timed), tuple(starts), tuple(pauses), ends[-1], idle)
