"""The run's own clock: it stands still while nobody works on the run, and tells how long workers had nothing to do."""

from __future__ import annotations

import pytest

from distributed_eg.report.facts import StageFacts
from distributed_eg.report.timeline import timeline


def stage(worker: str, started_s: float | None, seconds: float) -> StageFacts:
    return StageFacts(0, "expert", worker, seconds, started_s)


def test_idle_time_is_what_a_worker_did_not_work_while_the_run_did() -> None:
    times = timeline([stage("a", 1000.0, 10.0), stage("b", 1005.0, 5.0), stage("a", 1015.0, 5.0)])
    assert times.starts_s == (0.0, 5.0, 15.0)
    assert times.length_s == 20.0
    assert times.idle == {"a": pytest.approx(0.25), "b": pytest.approx(0.75)}


def test_weeks_in_which_nobody_worked_are_no_idle_time() -> None:
    times = timeline([stage("a", 1000.0, 10.0), stage("b", 900_000.0, 10.0), stage("a", 900_010.0, 5.0)])
    assert times.starts_s == (0.0, 10.0, 20.0)
    assert times.pauses_s == (10.0,)
    assert times.length_s == 25.0
    assert times.idle == {"a": pytest.approx(0.4), "b": pytest.approx(1 / 3)}


def test_stages_of_earlier_versions_have_no_place_in_it() -> None:
    times = timeline([stage("a", None, 10.0)])
    assert (times.stages, times.length_s, times.idle) == ((), 0.0, {})
