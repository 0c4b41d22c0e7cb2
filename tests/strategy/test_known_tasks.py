"""What a task's held-out images say of the tasks before it: one that is there already, and how far the others are."""

from __future__ import annotations

from typing import Any

import pytest

from distributed_eg import ExpertGate, ExpertGateStrategy
from distributed_eg.types import GateScore
from tests.helpers import SHAPE, tiny_benchmark, tiny_net, tiny_strategy
from tests.strategy.test_repeats import stream


def trained(score: GateScore, stream: Any, **settings: Any) -> ExpertGateStrategy:
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear", gate_score=score)
    strategy = tiny_strategy(model=model, validation_fraction=0.3, **settings)
    strategy.train(stream)
    return strategy


@pytest.mark.parametrize("score", ["residual", "shared"])
def test_a_task_that_is_there_already_is_told(score: GateScore, caplog: pytest.LogCaptureFixture) -> None:
    """Task 2 shows task 0's pattern under another label; tasks 1 and 3 are like no other."""
    caplog.set_level("INFO", "distributed_eg")
    with trained(score, tiny_benchmark((0, 1, 0, 2), train=200).train_stream) as strategy:
        rows = strategy.relatedness.to_pylist()
    shares = {(row["task"], row["candidate"]): row["known_share"] for row in rows}
    assert shares.pop((2, 0)) > 0.9
    assert [m for m in caplog.messages if "looks like" in m] == [m for m in caplog.messages if "Task 2 (label 2)" in m]
    assert set(shares.values()) == {0.0}
    distances = {(row["task"], row["candidate"]): row["shared_distance"] for row in rows}
    if score == "residual":
        assert set(distances.values()) == {None}
    else:
        nearest = distances.pop((2, 0))
        assert 0 < 10 * abs(nearest) < min(distances.values())


def test_a_reference_is_no_task(tmp_path: Any) -> None:
    reference = tiny_benchmark((5,)).train_stream[0].dataset
    with trained("shared", tiny_benchmark((0, 1)).train_stream, reference=reference) as strategy:
        of_root = [row for row in strategy.relatedness.to_pylist() if row["candidate"] is None]
    assert len(of_root) == 2
    assert {(row["known_share"], row["shared_distance"]) for row in of_root} == {(None, None)}


def test_tasks_that_all_come_again_still_say_how_sure_the_gate_may_be() -> None:
    """Their newest versions are related to the others, though they start from themselves."""
    steps = ((3, 0, 1, (0, 1)), (7, 1, 2, (2, 3)), (3, 0, 3, (0, 1)), (7, 1, 4, (2, 3)))
    with trained("shared", stream(*steps).train_stream) as strategy:
        calibration = strategy.model.calibration
        rows = [row for row in strategy.relatedness.to_pylist() if row["task"] == 1]
    assert calibration is not None
    assert calibration.error is not None
    assert [row["candidate"] for row in rows] == [0, 0]
    assert [row["chosen"] for row in rows] == [True, False]


def test_an_earlier_version_of_a_task_is_no_other_task(caplog: pytest.LogCaptureFixture) -> None:
    """With a new expert for a label that comes again: the gate no longer has the earlier version, so that nothing is
    mistaken for it, and nobody is to bring the task under the label that it has."""
    caplog.set_level("INFO", "distributed_eg")
    steps = ((3, 0, 1, (0, 1)), (7, 1, 2, (2, 3)), (3, 0, 3, (0, 1)), (7, 1, 4, (2, 3)))
    with trained("shared", stream(*steps).train_stream, on_repeat="new_expert") as strategy:
        anew, rows = strategy.model.calibration, strategy.relatedness.to_pylist()
    assert {row["known_share"] for row in rows if row["task"] == row["candidate"]} == {None}
    assert not [m for m in caplog.messages if "looks like" in m]
    with trained("shared", stream(*steps).train_stream) as strategy:
        continued = strategy.model.calibration
    assert anew is not None
    assert continued is not None
    assert anew.temp == continued.temp
    assert anew.error is not None
    assert anew.error < 0.05
