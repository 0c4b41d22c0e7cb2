"""What a run's driver tells Ray's metrics, which every node exports for Prometheus and cluster/grafana-dashboard.json
shows. Labels are few: a run, a state, a stage."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from distributed_eg.runtime.messages import Evaluated, Progress
from distributed_eg.schedule.events import Stage
from distributed_eg.types import TaskId

_STATES = ("running", "waiting", "failed", "committed")
"""What becomes of a task that has begun: a stage of it runs; the next one has not begun; the last attempt failed, and
there was none since; sealed."""
_BOUNDARIES_S = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0]


class Metrics:
    """One run's metrics; Ray puts ``ray_`` in front of their names, and ``_total`` behind those of counters."""

    def __init__(self, run_id: str) -> None:
        run, own = ("run",), {"run": run_id}
        self._tasks = Gauge("distributed_eg_tasks", "Tasks that have begun, by state.", (*run, "state"))
        self._tasks.set_default_tags(own)
        self._stage_s = Histogram(
            "distributed_eg_stage_seconds", "How long stages took that ended well.", _BOUNDARIES_S, (*run, "stage")
        )
        self._stage_s.set_default_tags(own)
        self._retries = Counter("distributed_eg_stage_retries", "Stages that were begun again.", (*run, "stage"))
        self._retries.set_default_tags(own)
        self._checkpoints = Counter("distributed_eg_checkpoints", "Checkpoints of experts that are trained.", run)
        self._checkpoints.set_default_tags(own)
        self._samples = Counter("distributed_eg_gate_samples", "Samples that the gate has routed.", run)
        self._samples.set_default_tags(own)
        self._rate = Gauge("distributed_eg_gate_samples_per_second", "Of the last evaluation, its start included.", run)
        self._rate.set_default_tags(own)
        self._state_of: dict[TaskId, str] = {}
        self._count = dict.fromkeys(_STATES, 0)
        """Of tasks in each state."""
        for state in _STATES:
            self._tasks.set(0, {"state": state})
        self._failed: set[tuple[TaskId, Stage]] = set()
        """Stages whose last attempt failed."""

    def observe(self, seen: Progress | Evaluated) -> None:
        """Count what the driver saw."""
        if isinstance(seen, Evaluated):
            if seen.num_samples:
                self._samples.inc(seen.num_samples)
                self._rate.set(seen.num_samples / seen.seconds)
            return
        what = seen.task, seen.stage
        if seen.state == "failed":
            self._failed.add(what)
        elif seen.state == "started" and what in self._failed:
            self._failed.remove(what)
            self._retries.inc(tags={"stage": seen.stage.value})
        if seen.state == "finished":
            self._stage_s.observe(seen.seconds, {"stage": seen.stage.value})
        if seen.num_checkpoints:
            self._checkpoints.inc(seen.num_checkpoints)
        # One more, one less: what an event costs does not grow with the number of tasks.
        before, now = self._state_of.get(seen.task), _state(seen)
        self._state_of[seen.task] = now
        for state, change in (*([(before, -1)] if before is not None else []), (now, 1)):
            self._count[state] += change
            self._tasks.set(self._count[state], {"state": state})


def _state(seen: Progress) -> str:
    if seen.state in ("finished", "kept"):
        return "committed" if seen.stage is Stage.EXPERT else "waiting"
    return "running" if seen.state == "started" else "failed"
