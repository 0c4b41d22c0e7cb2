"""What of a strategy, its data and its network cannot travel, or cannot be made on a worker, is named in the error."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import cloudpickle
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import loss_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from distributed_eg import ExpertGate, ExpertGateStrategy
from distributed_eg.errors import ExpertGateError, InputError
from distributed_eg.runtime import pickling
from distributed_eg.strategy.training.packing import pack, unpack
from tests.helpers import SHAPE, task_images, tiny_benchmark, tiny_net, tiny_strategy

# As a script's own module: all that is defined here travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class NoPickle:
    """Cannot be pickled, for a reason of its own."""

    def __reduce__(self) -> Any:
        raise KeyError("its own reason")


class NotThere:
    """Can be pickled, and not be made again: its module is not there."""

    def __reduce__(self) -> Any:
        return __import__, ("not_there",)


CULPRITS: dict[type, str] = {
    NoPickle: "cannot be sent to a worker: .*KeyError: 'its own reason'",
    NotThere: "cannot be made on a worker from what was sent: .*'not_there'.*install it on all nodes",
}


class Holds(SupervisedPlugin):
    """A plugin with something."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held


class HoldingLoss(nn.Module):
    """A criterion with something."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(outputs, targets)


class HoldingStrategy(ExpertGateStrategy):
    """A subclass with something."""

    held: object = None


class Images(TensorDataset):
    """A dataset with a transform."""

    def __init__(self, transform: object) -> None:
        images, targets = task_images(0, 30, 1)
        super().__init__(images, targets)
        self.targets = targets.tolist()
        self.transform = transform


def of_plugin(held: object) -> None:
    """Trains with a plugin that holds it, behind others."""
    train({"plugins": [SupervisedPlugin(), Holds(held)]})


def of_criterion(held: object) -> None:
    """Trains with a criterion that holds it."""
    train({"criterion": HoldingLoss(held)})


def of_strategy(held: object) -> None:
    """Trains by a subclass that holds it."""
    train({"cls": HoldingStrategy}, lambda strategy: setattr(strategy, "held", held))


def of_dataset(held: object) -> None:
    """Trains on a dataset whose transform it is."""
    benchmark = task_incremental_benchmark(benchmark_from_datasets(train=[as_classification_dataset(Images(held))]))
    train({}, experiences=benchmark.train_stream)


def of_argument(held: object) -> None:
    """Trains with an argument for the loaders that reads it."""
    train({}, ffcv_args=lambda: held)


def of_network(held: object) -> None:
    """Trains from a network that got it after the model was made: what is there before must take a copy."""
    net = tiny_net()
    model = ExpertGate(SHAPE, arch=net, autoencoder="linear")
    net.held = held
    train({"model": model})


def of_reference(held: object) -> None:
    """Trains with a reference dataset whose transform it is."""
    train({"reference": Images(held)})


def train(
    settings: dict[str, Any],
    prepare: Callable[[ExpertGateStrategy], None] = lambda _: None,
    experiences: Any = None,
    **loader: Any,
) -> None:
    """One task."""
    with tiny_strategy(train_epochs=1, **settings) as strategy:
        prepare(strategy)
        strategy.train(tiny_benchmark((0,), train=30).train_stream if experiences is None else experiences, **loader)


OWNERS: dict[Callable[[object], None], tuple[str, str]] = {
    of_plugin: ("The plugin Holds ", "'held' of Holds"),
    of_criterion: ("The attribute '_criterion' of the strategy ExpertGateStrategy ", "'held' of HoldingLoss"),
    of_strategy: ("The attribute 'held' of the strategy HoldingStrategy ", ""),
    of_dataset: (r"The dataset of experience 0( \(Images\))? ", "'transform' of Images"),
    of_argument: ("An argument of train ", "'ffcv_args.__closure__.held' of dict"),
    of_network: ("The backbone ", "'held' of TinyNet"),
    of_reference: ("The reference dataset ", "'transform' of Images"),
}


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
@pytest.mark.parametrize("culprit", CULPRITS, ids=lambda culprit: culprit.__name__)
def test_whoever_holds_what_cannot_travel_is_named(owner: Callable[[object], None], culprit: type) -> None:
    name, where = OWNERS[owner]
    with pytest.raises(ExpertGateError, match=f"{name}{CULPRITS[culprit]}") as caught:
        owner(culprit())
    assert culprit is NotThere or where in str(caught.value)


def test_a_metric_that_cannot_travel_is_named_in_a_warning() -> None:
    metrics = loss_metrics(epoch=True)
    metrics[0].held = NoPickle()
    with pytest.warns(UserWarning, match=r"The metric EpochLoss stays silent.*'held' of EpochLoss.*its own reason"):
        tiny_strategy(evaluator=EvaluationPlugin(metrics, loggers=[]))


def test_a_metric_that_cannot_be_made_on_a_worker_is_named() -> None:
    metrics = loss_metrics(epoch=True)
    metrics[0].held = NotThere()
    with pytest.raises(InputError, match=r"The metric EpochLoss cannot be made on a worker .*'not_there'"):
        train({"evaluator": EvaluationPlugin(metrics, loggers=[])})


def test_what_several_plugins_share_stays_one_object() -> None:
    """Each plugin has a pickle of its own, of one pickler."""

    class Same(Holds):
        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            first, second = (plugin for plugin in strategy.plugins if isinstance(plugin, Same))
            assert first.held is second.held is strategy.held
            assert strategy.optimizer.param_groups[0]["params"][0] is first.held["parameter"]
            assert isinstance(strategy, HoldingStrategy)

    shared: dict[str, object] = {}

    def prepare(strategy: ExpertGateStrategy) -> None:
        strategy.held = shared  # type: ignore[attr-defined]
        shared["parameter"] = strategy.optimizer.param_groups[0]["params"][0]

    train({"cls": HoldingStrategy, "plugins": [Same(shared), Same(shared)]}, prepare)


def test_tensors_that_were_on_a_card_are_where_the_expert_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin and a criterion of the user's count on it; what was on the CPU stays there. "meta" is the card here."""
    held = torch.rand(3)
    with tiny_strategy(plugins=[Holds([held, nn.Parameter(held)])], criterion=partial(cross_entropy, weight=held)) as s:
        monkeypatch.setattr(pickling, "_TRAVEL", ())
        packed = pack(s, {"_driver"}, [])
        monkeypatch.undo()
        on_cpu = pack(s, {"_driver"}, [])
        for it, device in ((packed, "meta"), (on_cpu, "cpu")):
            arrived, _ = unpack(it, nn.Module(), copy.deepcopy(s.model.expert).to("meta"), Clock())
            plugin = next(plugin for plugin in arrived.plugins if isinstance(plugin, Holds))
            assert [part.device.type for part in plugin.held] == [device] * 2
            assert arrived._criterion.keywords["weight"].device.type == device


def test_a_plugin_of_a_script_may_read_names_that_torch_has_as_modules() -> None:
    class Reads(SupervisedPlugin):
        ops = "mine"

        def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            assert torch.zeros(1) + len(strategy.model.classes) == 2
            assert self.ops == "mine"
            assert not torch.backends.cudnn.benchmark

    train({"plugins": [Reads()]})


def test_a_class_of_a_script_may_read_its_strategy_and_evaluator() -> None:
    """Globals of the script, that the class's methods read: on the worker they are the worker's own."""
    script: dict[str, Any] = {"Base": HoldingStrategy, "__name__": "__main__"}
    code = """
class Mine(Base):
    def training_epoch(self, **kwargs):
        assert strategy is self and evaluator is self.evaluator
        super().training_epoch(**kwargs)
"""
    exec(code, script)

    def prepare(strategy: ExpertGateStrategy) -> None:
        script.update(strategy=strategy, evaluator=strategy.evaluator)

    train({"cls": script["Mine"]}, prepare)
