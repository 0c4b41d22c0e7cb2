"""What users set: frozen, checked when it is made, and refused with the value and the rule in one line."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from distributed_eg.config import AutoencoderConfig, ClusterConfig, MethodConfig
from distributed_eg.errors import InputError

CONFIGS: list[type[Any]] = [ClusterConfig, AutoencoderConfig, MethodConfig]


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("cls", CONFIGS)
def test_frozen_keyword_only_and_free_of_typing_errors(cls: type[Any]) -> None:
    config = cls()
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))
    # A slotted frozen dataclass answers an unknown name with either of the two.
    with pytest.raises((AttributeError, TypeError)):
        config.misspelt = 1
    with pytest.raises(TypeError):
        cls("x")
    with pytest.raises(TypeError):
        cls(misspelt=1)


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_value_equal_hashable_and_able_to_travel(cls: type[Any]) -> None:
    config = cls()
    for twin in (cls(), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert twin == config
        assert hash(twin) == hash(config)


def test_defaults_are_the_paper_s_and_the_documented_ones() -> None:
    method = MethodConfig()
    assert (method.temp, method.rel_thresh) == (None, 0.85)
    assert (method.distillation_weight, method.distillation_temp) == (1.0, 2.0)
    assert method.freeze_norm
    assert method.confidence_threshold is None
    assert (method.autoencoder.kind, method.autoencoder.latent_dim) == ("sgd", 100)
    cluster = ClusterConfig()
    assert (cluster.engine, cluster.threads, cluster.max_resident_experts) == ("ray", 1, 2)
    assert cluster.storage is None


@pytest.mark.parametrize("name", ["num_workers", "threads", "max_resident_experts"])
@pytest.mark.parametrize("value", [0, -3])
def test_cluster_counts_are_at_least_one(name: str, value: int) -> None:
    assert refusal(lambda: ClusterConfig(**{name: value})) == f"ClusterConfig.{name} is {value}; it must be at least 1."
    assert getattr(ClusterConfig(**{name: 1}), name) == 1


@pytest.mark.parametrize("name", ["cpus_per_worker", "gpus_per_worker"])
def test_cluster_shares_are_not_negative(name: str) -> None:
    message = refusal(lambda: ClusterConfig(**{name: -0.5}))
    assert message == f"ClusterConfig.{name} is -0.5; it must not be negative."
    assert getattr(ClusterConfig(**{name: 0.25}), name) == 0.25
    assert getattr(ClusterConfig(**{name: 0}), name) == 0


def test_an_unknown_engine_gets_the_known_ones() -> None:
    message = refusal(lambda: ClusterConfig(engine="spark"))  # type: ignore[arg-type]
    assert all(name in message for name in ("'spark'", "'ray'", "'inline'"))


@pytest.mark.parametrize(
    "options",
    [
        {"address": "auto"},
        {"num_workers": 2},
        {"cpus_per_worker": 2},
        {"gpus_per_worker": 1},
        {"startup_timeout_s": 5},
        {"stage_timeout_s": 60, "num_workers": 3},
    ],
)
def test_the_inline_engine_takes_nothing_that_it_would_not_read(options: dict[str, Any]) -> None:
    message = refusal(lambda: ClusterConfig(engine="inline", **options))
    assert all(name in message for name in options)
    assert ClusterConfig(engine="inline", num_workers=1).num_workers == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"kind": "variational"}, ("'variational'", "'sgd'", "'linear'")),
        ({"optimizer": "lbfgs"}, ("ae_optimizer", "'lbfgs'", "'sgd'", "'adagrad'", "'adam'")),
        ({"latent_dim": 0}, ("latent_dim is 0", "at least 1")),
        ({"epochs": 0}, ("epochs is 0", "at least 1")),
        ({"batch_size": -1}, ("batch_size is -1", "at least 1")),
        ({"lr": 0.0}, ("ae_lr is 0.0", "positive")),
        ({"lr": -1e-3}, ("ae_lr is -0.001", "positive")),
        ({"lr": math.nan}, ("ae_lr is nan", "positive")),
    ],
)
def test_autoencoder_settings_that_cannot_work(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = refusal(lambda: AutoencoderConfig(**options))
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"temp": 0.0}, ("temp is 0.0", "positive")),
        ({"temp": math.nan}, ("temp is nan", "positive")),
        ({"distillation_temp": -1.0}, ("distillation_temp is -1.0", "positive")),
        ({"validation_fraction": 0.0}, ("validation_fraction is 0.0", "between 0 and 1")),
        ({"validation_fraction": 1.0}, ("validation_fraction is 1.0", "between 0 and 1")),
        ({"validation_fraction": math.nan}, ("validation_fraction is nan",)),
        ({"confidence_threshold": 0.0}, ("confidence_threshold is 0.0", "(0, 1]")),
        ({"confidence_threshold": 1.5}, ("confidence_threshold is 1.5", "(0, 1]")),
        ({"confidence_threshold": math.nan}, ("confidence_threshold is nan",)),
        ({"distillation_weight": -0.1}, ("distillation_weight is -0.1", "not be negative")),
        ({"distillation_weight": math.nan}, ("distillation_weight is nan",)),
        ({"rel_thresh": math.nan}, ("rel_thresh is nan",)),
        ({"feature_batch_size": 0}, ("feature_batch_size is 0",)),
        ({"feature_batch_size": -2}, ("feature_batch_size is -2",)),
    ],
)
def test_method_settings_that_cannot_work(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = refusal(lambda: MethodConfig(**options))
    assert all(part in message for part in parts)


def test_settings_on_the_border_are_allowed() -> None:
    assert MethodConfig(confidence_threshold=1.0).confidence_threshold == 1.0
    assert MethodConfig(distillation_weight=0.0).distillation_weight == 0.0
    for rel_thresh in (-math.inf, math.inf, 0.0, 2.0):  # always, or never, learning without forgetting
        assert MethodConfig(rel_thresh=rel_thresh).rel_thresh == rel_thresh


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(InputError):
        dataclasses.replace(MethodConfig(), temp=-1.0)
