"""Values of the wrong but obvious type become plain ones at the door; others are refused by their setting's name."""

from __future__ import annotations

import dataclasses
import enum
import fractions
import json
import math
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st

from distributed_eg import given
from distributed_eg.config import AutoencoderConfig, ClusterConfig, MethodConfig
from distributed_eg.errors import InputError

COUNTS = {
    ClusterConfig: ("num_workers", "threads", "max_resident_experts"),
    AutoencoderConfig: ("latent_dim", "epochs", "batch_size"),
    MethodConfig: ("feature_batch_size", "seed"),
}
NUMBERS = {
    ClusterConfig: ("cpus_per_worker", "gpus_per_worker", "startup_timeout_s", "stage_timeout_s", "checkpoint_every_s"),
    AutoencoderConfig: ("lr",),
    MethodConfig: (
        *("temp", "distillation_temp", "rel_thresh", "confidence_threshold", "distillation_weight"),
        "validation_fraction",
    ),
}
FLAGS = {ClusterConfig: ("resume",), MethodConfig: ("freeze_norm",)}
WORDS = {ClusterConfig: ("engine", "on_task_failure"), AutoencoderConfig: ("kind", "optimizer")}
TEXTS = {ClusterConfig: ("storage", "scratch", "address")}


def each(settings: dict[Any, tuple[str, ...]]) -> list[tuple[Any, str]]:
    return [(cls, name) for cls, names in settings.items() for name in names]


def refused(make: Callable[[], object], *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def plain(config: Any, name: str, value: object) -> None:
    """The config holds exactly this value, of exactly this type, and is JSON."""
    found = getattr(config, name)
    assert found == value
    assert type(found) is type(value)
    json.dumps(dataclasses.asdict(config))


@pytest.mark.parametrize(("cls", "name"), each(COUNTS))
@pytest.mark.parametrize(
    "make", [int, np.int64, np.uint8, np.array, torch.tensor, lambda n: enum.IntEnum("Count", {"N": n}).N]
)
def test_whole_numbers_of_any_library(cls: Any, name: str, make: Callable[[int], Any]) -> None:
    plain(cls(**{name: make(3)}), name, 3)


@pytest.mark.parametrize(("cls", "name"), each(COUNTS))
@pytest.mark.parametrize(
    "value",
    [True, False, np.True_, 3.0, 2.5, np.float64(3), "3", "", None, math.nan, math.inf, [3], (3,), np.array([3]), {}],
    ids=repr,
)
def test_no_count(cls: Any, name: str, value: object) -> None:
    refused(lambda: cls(**{name: value}), name, "whole number")


@pytest.mark.parametrize(("cls", "name"), each(NUMBERS))
@pytest.mark.parametrize("make", [float, np.float32, np.float64, np.array, torch.tensor, fractions.Fraction])
def test_numbers_of_any_library(cls: Any, name: str, make: Callable[[float], Any]) -> None:
    plain(cls(**{name: make(0.5)}), name, 0.5)


@pytest.mark.parametrize(("cls", "name"), [place for place in each(NUMBERS) if place[1] != "validation_fraction"])
def test_an_integer_stays_one(cls: Any, name: str) -> None:
    """As it was written down before."""
    for value in (1, np.int64(1), torch.tensor(1)):
        plain(cls(**{name: value}), name, 1)


@pytest.mark.parametrize(("cls", "name"), each(NUMBERS))
@pytest.mark.parametrize("value", [True, np.False_, "0.5", "", [0.5], np.array([0.5]), 0.5j, math.nan, {}], ids=repr)
def test_no_number(cls: Any, name: str, value: object) -> None:
    refused(lambda: cls(**{name: value}), name)


@pytest.mark.parametrize(("cls", "name"), each(NUMBERS))
def test_nothing_infinite_but_where_that_means_something(cls: Any, name: str) -> None:
    """No limit of time; never learning without forgetting."""
    if name.endswith("_s") or name == "rel_thresh":
        assert getattr(cls(**{name: math.inf}), name) == math.inf
    else:
        refused(lambda: cls(**{name: math.inf}), name)
        refused(lambda: cls(**{name: 10**400}), name)


@pytest.mark.parametrize(
    "options", [{"gpus_per_worker": 1.5}, {"gpus_per_worker": 2}, {"cpus_per_worker": 1e-5}, {"gpus_per_worker": 1e-5}]
)
def test_shares_that_ray_does_not_give(options: dict[str, float]) -> None:
    refused(lambda: ClusterConfig(**options), *options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cls", "name"), each(FLAGS))
def test_flags(cls: Any, name: str) -> None:
    rest = {"storage": "run"} if name == "resume" else {}
    for value in (True, 1, np.True_, torch.tensor(True)):
        plain(cls(**{name: value}, **rest), name, True)
    plain(cls(**{name: 0}), name, False)
    for value in ("False", "no", "", 2, 1.0, None, [True], np.array([True, False])):
        refused(lambda value=value: cls(**{name: value}, **rest), name, "True or False")  # type: ignore[misc]


@pytest.mark.parametrize(("cls", "name"), each(WORDS))
@pytest.mark.parametrize("value", ["", "Sgd", None, 1, ["sgd"], np.array(["ray", "sgd"]), AutoencoderConfig()], ids=str)
def test_no_word(cls: Any, name: str, value: object) -> None:
    refused(lambda: cls(**{name: value}), {"kind": "autoencoder"}.get(name, name), "it must be '")


def test_words_of_an_enum() -> None:
    class Kind(str, enum.Enum):  # noqa: UP042 - as users write them
        LINEAR = "linear"

    plain(AutoencoderConfig(kind=Kind.LINEAR), "kind", "linear")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["storage", "scratch"])
def test_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (tmp_path / "a", str(tmp_path / "a"), PurePosixPath("~/a"), "~/a", np.str_("~/a")):
        plain(ClusterConfig(**{name: value}), name, str(tmp_path / "a"))


@pytest.mark.parametrize(("cls", "name"), each(TEXTS))
@pytest.mark.parametrize("value", ["", "  ", "a\0b", 3, True, ["run"], b"run", {"uri": "run"}, object()], ids=repr)
def test_no_path_and_no_address(cls: Any, name: str, value: object) -> None:
    refused(lambda: cls(**{name: value}), f"ClusterConfig.{name}")


@pytest.mark.parametrize("value", [Path("s3://bucket/run"), "gs:/bucket/run", "file:/tmp/run"], ids=str)
def test_a_uri_that_lost_a_slash_is_no_folder(value: object) -> None:
    refused(lambda: ClusterConfig(storage=value), "ClusterConfig.storage", "two")  # type: ignore[arg-type]


def test_an_empty_storage_is_no_temporary_folder() -> None:
    refused(lambda: ClusterConfig(storage="", resume=True), "ClusterConfig.storage is ''")


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**5000], ids=["above", "below", "far"])
def test_seeds_that_torch_does_not_take(seed: int) -> None:
    refused(lambda: MethodConfig(seed=seed), "seed")
    assert MethodConfig(seed=2**64 - 1).seed == 2**64 - 1
    assert MethodConfig(seed=-1).seed == -1


ANYTHING = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary()),
    *(st.lists(st.integers()), st.dictionaries(st.text(), st.integers()), st.builds(object), st.just(torch.rand(2, 2))),
    *(st.integers(-100, 100).map(np.int8), st.floats().map(np.float64), st.just(torch.empty((), device="meta"))),
)
PLACES = [place for kinds in (COUNTS, NUMBERS, FLAGS, WORDS, TEXTS) for place in each(kinds)]


@for_all(st.sampled_from(PLACES), ANYTHING)
def test_whatever_is_given_is_plain_or_refused_by_name(place: tuple[Any, str], value: object) -> None:
    cls, name = place
    refusal = ""
    try:
        config = cls(**{name: value})
    except InputError as error:
        refusal = str(error)
    if refusal:
        assert {"kind": "autoencoder"}.get(name, name) in refusal
        assert "\n" not in refusal
    else:
        assert type(getattr(config, name)) in (bool, int, float, str, type(None))


@for_all(st.integers())
def test_integers_pass_unchanged(value: int) -> None:
    assert given.whole(value, "n") == value


def test_the_nearest_names_are_told_where_there_are_any() -> None:
    names = ["resnet18", "resnet34", "swin_tiny"]
    assert given.nearest("swin", names) == "; the nearest is swin_tiny"
    assert given.nearest("resnet", names) == "; the nearest are resnet34, resnet18"
    assert given.nearest("vgg", names) == ""
