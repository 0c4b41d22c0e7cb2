"""An expert that no optimizer step has moved is no expert: refused, unless that was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin

from distributed_eg import ExpertGateStrategy
from distributed_eg.errors import InputError
from tests.helpers import tiny_benchmark, tiny_strategy


class Stops(SupervisedPlugin):
    """Stops training before its first step."""

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """At once."""
        strategy.stop_training()


class Forgets(SupervisedPlugin):
    """Gives the optimizer parameters of another network."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Before the first step."""
        strategy.optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.zeros(3))]


class NoLoop(ExpertGateStrategy):
    """A loop that does nothing."""

    def training_epoch(self, **kwargs: Any) -> None:
        """Nothing."""


class Filters(ExpertGateStrategy):
    """Leaves no sample."""

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """None of them."""
        super().train_dataset_adaptation(**kwargs)
        self.adapted_dataset = self.adapted_dataset.subset([])

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """An empty one."""
        self.dataloader = []


class ByHand(ExpertGateStrategy):
    """Moves the parameters without any optimizer."""

    def training_epoch(self, **kwargs: Any) -> None:
        """One step."""
        self.model.expert.head.weight.data -= 0.1


class AnotherOptimizer(ExpertGateStrategy):
    """Trains with an optimizer of its own."""

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Made from the model of the moment."""
        super().check_model_and_optimizer(**kwargs)
        self.optimizer = torch.optim.Adam(self.model.parameters())


@pytest.mark.parametrize(
    ("settings", "loader_args"),
    [
        ({"train_mb_size": 64}, {"drop_last": True}),
        ({"plugins": [Stops()]}, {}),
        ({"plugins": [Forgets()]}, {}),
        ({"cls": NoLoop}, {}),
        ({"cls": Filters}, {}),
    ],
    ids=["drop_last", "stopped", "other parameters", "no loop", "no samples"],
)
def test_nothing_learnt_is_refused(settings: dict[str, Any], loader_args: dict[str, Any]) -> None:
    with tiny_strategy(**settings) as strategy:
        with pytest.raises(InputError, match=r"task 0 \(label 0\) learnt nothing: no optimizer step"):
            strategy.train(tiny_benchmark((0,), train=40).train_stream, **loader_args)
        assert strategy.registry.num_rows == 0


@pytest.mark.parametrize("cls", [ByHand, AnotherOptimizer])
def test_who_learns_otherwise_learns(cls: type[ExpertGateStrategy]) -> None:
    with tiny_strategy(cls=cls) as strategy:
        strategy.train(tiny_benchmark((0,), train=40).train_stream)
        assert strategy.registry.num_rows == 1


def test_no_epochs_are_what_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with tiny_strategy(train_epochs=0) as strategy:
        strategy.train(tiny_benchmark((0,), train=40).train_stream)
        assert strategy.registry.num_rows == 1
    assert "is not trained: train_epochs=0" in caplog.text


def test_a_rate_of_zero_is_a_users_right() -> None:
    with tiny_strategy() as strategy:
        strategy.optimizer.param_groups[0]["lr"] = 0.0
        strategy.train(tiny_benchmark((0,), train=40).train_stream)
        assert strategy.registry.num_rows == 1
