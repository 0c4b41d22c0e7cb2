"""Advice fits the run that it is given to: no warning and no error tells to do what was done, or what cannot help."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor

from distributed_eg import ClusterConfig, ExpertGate
from distributed_eg.errors import DivergedError, ExpertGateError, InputError, ResourceError
from tests.helpers import SHAPE, TinyNet, tiny_benchmark, tiny_net, tiny_strategy

STREAM = tiny_benchmark((0,)).train_stream


def warnings_of(caplog: pytest.LogCaptureFixture, train: int, kind: str, **settings: Any) -> str:
    """What a task of that many images is told."""
    caplog.set_level(logging.WARNING, "distributed_eg")
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder=kind)  # type: ignore[arg-type]
    with tiny_strategy(model=model, train_epochs=0, **settings) as strategy:
        strategy.train(tiny_benchmark((0,), train=train).train_stream)
    return caplog.text


@pytest.mark.parametrize(
    ("kind", "settings", "fits", "unfit"),
    [
        ("linear", {}, ["more training images", "ae_latent_dim"], ["'linear'", "ae_lr", "ae_train_epochs", "adagrad"]),
        ("sgd", {"ae_lr": 1e-9}, ["autoencoder='linear'", "larger ae_lr", "'adagrad'"], ["more training images of it"]),
        ("sgd", {"ae_lr": 1e-9, "ae_optimizer": "adagrad"}, ["autoencoder='linear'", "larger ae_lr"], ["adagrad"]),
    ],
)
def test_an_autoencoder_that_has_hardly_learnt(
    kind: str, settings: dict[str, Any], fits: list[str], unfit: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    told = warnings_of(caplog, 6, kind, **{"validation_fraction": 0.5, "ae_latent_dim": 1, **settings})
    assert "has hardly learnt" in told
    assert all(word in told for word in fits), told
    assert not any(word in told for word in unfit), told


def test_one_validation_image_is_no_fault_of_the_autoencoder(caplog: pytest.LogCaptureFixture) -> None:
    told = warnings_of(caplog, 10, "linear")
    assert "its validation part holds 1 image(s)" in told
    assert "validation_fraction" in told
    assert "hardly learnt" not in told


def test_a_small_first_task_with_a_reference_is_not_told_to_give_one(caplog: pytest.LogCaptureFixture) -> None:
    assert "reference=" in warnings_of(caplog, 20, "linear")
    caplog.clear()
    reference = tiny_benchmark((1,)).train_stream[0].dataset
    assert "reference=" not in warnings_of(caplog, 20, "linear", reference=reference)


def test_a_class_of_which_all_images_are_held_out_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with tiny_strategy() as strategy:
        strategy.train(tiny_benchmark((0, 1), train=2).train_stream)
    for task in (0, 1):
        assert re.search(rf"Task {task} .* has no image of the classes \[{2 * task}|{2 * task + 1}\]", caplog.text)


def test_classes_that_no_expert_of_their_task_has_learnt_are_told(caplog: pytest.LogCaptureFixture) -> None:
    learnt, other = tiny_benchmark((0, 1)), tiny_benchmark((0, 1), offset=False)
    with tiny_strategy() as strategy:
        strategy.train(learnt.train_stream)
        strategy.eval(learnt.test_stream)
        assert "counts as wrong" not in caplog.text
        strategy.eval(other.test_stream)
    assert "Experience 1 has the classes [0, 1], and its tasks (1) have learnt [2, 3]" in caplog.text
    assert caplog.text.count("counts as wrong") == 1


def test_unequal_sizes_are_told_once_in_a_loop_over_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    with tiny_strategy(train_epochs=0) as strategy:
        strategy.train(tiny_benchmark((0,), train=12).train_stream)
        stream = tiny_benchmark((0, 1, 2)).train_stream
        for experience in (stream[1], stream[2]):
            strategy.train(experience)
    assert caplog.text.count("Task sizes are unequal") == 1


@pytest.mark.parametrize(("count", "times"), [(30, 0), (15, 1)])
def test_the_shared_score_makes_up_for_unequal_sizes_but_for_the_smallest(
    caplog: pytest.LogCaptureFixture, count: int, times: int
) -> None:
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear", gate_score="shared")
    with tiny_strategy(model=model, train_epochs=0) as strategy:
        strategy.train(tiny_benchmark((0,), train=count).train_stream)
        strategy.train(tiny_benchmark((0, 1), train=120).train_stream[1])
    assert caplog.text.count("Task sizes are unequal") == times


# A loss that is not finite


class NanFrom(torch.nn.Module):
    """Cross-entropy, NaN from a batch on, whatever the network says."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.left = batch

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss."""
        self.left -= 1
        return torch.nn.functional.cross_entropy(outputs, targets) * (math.nan if self.left < 0 else 1.0)


class Spoils(SupervisedPlugin):
    """Makes the loss infinite."""

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Before it is used."""
        strategy.loss = strategy.loss * math.inf


def diverged(lr: float = 0.05, net: torch.nn.Module | None = None, **settings: Any) -> str:
    model = ExpertGate(SHAPE, arch=net or tiny_net(), autoencoder="linear")
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=lr)
    with (
        tiny_strategy(model=model, optimizer=optimizer, **settings) as strategy,
        pytest.raises(DivergedError) as caught,
    ):
        strategy.train(STREAM)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("batch", [0, 2])
def test_a_criterion_that_gives_nan_by_itself_is_named(batch: int) -> None:
    message = diverged(criterion=NanFrom(batch))
    assert "the criterion NanFrom" in message
    assert "lower the learning rate" not in message


def test_a_plugin_that_spoils_the_loss_is_thought_of() -> None:
    message = diverged(plugins=[Spoils()])
    assert "from what changes the loss after it" in message
    assert "lower the learning rate" not in message


def test_a_learning_rate_that_is_too_high_is_told_to_be_lowered() -> None:
    assert "lower the learning rate" in diverged(lr=1e30, train_epochs=5)


def test_weights_that_are_nan_from_the_start_are_not_the_learning_rate_s_fault() -> None:
    net = tiny_net()
    with torch.no_grad():
        net.dropout = torch.nn.Identity()
        net.pool = torch.nn.Sequential(net.pool, torch.nn.BatchNorm2d(12))
        net.pool[1].weight.fill_(math.nan)  # behind the features
    for settings, says in (({}, "no step was taken yet"), ({"train_epochs": 0}, "it took no step")):
        message = diverged(net=net, **settings)
        assert says in message
        assert "lower the learning rate" not in message


def test_a_last_step_that_spoils_the_weights() -> None:
    class Root(torch.nn.Module):
        """A finite loss with a gradient that is not: the root of 0."""

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            """The loss."""
            return (outputs.sum() * 0).sqrt()

    message = diverged(criterion=Root(), train_mb_size=64, train_epochs=1)
    assert "are not finite after training" in message
    assert "criterion's gradient" in message


# What is left of a run


class Fails(SupervisedPlugin):
    """Raises in every task."""

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """The hook that raises."""
        raise ValueError("no")


@pytest.mark.parametrize("stored", [False, True])
def test_only_a_run_with_a_storage_can_be_resumed(stored: bool, tmp_path: Path) -> None:
    cluster = ClusterConfig(engine="inline", storage=tmp_path / "run" if stored else None)
    with tiny_strategy(cluster, plugins=[Fails()]) as strategy, pytest.raises(ExpertGateError) as caught:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
    assert ("The run can be resumed." in str(caught.value)) == stored
    assert ("Without ClusterConfig(storage=…)" in str(caught.value)) != stored


@pytest.mark.parametrize("stored", [False, True])
def test_only_a_run_with_a_storage_can_be_loaded_once_it_is_closed(stored: bool, tmp_path: Path) -> None:
    with tiny_strategy(ClusterConfig(engine="inline", storage=tmp_path / "run" if stored else None)) as strategy:
        strategy.train(STREAM)
    with pytest.raises(InputError) as caught:
        strategy.eval(STREAM)
    assert ("ExpertGate.load" in str(caught.value)) == stored


# Images and criteria


@pytest.mark.parametrize(
    ("shape", "fits", "unfit"),
    [
        ((1, 16, 16), ["gives them 3 channels"], ["resizes"]),
        ((3, 20, 16), ["resizes"], ["channels"]),
        ((1, 20, 20), ["gives them 3 channels and resizes"], []),
    ],
)
def test_images_of_another_shape(shape: tuple[int, int, int], fits: list[str], unfit: list[str]) -> None:
    from tests.strategy.test_bad_input import experience

    strange = experience(torch.rand(40, *shape), torch.arange(40) % 2)
    with tiny_strategy(train_epochs=0) as strategy:
        for use in (strategy.train, strategy.eval):
            with pytest.raises(InputError) as caught:
                use(strange)
            assert all(word in str(caught.value) for word in fits)
            assert not any(word in str(caught.value) for word in unfit)
            assert ("build ExpertGate" in str(caught.value)) == (use == strategy.train)  # too late afterwards
            strategy.train(STREAM)


@pytest.mark.parametrize("criterion", [lambda outputs, targets: None, lambda outputs, targets: 0.5])
def test_a_criterion_without_a_tensor_is_not_told_to_reduce_it(criterion: Callable[..., Any]) -> None:
    with tiny_strategy(criterion=criterion) as strategy, pytest.raises(ExpertGateError) as caught:
        strategy.train(STREAM)
    assert "must return a tensor of one number" in str(caught.value)
    assert "reduction" not in str(caught.value)


def test_a_run_whose_network_torchvision_builds_otherwise_now_is_not_told_that_one_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed_eg.strategy import model

    monkeypatch.setattr(model, "build_network", lambda *_, **__: tiny_net())
    with tiny_strategy(
        ClusterConfig(engine="inline", storage=tmp_path), model=ExpertGate(SHAPE, arch="tiny", autoencoder="linear")
    ) as strategy:
        strategy.train(STREAM)
    monkeypatch.setattr(model, "build_network", lambda *_, **__: TinyNet(11))
    with pytest.raises(InputError, match="The tiny of the torchvision that is installed"):
        ExpertGate.load(tmp_path)
    with pytest.raises(InputError, match="The network given"):
        ExpertGate.load(tmp_path, arch=TinyNet(11))


def test_a_shape_that_no_node_holds_is_told_to_lower_what_it_asks_for() -> None:
    pytest.importorskip("ray")
    from distributed_eg.runtime.ray_backend.cluster import Node, refuse_infeasible

    for is_shared in (False, True):
        with pytest.raises(ResourceError, match="lower cpus_per_worker, or add a node") as caught:
            refuse_infeasible([Node("a", "10.0.0.1", 2, 0, False)], 8, 0, is_shared=is_shared)
        assert ("Close the other strategies" in str(caught.value)) == is_shared
