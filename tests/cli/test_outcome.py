"""What a run came to, where its tasks have several versions."""

from __future__ import annotations

from typing import Any

from avalanche.benchmarks.scenarios.generic_scenario import CLScenario

from distributed_eg.benchmarks.benchmark import Benchmark
from distributed_eg.cli.outcome import TaskOutcome, outcome_of
from tests.helpers import SHAPE, tiny_benchmark, tiny_strategy


def outcomes(strategy: Any, scenario: CLScenario) -> list[TaskOutcome]:
    labels = tuple(range(len(scenario.test_stream)))
    names = tuple(f"task {label}" for label in labels)
    benchmark = Benchmark("tiny", scenario, names, names, SHAPE, {}, None, labels)
    metrics = strategy.eval(scenario.test_stream)
    return outcome_of(strategy, metrics, benchmark, 1.0, 1.0).tasks


def test_of_a_task_that_was_updated_the_version_that_chose_a_parent_tells() -> None:
    """Later versions start from themselves, but are related to others, too: none of those is chosen, or a tie."""
    scenario = tiny_benchmark((0, 1, 2, 0))
    with tiny_strategy() as strategy:
        strategy.train(scenario.train_stream)
        before = outcomes(strategy, scenario)
        strategy.update(scenario.train_stream[0])  # the first task: it never had a parent
        strategy.update(tiny_benchmark((0, 1, 0, 0), train=60).train_stream[2])  # now like tasks 0 and 3
        after = outcomes(strategy, scenario)
    assert [task.transfer for task in after] == ["continue", before[1].transfer, "continue", before[3].transfer]
    for then, now in zip(before, after, strict=True):
        assert (now.relatedness, now.near_tie) == (then.relatedness, then.near_tie)
