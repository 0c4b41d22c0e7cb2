"""Losses that are not finite are found soon, named by their batch, and read rarely: each reading waits for a card."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_eg import ClusterConfig
from distributed_eg.errors import DivergedError
from distributed_eg.strategy.training import trainer
from distributed_eg.strategy.training.checkpoint import Checkpointing
from tests.helpers import SETTINGS, tiny_benchmark, tiny_strategy

_computing: list[bool] = []
"""Whether a batch is being computed; plugins are copied on their way."""


class Readings(TorchDispatchMode):
    """Counts values that Python asks a tensor for while a batch is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += bool(_computing) and func.overloadpacket.__name__ == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


class Watching:
    """Tells when a batch has been read, and when it has been computed."""

    def before_forward(self, *_: Any, **__: Any) -> None:
        """The batch has been read."""
        _computing.append(True)

    def after_training_iteration(self, *_: Any, **__: Any) -> None:
        """The next is read."""
        _computing.clear()


@pytest.mark.parametrize("rel_thresh", [0.5, 2.0])
def test_a_batch_is_computed_without_a_reading(rel_thresh: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With learning without forgetting, and without."""
    plain = {"evaluator": EvaluationPlugin(loggers=[]), "plugins": [Watching()], "train_mb_size": 2, "train_epochs": 2}
    read = Counter[int]()
    whole = trainer._ExpertRules.require_finite
    monkeypatch.setattr(
        trainer._ExpertRules, "require_finite", lambda rules: (read.update([len(rules._unread)]), whole(rules))[1]
    )
    with tiny_strategy(ClusterConfig(engine="inline"), **{**SETTINGS, "rel_thresh": rel_thresh, **plain}) as strategy:
        with Readings() as readings:
            strategy.train(tiny_benchmark((0, 0), train=80).train_stream)
    assert readings.count == 0
    assert max(read) == 16


class InfiniteFrom:
    """Makes the loss infinite from a batch of an epoch on."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.at = epoch, batch

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Before it is used."""
        if (strategy.clock.train_exp_epochs, strategy.clock.train_epoch_iterations) >= self.at:
            strategy.loss = strategy.loss * math.inf


@pytest.mark.parametrize("at", [(0, 0), (0, 17), (1, 35), (2, 3)])
def test_the_batch_that_diverged_is_named_and_its_epoch_ends_in_no_checkpoint(
    at: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 36 batches an epoch, whichever are read together; the first that diverged is told."""
    ended: list[int] = []
    monkeypatch.setattr(Checkpointing, "epoch_ended", lambda _, epochs: ended.append(epochs))
    cluster = ClusterConfig(engine="inline", checkpoint_every_s=0)
    plain = {"plugins": [InfiniteFrom(*at)], "train_mb_size": 2, "train_epochs": 3}
    with (
        tiny_strategy(cluster, **plain) as strategy,
        pytest.raises(DivergedError, match=f"epoch {at[0]}, batch {at[1]},"),
    ):
        strategy.train(tiny_benchmark((0,), train=80).train_stream)
    assert ended == list(range(1, 1 + at[0]))


class Refuses:
    """A criterion that takes no outputs that are not finite."""

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(outputs).all()):
            raise ValueError("outputs must be finite")
        return torch.nn.functional.cross_entropy(outputs, targets) * 1e39


def test_user_s_code_that_stumbles_over_a_divergence_is_not_blamed() -> None:
    with tiny_strategy(
        ClusterConfig(engine="inline"), criterion=Refuses(), train_mb_size=2, train_epochs=2
    ) as strategy:
        with pytest.raises(DivergedError, match="epoch 0, batch 0, at"):
            strategy.train(tiny_benchmark((0,), train=80).train_stream)
