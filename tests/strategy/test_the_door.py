"""What a strategy, a model and a load take: obvious values of the wrong type as the right ones; all else is refused."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from avalanche.training.plugins import EarlyStoppingPlugin, SupervisedPlugin
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.errors import BackboneError, InputError
from tests.helpers import SHAPE, TinyNet, hashes, tiny_benchmark, tiny_net, tiny_strategy

STREAM = tiny_benchmark((0,)).train_stream
RESNET: dict[str, Any] = {"shape": (3, 32, 32), "arch": "resnet18"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ``~`` stands for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def refused(make: Callable[[], object], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


# The strategy

WHOLE = {"train_mb_size": 16, "train_epochs": 1, "eval_mb_size": 8, "eval_every": 0, "ae_latent_dim": 4, "seed": 3}
NUMBERS = {
    "temp": 2,
    "rel_thresh": 0.5,
    "distillation_weight": 0.5,
    "distillation_temp": 4,
    "validation_fraction": 0.25,
    "unknown_quantile": 0.75,
}
SGD_ONLY = {"ae_train_mb_size": 8, "ae_train_epochs": 1, "ae_lr": 0.125}


def recorded(folder: Path, **settings: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """run.json but for what differs from run to run, and the hashes of what was trained."""
    model = ExpertGate(SHAPE, arch=tiny_net())
    with tiny_strategy(ClusterConfig(engine="inline", storage=folder), model=model, **settings) as strategy:
        strategy.train(STREAM)
        sealed = hashes(strategy)
    run = json.loads((folder / "run.json").read_text())
    return {name: value for name, value in run.items() if name not in ("run_id", "sha256")}, sealed


def test_numpy_and_torch_scalars_are_recorded_and_trained_with_as_python_s_own(tmp_path: Path) -> None:
    settings = {**WHOLE, **NUMBERS, **SGD_ONLY}
    plain = recorded(tmp_path / "plain", **settings)
    arrays = {name: np.asarray(value)[()] for name, value in settings.items()}
    assert all(isinstance(value, np.generic) for value in arrays.values())
    assert recorded(tmp_path / "numpy", **arrays, freeze_norm=np.True_, plugins=()) == plain
    assert recorded(tmp_path / "torch", **{n: torch.tensor(v) for n, v in settings.items()}) == plain
    assert plain[0]["method"]["seed"] == 3
    assert repr(plain[0]["method"]["temp"]) == "2"  # as it was given


NAMED = {
    **{name: [True, 1.0, "8", [8], float("nan"), -2] for name in WHOLE},
    **{name: [True, "0.5", [0.5], float("nan"), 1j] for name in [*NUMBERS, "ae_lr"]},
    **{name: [True, 1.0, "8", None] for name in ("ae_train_mb_size", "ae_train_epochs")},
    "seed": [True, 1.0, "8", None, 2**70],
    "ae_optimizer": ["", "SGD", torch.optim.SGD, None],
    "on_repeat": ["", None, ["continue"], np.array(["continue", "error"])],
    "unknown": ["", None, "nobody", ["expert"]],
    "transfer": ["", None, "lwf", ["best"]],
    "freeze_norm": ["False", None, 2],
    "confidence_threshold": ["0.5", 0, True],
    "device": ["", "gpu", True, -1, ["cpu"], 1.5],
    "cluster": [{"engine": "inline"}, "auto", ClusterConfig],
    "optimizer": ["sgd", torch.optim.SGD, lambda parameters: None],
    "criterion": [None, "cross_entropy"],
    "plugins": [EarlyStoppingPlugin(1, "valid_stream"), "early", 3],
    "observer": ["print", 3],
    "class_names": [3, "ant", {"a": "ant"}, {-1: "ant"}, {0: 3}, ["ant", None], ""],
    "transform": [3, "imagenet", transforms.ToPILImage(), transforms.Resize, transforms.Resize((9, 9)), True],
    "reference": ["", 3, True, STREAM[0], DataLoader(STREAM[0].dataset), torch.rand(4, *SHAPE), {"mean": 0}, STREAM],
}
ALIASES = {"ae_train_mb_size": "batch_size", "ae_train_epochs": "epochs", "ae_latent_dim": "latent_dim"}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(n, v, id=f"{n}-{str(v)[:30]}-{i}") for n, values in NAMED.items() for i, v in enumerate(values)],
)
def test_a_value_that_cannot_be_meant_is_refused_by_its_setting_s_name(name: str, value: object) -> None:
    def make() -> object:
        model = ExpertGate(SHAPE, arch=tiny_net())
        settings = {"optimizer": torch.optim.SGD(model.expert.parameters(), lr=0.1), name: value}
        return ExpertGateStrategy(model=model, **settings)

    refused(make, ALIASES.get(name, name))


def test_no_setting_of_the_strategy_is_forgotten() -> None:
    checked = {*NAMED, *SGD_ONLY, "model", "evaluator", "base_kwargs", "self"}
    assert set(inspect.signature(ExpertGateStrategy.__init__).parameters) <= checked


def test_references_by_any_path(home: Path) -> None:
    with tiny_strategy() as strategy:
        strategy.train(STREAM)
        strategy.save_reference("~/a.safetensors")
        strategy.save_reference(home / "b.safetensors")
        for value in ("", 3, None, True, ["a"]):
            refused(lambda value=value: strategy.save_reference(value), "path")  # type: ignore[misc]
    assert (home / "b.safetensors").is_file()
    cluster = ClusterConfig(engine="inline", storage="~/run", resume=True)
    for reference in ("~/a.safetensors", home / "a.safetensors", str(home / "a.safetensors")):  # one and the same run
        with tiny_strategy(cluster, reference=reference) as strategy:
            strategy.train(STREAM)
            assert strategy.registry.num_rows == 1


# The model

MODEL: dict[str, list[Any]] = {
    "shape": [3, "316", (3, 16), (3, 16, 16, 1), (3, 16.0, 16), ("3", 16, 16), (3, 0, 16), (True, 16, 16), None],
    "device": ["", "gpu", True, 1.5, -3],
    "arch": ["", " ", None, 3, TinyNet, torchvision.models.resnet18],
    "pretrained_flag": ["False", None, 2],
    "output_layer_name": ["", None, 3, ["features"]],
    "weights": ["", 3, True, {"head.weight": torch.rand(2)}, ResNet18_Weights, b"w.pt", ["w.pt"]],
    "autoencoder": ["", None, "Linear", ["linear"]],
    "gate_score": ["", None, "Shared", ["shared"]],
    "seed": [1.0, "3", None, True, 2**70],
    "head": ["", 3, ["head"]],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(n, v, id=f"{n}-{str(v)[:30]}-{i}") for n, values in MODEL.items() for i, v in enumerate(values)],
)
def test_a_model_s_value_that_cannot_be_meant_is_refused_by_name(name: str, value: object) -> None:
    refused(lambda: ExpertGate(**{"shape": SHAPE, "arch": tiny_net(), name: value}), name)
    assert set(inspect.signature(ExpertGate).parameters) == set(MODEL)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, torch.Size, lambda shape: [np.int64(n) for n in shape]])
def test_shapes_of_any_library(make: Callable[[Any], Any]) -> None:
    shape = ExpertGate(make(SHAPE), arch=tiny_net()).shape
    assert shape == SHAPE
    assert [type(side) for side in shape] == [int, int, int]


@pytest.fixture
def torchvision_s(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of torchvision, which gives random weights here: nothing is downloaded."""
    asked: list[Any] = []
    get_model = torchvision.models.get_model

    def given(name: str, weights: Any) -> Any:
        asked.append(weights)
        return get_model(name, weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", given)
    return asked


@pytest.mark.parametrize(
    "weights",
    [
        *(ResNet18_Weights.IMAGENET1K_V1, ResNet18_Weights.DEFAULT, "IMAGENET1K_V1", "DEFAULT"),
        *("ResNet18_Weights.IMAGENET1K_V1", "torchvision.models.ResNet18_Weights.DEFAULT"),
    ],
    ids=str,
)
def test_weights_by_enum_and_by_name(weights: Any, torchvision_s: list[Any]) -> None:
    model = ExpertGate(**RESNET, weights=weights)
    assert torchvision_s == [ResNet18_Weights.IMAGENET1K_V1]
    assert model.weights == (weights if isinstance(weights, str) else "ResNet18_Weights.IMAGENET1K_V1")
    json.dumps(model.weights)


@pytest.mark.parametrize("weights", [ResNet50_Weights.IMAGENET1K_V1, "ResNet50_Weights.IMAGENET1K_V1"], ids=str)
def test_another_network_s_weights_are_not_taken_for_one_s_own(weights: Any, torchvision_s: list[Any]) -> None:
    refused(lambda: ExpertGate(**RESNET, weights=weights), "ResNet50_Weights.IMAGENET1K_V1", "resnet18")
    assert torchvision_s == []


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_by_any_path(ending: str, home: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    path = home / f"w.{ending}"
    (save_file if ending == "safetensors" else torch.save)(state, path)  # type: ignore[operator]
    for weights in (path, str(path), f"~/w.{ending}"):
        model = ExpertGate(**RESNET, weights=weights)
        assert torch.equal(model.expert.state_dict()["conv1.weight"], state["conv1.weight"])
        assert model.weights == str(path)


def test_weights_beside_a_network_of_one_s_own_are_not_ignored() -> None:
    with pytest.raises(BackboneError, match=r"weights='w\.pt' .* load them into your TinyNet"):
        ExpertGate(SHAPE, arch=tiny_net(), weights="w.pt")


def test_a_device_by_number_is_not_the_cpu() -> None:
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):  # torch's own words: there is none
            ExpertGate(SHAPE, device=0, arch=tiny_net())
    else:
        assert ExpertGate(SHAPE, device=0, arch=tiny_net()).device == torch.device("cuda:0")


# A run, opened again

LOAD: dict[str, list[Any]] = {
    "run_uri": ["", " ", 3, None, True, b"run", ["run"], Path("s3://bucket/run"), "a\0b"],
    "device": ["", "gpu", True],
    "max_resident_experts": [0, True, 1.5, "4", None],
    "arch": [3, TinyNet],
}


def test_a_run_by_any_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_strategy(ClusterConfig(engine="inline", storage="~/run", scratch=home / "scratch")) as strategy:
        strategy.train(STREAM)
        assert strategy.run_dir == str(home / "run")
    monkeypatch.chdir(home)
    images = torch.rand(4, *SHAPE)
    answers = [
        ExpertGate.load(run, arch=tiny_net(), max_resident_experts=np.int64(1))(images)  # type: ignore[arg-type]
        for run in ("~/run", home / "run", str(home / "run"), "run", Path("run"), os.path.relpath(home / "run"))
    ]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    for name, values in LOAD.items():
        for value in values:
            options = {"run_uri": home / "run", "arch": tiny_net(), name: value}
            refused(lambda options=options: ExpertGate.load(**options), name)  # type: ignore[misc]
    assert set(inspect.signature(ExpertGate.load).parameters) == set(LOAD)


# Arguments of the loaders

DROPPED = {
    "collate_fn": "AvalancheDataset(…, collate_fn=…)",
    "batch_size": "train_mb_size and eval_mb_size",
    "sampler": "leave it out",
    "prefetch_factor": "leave it out",
    "timeout": "leave it out",
}


@pytest.mark.parametrize("name", DROPPED)
def test_arguments_that_no_loader_of_avalanche_reads_are_refused_before_anything_is_trained(name: str) -> None:
    with tiny_strategy() as strategy:
        for call in (strategy.train, strategy.eval):
            refused(lambda call=call: call(STREAM, **{name: 3}), f"{call.__name__}({name}=…)", DROPPED[name])
        assert not strategy.workers()


def test_an_argument_that_only_plugins_hear_is_told() -> None:
    class Hears(SupervisedPlugin):  # type: ignore[misc]  # Avalanche is untyped
        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            assert kwargs["num_worker"] == 2

    with tiny_strategy(plugins=[Hears()]) as strategy, pytest.warns(UserWarning, match="'num_worker'.*only plugins"):
        strategy.train(STREAM, num_worker=2)


def test_a_subclass_that_takes_more_arguments_is_given_them() -> None:
    class Sampled(ExpertGateStrategy):
        def make_train_dataloader(self, sampler: Any = None, **kwargs: Any) -> None:
            assert sampler == "mine"
            super().make_train_dataloader(**kwargs)

    with tiny_strategy(cls=Sampled) as strategy:
        strategy.train(STREAM, sampler="mine")
