"""Stages fail while their workers live: what may pass is tried once more; a run may be told to stop at a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed_eg import ClusterConfig
from distributed_eg.errors import HookError, TaskFailedError
from distributed_eg.schedule.events import Stage
from tests.faults.chaos import Chaos, Fault
from tests.helpers import INLINE, SETTINGS, hashes, tiny_benchmark, tiny_strategy

pytestmark = pytest.mark.faults


def test_memory_that_runs_out_once_is_tried_again_and_a_stage_that_raises_is_not(chaos: Chaos) -> None:
    chaos.plan(Fault("iteration 1 of epoch 0 of task 0", "memory"), Fault("relate task 1", "memory", times=100))
    with tiny_strategy(INLINE, **SETTINGS) as strategy:
        with pytest.raises(TaskFailedError) as caught:
            strategy.train(tiny_benchmark((0, 1)).train_stream)
        attempt = "\n  relate, out of memory: MemoryError: the chaos kit took it"
        assert f"task 1 (label 1) failed in relate: 2 attempts failed:{attempt}{attempt}\nTraceback" in str(
            caught.value
        )
        assert strategy.registry["task"].to_pylist() == [0]
        assert chaos.fired() == [1, 2]
        chaos.clear()
        strategy.train(tiny_benchmark((0, 1)).train_stream[1])
        found = hashes(strategy)
    with tiny_strategy(INLINE, **SETTINGS) as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
        assert hashes(strategy) == found


def test_a_run_that_stops_at_a_failure_begins_nothing_new_and_is_resumed(
    chaos: Chaos, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    chaos.plan(Fault("iteration 0 of epoch 0 of task 1", "memory", times=2))
    seen: list[tuple[int, Stage]] = []
    cluster: dict[str, Any] = {"engine": "inline", "storage": str(tmp_path / "run"), "resume": True}
    benchmark = tiny_benchmark((0, 1, 0, 2))
    with tiny_strategy(ClusterConfig(on_task_failure="stop", **cluster), **SETTINGS) as strategy:
        with pytest.raises(HookError, match="the run stopped there"):
            strategy.train(benchmark.train_stream)
        assert strategy.registry["task"].to_pylist() == [0]
    with tiny_strategy(
        ClusterConfig(**cluster),
        observer=lambda p: seen.append((p.task, p.stage)) if p.state == "kept" else None,
        **SETTINGS,
    ) as strategy:
        strategy.train(benchmark.train_stream)
        assert strategy.registry.drop_columns(["train_s", "worker"]).to_pylist() == undisturbed["registry"]
    assert set(seen) >= {(0, stage) for stage in Stage} | {(1, Stage.AUTOENCODER), (1, Stage.RELATE)}
