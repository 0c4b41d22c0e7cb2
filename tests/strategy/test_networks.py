"""What users set on their network survives in every expert; what cannot be an expert is refused before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.models import (
    CosineLinear,
    IncrementalClassifier,
    MTSimpleMLP,
    MultiHeadClassifier,
    NCMClassifier,
    as_multitask,
)
from avalanche.models.dynamic_modules import MultiTaskModule
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.errors import BackboneError, InputError, ResumeError
from tests.helpers import DOMAINS, INLINE, SHAPE, TinyNet, hashes, tiny_benchmark, tiny_net, tiny_strategy


def with_head(head: nn.Module) -> TinyNet:
    network = tiny_net()
    network.head = head  # type: ignore[assignment]
    return network


def trained(network: nn.Module, domains: tuple[int, ...] = (0, 1), **settings: Any) -> ExpertGateStrategy:
    """A strategy that has learnt small tasks with ``network``; checked to predict and to evaluate."""
    model = ExpertGate(SHAPE, arch=network, autoencoder="linear", head=settings.pop("head", None))
    benchmark = tiny_benchmark(domains, train=16, test=8)
    strategy = tiny_strategy(model=model, rel_thresh=0.5, **settings)
    strategy.train(benchmark.train_stream)
    metrics = strategy.eval(benchmark.test_stream)
    assert any(name.startswith("Gate_Acc_Stream") for name in metrics)
    assert model(torch.zeros(2, *SHAPE)).shape == (2, 2 * len(domains))
    return strategy


INPUTS = 48
HEADS: dict[str, Callable[[], nn.Module]] = {
    "growing": lambda: IncrementalClassifier(INPUTS, 2),
    "growing, grown already": lambda: IncrementalClassifier(INPUTS, 7, masking=False),
    "Avalanche's cosine layer": lambda: CosineLinear(INPUTS, 5),
    "two layers": lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_that_people_bring(kind: str) -> None:
    """Task 2 of the sequence learns without forgetting."""
    network = with_head(HEADS[kind]())
    with trained(network, (0, 1, 0)) as strategy:
        assert strategy.registry["transfer"].to_pylist()[2] == "lwf"
    if kind.startswith("growing"):
        assert isinstance(network.head, IncrementalClassifier), "the caller's own is left as it is"


class TaskAware(MultiTaskModule):
    def forward(self, x: torch.Tensor, task_labels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "several heads": (lambda: with_head(MultiHeadClassifier(INPUTS, 2)), "head is a MultiHeadClassifier"),
    "MTSimpleMLP": (lambda: MTSimpleMLP(3 * 16 * 16), "MTSimpleMLP, which changes with the tasks"),
    "as_multitask": (lambda: as_multitask(tiny_net(), "head"), "which changes with the tasks or asks for task labels"),
    "somebody's own": (lambda: with_head(TaskAware()), "head is a TaskAware"),
    "class means": (lambda: with_head(NCMClassifier()), "head is a NCMClassifier"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_networks_that_change_with_the_tasks_are_refused_by_the_layers_name(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(BackboneError, match=message):
        ExpertGate(SHAPE, arch=make(), autoencoder="linear")


class ReadsHead(SupervisedPlugin[Any]):
    """As many a plugin does: it knows the network's layers by name, and listens to one."""

    def before_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        expert = strategy.model.expert
        assert type(expert.head) is nn.Linear
        expert.head.register_forward_hook(self._look)

    def before_update(self, strategy: Any, *_: Any, **__: Any) -> None:
        assert strategy.model.expert.head.weight.shape[0] == 2
        assert strategy.model.expert.head.weight.grad is not None

    @staticmethod
    def _look(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        assert output.shape[1] == 2


def test_plugins_find_the_networks_layers_where_an_expert_learns_without_forgetting() -> None:
    with trained(tiny_net(), (0, 1, 0), plugins=[ReadsHead()]) as strategy:
        assert "lwf" in strategy.registry["transfer"].to_pylist()


class Weights(SupervisedPlugin[Any]):
    """Fails where a frozen layer has learnt."""

    def after_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        network = strategy.model.expert
        assert not any(parameter.requires_grad for parameter in network.features.parameters())
        assert all(parameter.requires_grad for parameter in network.head.parameters())
        root = tiny_net().state_dict()
        features = {name: value for name, value in network.state_dict().items() if name.startswith("features")}
        assert all(torch.equal(value, root[name]) for name, value in features.items() if "num_batches" not in name)


def test_layers_that_the_user_froze_do_not_learn(tmp_path: Path) -> None:
    network = tiny_net().requires_grad_(False)
    storage = ClusterConfig(engine="inline", storage=str(tmp_path / "run"))
    with trained(network, (0, 1, 0), plugins=[Weights()], cluster=storage) as strategy:
        assert not any(parameter.requires_grad for parameter in network.parameters())
        frozen = hashes(strategy)
    with trained(tiny_net(), (0, 1, 0)) as strategy:
        assert [expert for _, expert in hashes(strategy)] != [expert for _, expert in frozen]
    again = ClusterConfig(engine="inline", storage=str(tmp_path / "run"), resume=True)
    with pytest.raises(ResumeError, match=r"backbone\.frozen"):
        trained(tiny_net(), (0, 1, 0), plugins=[Weights()], cluster=again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_another_type_train_and_keep_it(dtype: torch.dtype) -> None:
    with trained(tiny_net().to(dtype), (0, 1, 0)) as strategy:
        state = strategy.model.state_dict()
        experts = [value for name, value in state.items() if ".experts.2." in name and value.is_floating_point()]
        assert {value.dtype for value in experts} == {dtype}


def test_a_head_that_was_named_is_found_again(tmp_path: Path) -> None:
    class Two(TinyNet):
        """Answers with one head, and has another for somebody's own loss."""

        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(INPUTS, 4)

    torch.manual_seed(0)
    network = Two()
    with pytest.raises(BackboneError, match="tried: other"):
        ExpertGate(SHAPE, arch=network, autoencoder="linear", head="other")
    storage = ClusterConfig(engine="inline", storage=str(tmp_path / "run"))
    with trained(network, cluster=storage, head="head") as strategy:
        images = torch.randn(3, *SHAPE)
        expected = strategy.model(images)
    loaded = ExpertGate.load(str(tmp_path / "run"), arch=Two())
    assert (loaded.head, loaded.named_head) == ("head", True)
    assert torch.equal(loaded(images), expected)


def _add_layer(network: Any) -> None:
    network.extra = nn.Linear(3, 3)


def _replace_layer(network: Any) -> None:
    network.dropout = nn.Identity()


def _freeze(network: Any) -> None:
    network.features.requires_grad_(False)


def _write(network: Any) -> None:
    network.head.bias.data += 1  # behind autograd's back


@pytest.mark.parametrize("change", [_add_layer, _replace_layer, _freeze, _write])
def test_a_network_changed_between_two_calls_is_noticed(change: Callable[[Any], None]) -> None:
    first, second = tiny_benchmark((0, 1), train=16, test=8).train_stream
    with tiny_strategy(INLINE) as strategy:
        strategy.train(first)
        change(strategy.model.expert)
        with pytest.raises(InputError, match="was changed since the run began"):
            strategy.train(second)
        assert strategy.registry.num_rows == 1


def test_it_is_not_changed_by_what_anyone_does_with_a_model() -> None:
    """Evaluation, prediction, modes, a move, a copy loaded again: the run goes on."""
    first, second = tiny_benchmark(DOMAINS[:2], train=16, test=8).train_stream
    with tiny_strategy(INLINE) as strategy:
        strategy.train(first)
        model = strategy.model
        strategy.eval(first)
        model.train()
        model(torch.zeros(2, *SHAPE))
        model.to("cpu")
        model.load_state_dict(model.state_dict())
        strategy.train(second)
        assert strategy.registry.num_rows == 2
