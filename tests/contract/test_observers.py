"""What an observer hears of a training, whatever the engine."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin

from distributed_eg import ClusterConfig
from distributed_eg.runtime.messages import Progress
from distributed_eg.schedule.events import Stage
from tests.helpers import INLINE, hashes, tiny_benchmark, tiny_strategy

ENGINES = [INLINE, pytest.param(ClusterConfig(num_workers=2), marks=pytest.mark.ray)]
DEADLINE_S = 60.0


class WaitsToBeHeard(SupervisedPlugin):  # type: ignore[misc]  # Avalanche's plugins have no types
    """Does not begin the third epoch of a task before somebody heard of its second: a worker is asked now and then."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def before_training_epoch(self, strategy: Any, *_: Any, **__: Any) -> None:
        """The observer leaves a file."""
        until = time.monotonic() + DEADLINE_S
        heard = self.folder / str(strategy.experience.current_experience)
        while strategy.clock.train_exp_epochs == 2 and not heard.exists():
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.parametrize("cluster", ENGINES, ids=["inline", "ray"])
def test_it_hears_of_epochs_and_losses(cluster: ClusterConfig, tmp_path: Path) -> None:
    seen: list[Progress] = []

    def observe(progress: Progress) -> None:
        seen.append(progress)
        if progress.epoch is not None and progress.epoch.number == 2:
            (tmp_path / str(progress.task)).touch()

    with tiny_strategy(cluster, observer=observe, train_epochs=3, plugins=[WaitsToBeHeard(tmp_path)]) as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
    for task in (0, 1):
        of_expert = [p for p in seen if p.task == task and p.stage is Stage.EXPERT]
        assert (of_expert[0].state, of_expert[-1].state) == ("started", "finished")
        epochs = [p.epoch for p in of_expert[1:-1] if p.epoch is not None]
        assert len(epochs) == len(of_expert) - 2
        assert {p.state for p in of_expert[1:-1]} == {"training"}
        assert {p.worker for p in of_expert} == {of_expert[0].worker}
        numbers = [epoch.number for epoch in epochs]
        assert numbers == sorted(numbers)
        assert 2 in numbers
        assert {(epoch.task, epoch.total) for epoch in epochs} == {(task, 3)}
        assert all(0 < epoch.loss < 10 for epoch in epochs)
    assert all(p.epoch is None for p in seen if p.stage is not Stage.EXPERT)


def test_what_it_draws_in_mid_training_changes_no_byte() -> None:
    def observe(progress: Progress) -> None:
        if progress.epoch is not None:
            torch.rand(3), random.random(), np.random.random()

    sums = []
    for observer in (None, observe):
        with tiny_strategy(observer=observer) as strategy:
            strategy.train(tiny_benchmark((0, 1)).train_stream)
            sums.append(hashes(strategy))
    assert sums[0] == sums[1]


@pytest.mark.parametrize("cluster", ENGINES, ids=["inline", "ray"])
def test_what_it_raises_in_mid_training_is_its_own(cluster: ClusterConfig, tmp_path: Path) -> None:
    """Not an expert's that failed."""

    def observe(progress: Progress) -> None:
        if progress.epoch is not None:
            (tmp_path / str(progress.task)).touch()
            raise ZeroDivisionError("the observer's own")

    plugins = [WaitsToBeHeard(tmp_path)]
    with tiny_strategy(cluster, observer=observe, train_epochs=3, plugins=plugins) as strategy:
        with pytest.raises(ZeroDivisionError, match="the observer's own"):
            strategy.train(tiny_benchmark((0,)).train_stream)
