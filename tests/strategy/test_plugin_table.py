"""Every plugin that Avalanche has: it works, it starts empty with each expert, or it is refused before training."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.core import BasePlugin, SupervisedPlugin
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models.packnet import PackNetPlugin
from avalanche.training import plugins as avalanche
from avalanche.training.losses import ICaRLLossPlugin, MaskedCrossEntropy
from avalanche.training.plugins import EarlyStoppingPlugin, EvaluationPlugin, LRSchedulerPlugin
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from distributed_eg import ExpertGate, ExpertGateStrategy
from distributed_eg.errors import InputError
from distributed_eg.strategy.plugin_table import PLUGINS, Refused, StartsEmpty
from tests.helpers import SHAPE, hashes, tiny_benchmark, tiny_net, tiny_strategy

EXPORTED = [
    cls for _, cls in inspect.getmembers(avalanche, inspect.isclass) if issubclass(cls, BasePlugin | EvaluationPlugin)
]
NAMED = [*EXPORTED, PackNetPlugin, ICaRLLossPlugin, MaskedCrossEntropy]

MADE: dict[type, Callable[[ExpertGate, torch.optim.Optimizer], object]] = {
    avalanche.SupervisedPlugin: lambda *_: SupervisedPlugin(),
    avalanche.EarlyStoppingPlugin: lambda *_: EarlyStoppingPlugin(9, "valid_stream"),
    avalanche.LRSchedulerPlugin: lambda _, optimizer: LRSchedulerPlugin(StepLR(optimizer, 99)),
    avalanche.ReplayPlugin: lambda *_: avalanche.ReplayPlugin(20),
    avalanche.RARPlugin: lambda *_: avalanche.RARPlugin(8, 20),
    avalanche.AGEMPlugin: lambda *_: avalanche.AGEMPlugin(20, 8),
    avalanche.GEMPlugin: lambda *_: avalanche.GEMPlugin(20, 0.5),
    avalanche.EWCPlugin: lambda *_: avalanche.EWCPlugin(1.0, mode="online", decay_factor=0.5),
    avalanche.MASPlugin: lambda *_: avalanche.MASPlugin(),
    avalanche.SynapticIntelligencePlugin: lambda *_: avalanche.SynapticIntelligencePlugin([1.0, 2.0]),
    avalanche.FeatureDistillationPlugin: lambda *_: avalanche.FeatureDistillationPlugin(),
    avalanche.GenerativeReplayPlugin: lambda *_: avalanche.GenerativeReplayPlugin(),
    avalanche.LwFPlugin: lambda *_: avalanche.LwFPlugin(),
    avalanche.LFLPlugin: lambda *_: avalanche.LFLPlugin(1.0),
    avalanche.RWalkPlugin: lambda *_: avalanche.RWalkPlugin(),
    avalanche.MIRPlugin: lambda *_: avalanche.MIRPlugin(8, 20, 20),
    avalanche.GSS_greedyPlugin: lambda *_: avalanche.GSS_greedyPlugin(20, 5, list(SHAPE)),
    avalanche.GDumbPlugin: lambda *_: avalanche.GDumbPlugin(20),
    avalanche.FromScratchTrainingPlugin: lambda *_: avalanche.FromScratchTrainingPlugin(),
    avalanche.BiCPlugin: lambda *_: avalanche.BiCPlugin(20),
    avalanche.CoPEPlugin: lambda *_: avalanche.CoPEPlugin(20, n_classes=4, p_size=2),
    avalanche.CWRStarPlugin: lambda model, _: avalanche.CWRStarPlugin(model),
    avalanche.EvaluationPlugin: lambda *_: EvaluationPlugin(loggers=[]),
    PackNetPlugin: lambda *_: PackNetPlugin(1),
}
"""How each is made; the others take nothing."""


def strategy_with(cls: type, **settings: Any) -> ExpertGateStrategy:
    """A strategy with a plugin of that class."""
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.05, momentum=0.9)
    plugin = MADE[cls](model, optimizer) if cls in MADE else cls()
    return tiny_strategy(model=model, optimizer=optimizer, plugins=[plugin], train_epochs=1, rel_thresh=0.5, **settings)


def trained(strategy: ExpertGateStrategy) -> list[tuple[str, str]]:
    """What two tasks end with: the second learns without forgetting."""
    with strategy:
        strategy.train(tiny_benchmark((0, 0)).train_stream)
        assert strategy.registry["transfer"].to_pylist() == ["fresh", "lwf"]
        strategy.eval(tiny_benchmark((0, 0)).test_stream)
        return hashes(strategy)


@pytest.fixture(scope="module")
def without() -> list[tuple[str, str]]:
    """What they end with without a plugin."""
    return trained(tiny_strategy(train_epochs=1, rel_thresh=0.5))


def test_every_plugin_that_avalanche_exports_is_in_the_table() -> None:
    assert {cls.__name__ for cls in EXPORTED} <= {cls.__name__ for cls in PLUGINS}
    assert len(EXPORTED) > 25


@pytest.mark.parametrize(
    "cls", [cls for cls in NAMED if not isinstance(PLUGINS[cls], Refused)], ids=lambda c: c.__name__
)
@pytest.mark.filterwarnings("ignore:EarlyStoppingPlugin waits:UserWarning")
def test_what_runs_trains_two_tasks(cls: type, without: list[tuple[str, str]]) -> None:
    """One that starts empty says so, and its experts are what they are without it, bit for bit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = strategy_with(cls)
    said = [str(warning.message) for warning in caught if "it starts empty" in str(warning.message)]
    assert [text.split()[0] for text in said] == ([cls.__name__] if isinstance(PLUGINS[cls], StartsEmpty) else [])
    assert trained(strategy) == without


@pytest.mark.parametrize("cls", [cls for cls in NAMED if isinstance(PLUGINS[cls], Refused)], ids=lambda c: c.__name__)
def test_what_cannot_work_is_refused_with_the_reason(cls: type) -> None:
    entry = PLUGINS[cls]
    assert isinstance(entry, Refused)
    with pytest.raises(InputError) as caught:
        strategy_with(cls)
    assert str(caught.value).startswith(f"{cls.__name__} cannot work")
    assert entry.why in str(caught.value)
    assert entry.instead in str(caught.value)


def test_a_criterion_that_is_a_plugin_too() -> None:
    """Avalanche takes it for both."""
    with pytest.raises(InputError, match=r"MaskedCrossEntropy cannot work .* give CrossEntropyLoss\(\)"):
        tiny_strategy(criterion=MaskedCrossEntropy())


class MyGDumb(avalanche.GDumbPlugin):
    """A user's own kind of a plugin that is refused."""


class MyReplay(avalanche.ReplayPlugin):
    """A user's own kind of one that starts empty."""


class ReplayPlugin(SupervisedPlugin):
    """A user's own, that only has the name of Avalanche's."""


def test_a_subclass_is_what_its_base_is() -> None:
    with pytest.raises(InputError, match="MyGDumb cannot work"):
        tiny_strategy(plugins=[MyGDumb()])
    with pytest.warns(UserWarning, match="MyReplay keeps samples of earlier tasks, .* it starts empty"):
        tiny_strategy(plugins=[MyReplay(20)]).close()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*starts empty")
        tiny_strategy(plugins=[ReplayPlugin()]).close()


def test_one_that_is_added_later_is_refused_before_training() -> None:
    with tiny_strategy() as strategy:
        strategy.plugins.insert(0, MyGDumb())
        with pytest.raises(InputError, match="MyGDumb cannot work"):
            strategy.train(tiny_benchmark((0,)).train_stream)
        assert strategy.run_dir is None


def test_what_is_no_list_of_plugins() -> None:
    with pytest.raises(InputError, match="the class MyReplay; give an instance"):
        tiny_strategy(plugins=[MyReplay])
    with pytest.raises(InputError, match="one ReadsClock; give a list"):
        tiny_strategy(plugins=ReadsClock())
    generated = [ReplayPlugin(), ReplayPlugin()]
    with tiny_strategy(plugins=(plugin for plugin in generated)) as strategy:
        assert strategy.plugins[:2] == generated


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"reset_lr": False}, "carries the learning rate"),
        ({"reset_scheduler": False}, "carries the schedule"),
        ({"first_exp_only": True}, "training is a first one"),
    ],
)
def test_a_schedule_over_several_tasks_is_refused(setting: dict[str, bool], why: str) -> None:
    """Each expert begins with the optimizer's own rate: Avalanche's rate in the second task would be another."""
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.05)
    plugin = LRSchedulerPlugin(StepLR(optimizer, 1), **setting)
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=f"LRSchedulerPlugin has {name}={value}.*{why}.*Set it to {not value}"):
        tiny_strategy(model=model, optimizer=optimizer, plugins=[plugin])


def test_a_generator_that_an_untrained_expert_would_label_is_refused() -> None:
    with pytest.raises(InputError, match="untrained_solver=False"):
        tiny_strategy(plugins=[avalanche.GenerativeReplayPlugin(untrained_solver=False)])


class ReadsClock(SupervisedPlugin):
    """A user's plugin that counts tasks and iterations."""

    def before_forward(self, strategy: Any, **_: Any) -> None:
        """By the clock of the sequence."""
        self.seen = (strategy.clock.train_exp_counter, strategy.clock.train_iterations)

    def after_forward(self, strategy: Any, **_: Any) -> None:
        """By the clock of the task."""
        self.seen = (strategy.clock.train_exp_epochs, strategy.clock.train_exp_iterations)


class NamesByClock(PluginMetric[int]):
    """A user's metric, whose positions are right."""

    def reset(self) -> None:
        """Nothing."""

    def result(self) -> int:
        """Nothing."""
        return 0

    def after_training_exp(self, strategy: Any) -> MetricValue:
        """Named by the clock of the sequence."""
        return MetricValue(self, f"Mine/{strategy.clock.train_exp_counter}", 0, strategy.clock.train_iterations)


class TrainsByClock(ExpertGateStrategy):
    """A user's strategy that does something else in its first task."""

    def optimizer_step(self) -> None:
        """By the clock of the sequence."""
        if self.clock.train_exp_counter > 0:
            super().optimizer_step()

    def eval(self, *args: Any, **kwargs: Any) -> Any:
        """Called where that clock is."""
        return super().eval(*args, **kwargs), self.clock.total_iterations


def test_who_reads_the_clock_of_the_sequence_is_named() -> None:
    """Avalanche's own plugins read it, too, but are in the table."""
    evaluator = EvaluationPlugin(accuracy_metrics(epoch=True), NamesByClock(), loggers=[])
    plugins = [ReadsClock(), avalanche.EWCPlugin(1.0)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_strategy(cls=TrainsByClock, plugins=plugins, evaluator=evaluator).close()
    said = [str(warning.message) for warning in caught if "reads clock" in str(warning.message)]
    assert [text.split(",")[0] for text in said] == [
        "TrainsByClock.optimizer_step reads clock.train_exp_counter",
        "ReadsClock.before_forward reads clock.train_exp_counter",
        "ReadsClock.before_forward reads clock.train_iterations",
        "NamesByClock.after_training_exp reads clock.train_exp_counter",
    ]
    assert all("strategy.experience.current_experience" in text for text in said)


@pytest.mark.parametrize(
    ("stream", "every", "given", "measured"),
    [
        ("train_stream", 1, None, "valid_stream"),
        ("valid_stream", -1, None, "nothing"),
        ("valid_stream", 1, "test", "test_stream"),
        ("valid_stream", 1, None, None),
        ("test_stream", 1, "test", None),
    ],
)
def test_early_stopping_that_waits_for_what_is_not_measured(
    stream: str, every: int, given: str | None, measured: str | None
) -> None:
    """In Avalanche "train_stream" is what is measured without eval_streams; here it is the validation part."""
    plugin = EarlyStoppingPlugin(1, stream)
    benchmark = tiny_benchmark((0,))
    streams = None if given is None else [benchmark.streams[given]]
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[])
    with (
        tiny_strategy(plugins=[plugin], eval_every=every, evaluator=evaluator) as strategy,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        strategy.train(benchmark.train_stream, eval_streams=streams)
    said = [str(warning.message) for warning in caught if "never acts" in str(warning.message)]
    assert len(said) == (measured is not None)
    assert all(f"waits for {stream}" in text and f"measured on {measured} in" in text for text in said)


def test_a_scheduler_that_waits_for_an_evaluation() -> None:
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.05)
    plugin = LRSchedulerPlugin(ReduceLROnPlateau(optimizer), metric="val_loss")
    with (
        tiny_strategy(model=model, optimizer=optimizer, plugins=[plugin]) as strategy,
        pytest.warns(UserWarning, match="LRSchedulerPlugin waits for an evaluation"),
    ):
        strategy.train(tiny_benchmark((0,)).train_stream)
