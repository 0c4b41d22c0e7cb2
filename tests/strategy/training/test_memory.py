"""What a stage had in memory is gone when it ends, by itself: no cycle keeps a network until somebody collects it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from avalanche.training.plugins import LRSchedulerPlugin
from torch import nn

from distributed_eg import ClusterConfig, ExpertGate
from distributed_eg.errors import ExpertGateError
from tests.helpers import SETTINGS, SHAPE, tiny_benchmark, tiny_net, tiny_strategy

_models: list[weakref.ref[nn.Module]] = []
"""Of every task whose training began in this process."""


class Watching:
    """Sees at the beginning of each training whether those before have left anything."""

    def __init__(self, raises_in: int = -1) -> None:
        self._raises_in = raises_in

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Those before are gone; remember this one, in a cycle of the plugin's own, too."""
        assert [model() for model in _models] == [None] * len(_models)
        _models.append(weakref.ref(strategy.model))
        _models.append(weakref.ref(next(strategy.model.parameters())))
        self.strategy = strategy
        strategy.seen_by = self

    def before_forward(self, strategy: Any, **_: Any) -> None:
        """Fail where that is asked for."""
        if strategy.experience.current_experience == self._raises_in:
            raise ValueError("on purpose")


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    _models.clear()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _trained(*plugins: Any, **settings: Any) -> None:
    with tiny_strategy(ClusterConfig(engine="inline"), plugins=list(plugins), **{**SETTINGS, **settings}) as strategy:
        strategy.train(tiny_benchmark((0, 0, 1, 2)).train_stream)


@pytest.mark.parametrize("rel_thresh", [0.5, 2.0])
def test_the_networks_of_earlier_tasks_are_gone(rel_thresh: float) -> None:
    """Learning without forgetting has hooks in them, and a schedule of learning rates in the optimizer."""
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.05, momentum=0.9)
    schedule = LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(optimizer, 1))
    _trained(Watching(), schedule, rel_thresh=rel_thresh, model=model, optimizer=optimizer)
    assert len(_models) == 8
    assert [model() for model in _models] == [None] * 8


def test_a_failed_stage_leaves_nothing_either() -> None:
    """Its traceback holds every frame that it passed."""
    with pytest.raises(ExpertGateError, match="on purpose"):
        _trained(Watching(raises_in=1))
    assert len(_models) >= 4
    assert [model() for model in _models] == [None] * len(_models)
