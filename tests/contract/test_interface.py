"""The interface against Avalanche's own: signatures, names, and a script with only its import changed."""

from __future__ import annotations

import importlib
import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics, loss_metrics
from avalanche.logging import InteractiveLogger, TextLogger
from avalanche.models.expert_gate import ExpertGate as TheirModel
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised.expert_gate import ExpertGateStrategy as TheirStrategy
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.templates.base import PositionalArgumentsDeprecatedWarning

import distributed_eg
from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from tests.helpers import INLINE, SEED_METHODS, SHAPE, tiny_benchmark, tiny_net, tiny_strategy

METHODS = ("__init__", *SEED_METHODS)
ATTRIBUTES = (
    "is_eval",
    "mbatch",
    "mb_output",
    "dataloader",
    "optimizer",
    "loss",
    "train_epochs",
    "train_mb_size",
    "eval_mb_size",
    "retain_graph",
    "evaluator",
    "clock",
    "adapted_dataset",
    "model",
    "device",
    "plugins",
    "experience",
    "is_training",
    "current_eval_stream",
)
OF_A_MINI_BATCH = ("mb_x", "mb_y", "mb_task_id")
"""Properties that there is nothing to read from before there is a mini-batch, in Avalanche as here."""
SETTINGS = ("ae_train_mb_size", "ae_train_epochs", "ae_latent_dim", "ae_lr", "rel_thresh", "eval_every")
"""Attributes that Avalanche's own class keeps beside those."""


def parameters_of(function: Any, *, but: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """A function's parameters without ``self``."""
    return [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", *but)]


def same_default(ours: Any, theirs: Any) -> bool:
    """Equal, or of one type where a default is an object."""
    if isinstance(theirs, torch.nn.Module):
        return type(ours) is type(theirs)
    return (
        ours == theirs and type(ours) in (type(theirs), int, float)
        if isinstance(theirs, int | float)
        else (ours is theirs or ours == theirs)
    )


class TestSignatures:
    """Avalanche's parameters come first, in its order, with its defaults."""

    def test_names_and_order_of_the_strategys(self) -> None:
        theirs = [p for p in parameters_of(TheirStrategy.__init__) if p.kind is not p.VAR_KEYWORD]
        ours = parameters_of(ExpertGateStrategy.__init__)
        assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
        assert len(theirs) == 16

    @pytest.mark.parametrize("name", [p.name for p in parameters_of(TheirStrategy.__init__, but=("base_kwargs",))])
    def test_defaults_and_kinds_of_the_strategys(self, name: str) -> None:
        ours = inspect.signature(ExpertGateStrategy.__init__).parameters[name]
        theirs = inspect.signature(TheirStrategy.__init__).parameters[name]
        # Fitted to held-out images where nobody gives one: the paper's 2 makes the gate sure of everything.
        assert (ours.default is None) if name == "temp" else same_default(ours.default, theirs.default)
        assert ours.kind is theirs.kind

    def test_what_we_add_is_optional_and_by_name(self) -> None:
        theirs = {p.name for p in parameters_of(TheirStrategy.__init__)}
        added = [p for p in parameters_of(ExpertGateStrategy.__init__) if p.name not in theirs]
        assert added
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)
        assert parameters_of(ExpertGateStrategy.__init__)[-1].kind is inspect.Parameter.VAR_KEYWORD

    def test_names_order_kinds_and_defaults_of_the_models(self) -> None:
        """``device`` has no default in Avalanche; here it may be left out."""
        theirs, ours = parameters_of(TheirModel.__init__), parameters_of(ExpertGate.__init__)
        assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
        for mine, other in zip(ours, theirs, strict=False):
            assert mine.kind is other.kind
            assert other.default is other.empty or mine.default == other.default
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in ours[len(theirs) :])

    @pytest.mark.parametrize("method", [name for name in METHODS if name != "__init__"])
    def test_a_call_that_avalanches_method_takes_ours_takes(self, method: str) -> None:
        """Same parameter names in the same order, then at most keyword-only ones with a default, or ``**kwargs``."""
        theirs = parameters_of(getattr(TheirStrategy, method))
        ours = parameters_of(getattr(ExpertGateStrategy, method))
        positional = [p for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in ours[: len(positional)]] == [p.name for p in positional]
        for mine, other in zip(ours, positional, strict=False):
            assert mine.default == other.default
        rest = ours[len(positional) :]
        assert all(p.kind is p.VAR_KEYWORD or (p.kind is p.KEYWORD_ONLY and p.default is not p.empty) for p in rest)
        if any(p.kind is p.VAR_KEYWORD for p in theirs):
            assert any(p.kind is p.VAR_KEYWORD for p in ours)


class TestNames:
    """Everything that the seed's page lists is there."""

    @pytest.mark.parametrize("method", METHODS)
    def test_methods(self, method: str) -> None:
        assert callable(getattr(ExpertGateStrategy, method))

    @pytest.mark.parametrize("attribute", [*ATTRIBUTES, *SETTINGS])
    def test_attributes(self, attribute: str) -> None:
        with tiny_strategy() as strategy:
            assert hasattr(strategy, attribute)

    @pytest.mark.parametrize("attribute", OF_A_MINI_BATCH)
    def test_attributes_of_a_mini_batch(self, attribute: str) -> None:
        assert isinstance(getattr(ExpertGateStrategy, attribute), property)

    def test_what_was_given_is_what_the_attributes_say(self) -> None:
        model = ExpertGate(SHAPE, arch=tiny_net())
        optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.1)
        evaluator = EvaluationPlugin(loggers=[])
        given = {
            "train_mb_size": 5,
            "train_epochs": 3,
            "eval_mb_size": 7,
            "eval_every": 2,
            "ae_train_mb_size": 11,
            "ae_train_epochs": 4,
            "ae_latent_dim": 6,
            "ae_lr": 0.02,
            "rel_thresh": 0.7,
        }
        strategy = ExpertGateStrategy(
            model=model, optimizer=optimizer, evaluator=evaluator, temp=3, cluster=INLINE, **given
        )
        assert {name: getattr(strategy, name) for name in given} == given
        assert (strategy.model, strategy.optimizer, strategy.evaluator) == (model, optimizer, evaluator)
        assert strategy.method.temp == 3

    def test_it_is_a_supervised_template(self) -> None:
        assert issubclass(ExpertGateStrategy, SupervisedTemplate)

    def test_eval_mb_size_is_train_mb_size_where_it_is_not_given(self) -> None:
        with tiny_strategy(train_mb_size=9, eval_mb_size=None) as strategy:
            assert strategy.eval_mb_size == 9

    def test_the_models_expert_is_there_before_training(self) -> None:
        """Scripts build their optimizer from it."""
        model = ExpertGate(SHAPE, arch=tiny_net())
        assert len(list(model.expert.parameters())) > 0
        assert model(torch.rand(2, *SHAPE)).shape == (2, 7)

    def test_public_names(self) -> None:
        assert set(distributed_eg.__all__) >= {"ClusterConfig", "ExpertGate", "ExpertGateStrategy", "gate_metrics"}
        assert len(set(distributed_eg.__all__)) == len(distributed_eg.__all__)
        for name in distributed_eg.__all__:
            value = getattr(distributed_eg, name)
            assert getattr(importlib.import_module(value.__module__), name) is value
            assert value.__doc__
        assert set(distributed_eg.__all__) <= set(dir(distributed_eg))
        with pytest.raises(AttributeError, match="no_such_name"):
            distributed_eg.no_such_name  # noqa: B018

    def test_a_star_import_brings_the_public_names(self) -> None:
        names: dict[str, Any] = {}
        exec("from distributed_eg import *", names)
        assert set(distributed_eg.__all__) <= set(names)


class TestPositionalArguments:
    """Deprecated in Avalanche, and as there it works with a warning."""

    def test_model_and_optimizer(self) -> None:
        model = ExpertGate(SHAPE, arch=tiny_net())
        optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.1)
        with pytest.warns(PositionalArgumentsDeprecatedWarning):
            strategy = ExpertGateStrategy(
                model, optimizer, train_mb_size=8, evaluator=EvaluationPlugin(loggers=[]), cluster=INLINE
            )
        assert (strategy.model, strategy.optimizer, strategy.train_mb_size) == (model, optimizer, 8)

    def test_up_to_the_evaluation_batch(self) -> None:
        """In Avalanche's order: criterion, sizes."""
        model = ExpertGate(SHAPE, arch=tiny_net())
        optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.1)
        criterion = torch.nn.CrossEntropyLoss()
        with pytest.warns(PositionalArgumentsDeprecatedWarning):
            strategy = ExpertGateStrategy(model, optimizer, criterion, 8, 3, 4, evaluator=None, cluster=INLINE)
        assert (strategy.train_mb_size, strategy.train_epochs, strategy.eval_mb_size) == (8, 3, 4)
        assert strategy._criterion is criterion

    def test_a_subclass_with_keywords_of_its_own(self) -> None:
        class Mine(ExpertGateStrategy):
            """A user's subclass."""

            def __init__(self, *, mine: int, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.mine = mine

        with tiny_strategy(cls=Mine, mine=3) as strategy:
            assert strategy.mine == 3


SCRIPT = """
import torch
from torch.optim import SGD
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics, loss_metrics
from avalanche.logging import InteractiveLogger, TextLogger
from avalanche.training.plugins import EvaluationPlugin
from distributed_eg import ExpertGate, ExpertGateStrategy

model = ExpertGate(shape=SHAPE, device=torch.device("cpu"), arch=NETWORK, pretrained_flag=False)
optimizer = SGD(model.expert.parameters(), lr=5e-2, momentum=0.9, weight_decay=0.0005)
text_logger = TextLogger(LOG)
interactive_logger = InteractiveLogger()
eval_plugin = EvaluationPlugin(
    accuracy_metrics(minibatch=True, epoch=True, experience=True, stream=True),
    loss_metrics(epoch=True, experience=True, stream=True),
    forgetting_metrics(experience=True, stream=True),
    loggers=[interactive_logger, text_logger],
)
strategy = ExpertGateStrategy(
    model=model, optimizer=optimizer, device=torch.device("cpu"), train_mb_size=16, train_epochs=2, eval_mb_size=16,
    ae_train_mb_size=16, ae_train_epochs=2, ae_lr=5e-3, ae_latent_dim=8, temp=2, rel_thresh=0.85,
    evaluator=eval_plugin, CLUSTER
)
results = []
for experience in benchmark.train_stream:
    t = experience.task_label
    exp_id = experience.current_experience
    training_dataset = experience.dataset
    print()
    print(f"Task {t} batch {exp_id} -> train")
    print(f"This batch contains {len(training_dataset)} patterns")
    answer = strategy.train(experience)
    results.append(strategy.eval(benchmark.test_stream))
"""
"""Avalanche's own example of the strategy, with a small network, for no weights are downloaded here."""


class TestScript:
    """A script written for Avalanche, with only its import changed."""

    @pytest.mark.parametrize(
        "engine", [pytest.param("inline", id="inline"), pytest.param("ray", id="ray", marks=[pytest.mark.ray])]
    )
    def test_it_runs(
        self, engine: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """Under Ray without a single argument of ours; inline it says so."""
        if engine == "ray":
            request.getfixturevalue("ray_local")
        log = (tmp_path / "log.txt").open("w")
        names: dict[str, Any] = {
            "SHAPE": SHAPE,
            "NETWORK": tiny_net(),
            "LOG": log,
            "benchmark": tiny_benchmark((0, 1)),
            "INLINE": INLINE,
        }
        exec(SCRIPT.replace("CLUSTER", "cluster=INLINE," if engine == "inline" else ""), names)
        log.close()
        with names["strategy"]:
            results = names["results"]
        assert len(results) == 2
        for name in (
            "Top1_Acc_Exp/eval_phase/test_stream/Task001/Exp001",
            "Top1_Acc_Stream/eval_phase/test_stream/Task001",
            "Loss_Stream/eval_phase/test_stream/Task001",
            "StreamForgetting/eval_phase/test_stream",
            "ExperienceForgetting/eval_phase/test_stream/Task000/Exp000",
            "Top1_Acc_Epoch/train_phase/train_stream/Task001",
        ):
            assert name in results[1]
        text, output = (tmp_path / "log.txt").read_text(), capsys.readouterr().out
        for said in (text, output):
            assert said.count("-- >> Start of training phase << --") == 2
            assert said.count("-- >> End of eval phase << --") == 2
            assert "Epoch 1 ended." in said
        assert "-- Starting training on experience 1 (Task 1) from train stream --" in text
        assert "100%|" in output

    def test_a_whole_stream_and_one_evaluation(self) -> None:
        """``strategy.train(benchmark.train_stream)``, then ``eval`` of one experience, a list, a slice, a stream."""
        benchmark = tiny_benchmark((0, 1))
        buffer = io.StringIO()
        evaluator = EvaluationPlugin(
            accuracy_metrics(experience=True, stream=True),
            loss_metrics(experience=True),
            forgetting_metrics(stream=True),
            loggers=[TextLogger(buffer), InteractiveLogger()],
        )
        with tiny_strategy(evaluator=evaluator) as strategy:
            assert isinstance(strategy.train(benchmark.train_stream), dict)
            stream = benchmark.test_stream
            for asked in (stream[0], [stream[0]], stream[:1], stream, (experience for experience in stream)):
                answer = strategy.eval(asked)
                assert "Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp000" in answer
        assert buffer.getvalue().count("-- >> Start of eval phase << --") == 5

    def test_without_an_evaluator(self) -> None:
        benchmark = tiny_benchmark((0,))
        with tiny_strategy(evaluator=None) as strategy:
            assert strategy.train(benchmark.train_stream) == {}
            assert "Gate_Acc_Stream/eval_phase/test_stream/Task000" in strategy.eval(benchmark.test_stream)

    def test_with_avalanches_default_evaluator(self, capsys: pytest.CaptureFixture[str]) -> None:
        """No evaluator given: accuracy and loss on the standard output, as in Avalanche."""
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.05)
        strategy = ExpertGateStrategy(
            model=model, optimizer=optimizer, train_mb_size=16, ae_latent_dim=8, cluster=ClusterConfig(engine="inline")
        )
        with strategy:
            answer = strategy.train(tiny_benchmark((0,)).train_stream)
        assert "Top1_Acc_Epoch/train_phase/train_stream/Task000" in answer
        assert "Top1_Acc_Epoch/train_phase/train_stream/Task000 = " in capsys.readouterr().out
