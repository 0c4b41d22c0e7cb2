"""Where things compute: what contradicts itself is refused before training, and a model is where its parameters are."""

from __future__ import annotations

import io

import pytest
import torch

from distributed_eg import ClusterConfig, ExpertGate
from distributed_eg.errors import InputError
from distributed_eg.method.head import own_draws
from distributed_eg.runtime.ray_backend.cluster import Node
from distributed_eg.strategy import checks
from distributed_eg.strategy import strategy as strategy_module
from tests.helpers import SHAPE, tiny_benchmark, tiny_net, tiny_strategy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RAY = ClusterConfig()


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", torch.device("mps", 0)])
def test_accelerators_that_lack_what_the_method_needs_are_refused_by_name(device: str | torch.device) -> None:
    with pytest.raises(InputError, match=f"device is '{device}'.*'cpu' and on 'cuda'"):
        ExpertGate(SHAPE, arch=tiny_net(), device=device)
    with pytest.raises(InputError, match=f"device is '{device}'"):
        tiny_strategy(device=device)


def test_a_device_decides_about_gpus() -> None:
    """On the CPU no worker holds a card that it does not use; on a card each has one, or there is no worker."""
    assert checks.placed(RAY, None) == RAY
    assert checks.placed(RAY, CPU).gpus_per_worker == 0
    assert checks.placed(RAY, CUDA).gpus_per_worker == 1
    assert checks.placed(ClusterConfig(gpus_per_worker=0.5), CUDA).gpus_per_worker == 0.5
    assert checks.placed(ClusterConfig(gpus_per_worker=0), CPU).gpus_per_worker == 0


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 1), ("cpu", 0.5), ("cuda", 0), ("cuda:1", 0)])
def test_a_device_and_shares_that_contradict_each_other(device: str, gpus: float) -> None:
    with pytest.raises(InputError, match=r"contradict each other"):
        tiny_strategy(ClusterConfig(gpus_per_worker=gpus), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_refused_before_training() -> None:
    with pytest.raises(InputError, match="finds no GPU here"):
        tiny_strategy(device="cuda")


@pytest.mark.parametrize(("share", "fits"), [(0.1, 10), (0.2, 5), (0.3, 3), (0.33, 3), (0.5, 2), (1 / 3, 3), (1, 1)])
def test_shares_are_counted_as_ray_counts_them(share: float, fits: int) -> None:
    node = Node("n", "here", cpus=64, gpus=2, leaving=False)
    assert node.room_for(1, share) == 2 * fits
    assert Node("n", "here", cpus=1, gpus=0, leaving=False).room_for(share, 0) == fits


def test_a_model_that_was_moved_answers_from_there() -> None:
    """Between two trainings and after the last: the gate follows. "meta" stands for a card, and has no values."""
    with tiny_strategy() as strategy:
        model = strategy.model
        assert isinstance(model, ExpertGate)
        strategy.train(tiny_benchmark((0,)).train_stream)
        assert model.device == CPU
        model.to("meta")
        assert model.device == torch.device("meta")
        moved = model._predictor
        strategy._driver._attach()  # as after the next training
        for predictor in (moved, model._predictor):
            assert predictor is not None
            assert predictor.reader.device.type == predictor.gate.statistics.mean.device.type == "meta"


def test_an_evaluation_leaves_a_model_where_somebody_moved_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Avalanche moves the model to the strategy's device, which was the model's own when the strategy was made."""
    benchmark = tiny_benchmark((0,))
    with tiny_strategy() as strategy:
        strategy.train(benchmark.train_stream)
        strategy.model.to("meta")
        monkeypatch.setattr(strategy, "_eval", lambda *_: {})
        strategy.eval(benchmark.test_stream)
        strategy.experience = benchmark.test_stream[0]
        strategy.model_adaptation()
        assert strategy.model.device == strategy.device == torch.device("meta")


def test_a_strategy_computes_where_its_model_is() -> None:
    """Without ``device=``: moving it elsewhere would be a surprise."""
    assert checks.driver_device(None, CUDA) == CUDA
    assert checks.driver_device(None, CPU) == CPU


def test_a_saved_model_is_where_its_tensors_were_loaded_to() -> None:
    """torch moves tensors by ``map_location``; what is kept beside them, here a card's name, must not decide."""
    images = torch.zeros(2, *SHAPE)
    with tiny_strategy() as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
        vars(strategy.model)["device"] = CUDA
        buffer = io.BytesIO()
        torch.save(strategy.model, buffer)
        expected = strategy.model.gate(images).errors
    buffer.seek(0)
    loaded = torch.load(buffer, map_location="cpu", weights_only=False)
    assert loaded.device == loaded._predictor.reader.device == CPU
    assert torch.equal(loaded.gate(images).errors, expected)


@pytest.mark.parametrize("measured", ["an expert while it trains", "a stream"])
def test_measuring_keeps_what_the_card_has_drawn_to_itself(measured: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation whose loader or network draws on the card must not change what is drawn there afterwards."""
    forked: list[list[torch.device]] = []
    fork = torch.random.fork_rng

    def noted(devices: list[torch.device]) -> object:
        forked.append(devices)
        return fork([])

    with monkeypatch.context() as patch:
        patch.setattr(torch.random, "fork_rng", noted)
        for device in (CUDA, CPU):
            with own_draws(device):
                pass
    assert forked == [[CUDA], []]
    devices = []
    monkeypatch.setattr(strategy_module, "own_draws", lambda device: devices.append(device) or fork([]))
    benchmark = tiny_benchmark((0,))
    with tiny_strategy(eval_every=1 if measured == "an expert while it trains" else -1) as strategy:
        strategy.train(benchmark.train_stream)
        if measured == "a stream":
            strategy.eval(benchmark.test_stream)
    assert devices
    assert set(devices) == {CPU}
