"""Workers die, hang, run out of memory: only what they ran is run again, and the bytes are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_eg import ClusterConfig
from distributed_eg.errors import TaskFailedError
from distributed_eg.runtime.dispatcher import Progress
from distributed_eg.runtime.engine import Ended
from distributed_eg.runtime.ray_backend.engine import RayEngine
from tests.faults.chaos import Chaos, Fault, reports
from tests.faults.conftest import train_and_evaluate
from tests.helpers import SETTINGS, tiny_benchmark, tiny_strategy

pytestmark = [pytest.mark.ray, pytest.mark.faults]

CLUSTER = ClusterConfig(num_workers=2, gpus_per_worker=0, checkpoint_every_s=0)


@pytest.fixture
def chaos(ray_local: Path) -> Iterator[Chaos]:
    """The kit, in every process of the suite's Ray."""
    kit = Chaos(ray_local)
    kit.clear()
    yield kit
    kit.clear()


def test_a_worker_is_killed_at_every_kind_of_point(chaos: Chaos, undisturbed: dict[str, Any]) -> None:
    """Before and after a seal, in mid-relate, in mid-epoch, before its report, and during the evaluation. An expert
    that was killed in its second epoch goes on from its checkpoint on another worker: its first is not run again."""
    chaos.plan(
        Fault("before seal tasks/00000/autoencoder-*", "kill"),
        Fault("relate task 2", "kill"),
        Fault("iteration 2 of epoch 1 of task 0", "kill"),
        Fault("after seal tasks/00003/expert-*", "kill"),
        Fault("report features of task 1", "kill"),
        Fault("evaluate", "kill", nth=2),
        Fault("iteration 0 of epoch 0 of task 0", "delay", times=10),
    )
    assert train_and_evaluate(CLUSTER) == undisturbed
    assert chaos.fired() == [1] * 7


def test_an_accelerator_breaks(chaos: Chaos, undisturbed: dict[str, Any]) -> None:
    """Nothing more can be computed in a process whose card reported an error: another one takes its place, and no other
    task suffers. A card that was just freed may refuse a new process once."""
    chaos.plan(
        Fault("iteration 1 of epoch 1 of task 0", "accelerator"),
        Fault("relate task 2", "accelerator"),
        Fault("evaluate", "accelerator", nth=2),
        Fault("start", "accelerator"),
    )
    assert train_and_evaluate(CLUSTER) == undisturbed
    chaos.require_fired()


def test_reports_that_come_twice_late_or_never(chaos: Chaos, undisturbed: dict[str, Any]) -> None:
    """Every stage's report is delivered twice, the second time late; one never comes, and its worker is ended when the
    stage is overdue."""
    chaos.plan(Fault("report autoencoder of task 1", "hang"), Fault("report features of task 2", "delay", seconds=1))
    held: list[Any] = []

    def change(arrived: list[Any]) -> list[Any]:
        late, held[:] = list(held), [report for report in arrived if isinstance(report, Ended)]
        return [*arrived, *late]

    with reports(RayEngine, change):
        found = train_and_evaluate(
            ClusterConfig(num_workers=2, gpus_per_worker=0, checkpoint_every_s=0, stage_timeout_s=8)
        )
    assert found == undisturbed
    chaos.require_fired()


def test_a_poisonous_task_fails_alone_with_every_attempts_cause(chaos: Chaos, undisturbed: dict[str, Any]) -> None:
    """Task 1 kills whoever trains it. Its budget ends that; tasks that do not need it are what they always are."""
    chaos.plan(Fault("iteration 0 of epoch 0 of task 1", "kill", times=100))
    seen: list[Progress] = []
    with tiny_strategy(CLUSTER, observer=seen.append, **SETTINGS) as strategy:
        with pytest.raises(TaskFailedError) as caught:
            strategy.train(tiny_benchmark((0, 1, 0, 2)).train_stream)
        expected = [row for row in undisturbed["registry"] if row["task"] != 1]
        assert strategy.registry.drop_columns(["train_s", "worker"]).to_pylist() == expected
    message = str(caught.value)
    assert message.count("\n  expert, worker lost: ") == 4
    assert "1 task(s) were not trained; all others are committed. Without ClusterConfig(storage=…) " in message
    assert chaos.fired() == [4]
