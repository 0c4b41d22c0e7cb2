"""Settings: the same are the same in every process, and whatever differs is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.training.plugins import EarlyStoppingPlugin, LRSchedulerPlugin
from torch import nn
from torch.optim.lr_scheduler import SequentialLR, StepLR

from distributed_eg import ExpertGate
from distributed_eg.runtime.resuming import differences
from distributed_eg.strategy.tasks.settings_identity import plain_values, settings_identity
from tests.helpers import SHAPE, tiny_net, tiny_strategy


def identity(strategy: Any, **added: Any) -> dict[str, Any]:
    """Its settings; it has no reference."""
    return settings_identity(strategy, on_repeat=strategy.on_repeat, reference=None, added=added)


def strategy(lr: float = 0.05, momentum: float = 0.9, weight: Any = None, **others: Any) -> Any:
    """A strategy with an optimizer of two groups and a weighted criterion."""
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    features, head = model.expert.features.parameters(), model.expert.head.parameters()
    optimizer = torch.optim.SGD([{"params": features}, {"params": head, "lr": lr}], lr=0.05, momentum=momentum)
    if "step_size" in others:
        others["plugins"] = [LRSchedulerPlugin(StepLR(optimizer, others.pop("step_size")))]
    return tiny_strategy(**{"model": model, "optimizer": optimizer, "criterion": nn.CrossEntropyLoss(weight), **others})


def lines(before: Any, after: Any) -> list[str]:
    """What differs between two strategies."""
    return differences(identity(before), identity(after))


def smooth(value: float) -> Any:
    """A criterion that is no module."""
    return partial(nn.functional.cross_entropy, label_smoothing=value)


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ({}, {"lr": 0.1}, "optimizer.groups.1.lr: the run has 0.05, now 0.1"),
        ({}, {"lr": torch.tensor(0.5)}, "optimizer.groups.1.lr: the run has 0.05, now 0.5"),
        ({}, {"train_mb_size": 8}, "train_mb_size: the run has 16, now 8"),
        ({}, {"train_epochs": 3}, "train_epochs: the run has 2, now 3"),
        ({}, {"eval_every": 1}, "eval_every: the run has -1, now 1"),
        ({}, {"peval_mode": "iteration"}, "peval_mode: the run has 'epoch', now 'iteration'"),
        ({}, {"on_repeat": "error"}, "on_repeat: the run has 'continue', now 'error'"),
        (
            {"criterion": smooth(0.1)},
            {"criterion": smooth(0.2)},
            "criterion.keywords.label_smoothing: the run has 0.1, now 0.2",
        ),
        (
            {"plugins": [EarlyStoppingPlugin(2, "valid")]},
            {"plugins": [EarlyStoppingPlugin(3, "valid")]},
            "plugins.0.patience: the run has 2, now 3",
        ),
        ({"step_size": 1}, {"step_size": 2}, "plugins.0.scheduler.step_size: the run has 1, now 2"),
    ],
)
def test_each_setting_gives_its_one_line(before: dict[str, Any], after: dict[str, Any], line: str) -> None:
    assert lines(strategy(**before), strategy(**before)) == []
    assert lines(strategy(**before), strategy(**after)) == [line]


def test_a_setting_that_a_subclass_added_counts() -> None:
    before, after = (identity(strategy(), alpha=alpha) for alpha in (0.2, 0.9))
    assert differences(before, after) == ["strategy.alpha: the run has 0.2, now 0.9"]


def test_the_reference_is_told_as_it_is_given() -> None:
    before, after = (
        settings_identity(strategy(), on_repeat="error", reference=reference, added={})
        for reference in (None, {"length": 3})
    )
    assert differences(before, after) == [
        "reference: the run has None, now nothing",
        "reference.length: the run has nothing, now 3",
    ]


def test_which_parameters_a_group_holds_counts() -> None:
    """As many of other layers."""

    def over(layer: str) -> Any:
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        return tiny_strategy(model=model, optimizer=torch.optim.SGD(model.expert.get_submodule(layer).parameters()))

    [line] = lines(over("head"), over("features.0"))
    assert line.startswith("optimizer.groups.0.params: the run has ")


def test_what_a_scheduler_keeps_to_itself_and_dataclasses_count() -> None:
    def scheduled(milestone: int) -> Any:
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.1)
        parts = [StepLR(optimizer, 1), StepLR(optimizer, 2)]
        plugin = LRSchedulerPlugin(SequentialLR(optimizer, parts, [milestone]))
        plugin.kept = Kept(milestone)  # type: ignore[attr-defined]
        return tiny_strategy(model=model, optimizer=optimizer, plugins=[plugin])

    assert lines(scheduled(1), scheduled(1)) == []
    assert lines(scheduled(1), scheduled(3)) == [
        "plugins.0.kept.value: the run has 1, now 3",
        "plugins.0.scheduler._milestones.0: the run has 1, now 3",
    ]


@dataclass(frozen=True, slots=True)
class Kept:
    """A value in a dataclass without a ``__dict__``."""

    value: int


def test_a_setting_of_every_group_gives_a_line_each() -> None:
    groups = (f"optimizer.groups.{group}.momentum: the run has 0.9, now 0.8" for group in (0, 1))
    assert lines(strategy(), strategy(momentum=0.8)) == list(groups)


def test_weights_of_the_criterion_are_shown_short() -> None:
    [line] = lines(strategy(weight=torch.ones(7)), strategy(weight=torch.arange(7.0)))
    assert line.startswith("criterion.weight: the run has ")
    before, after = line.removeprefix("criterion.weight: the run has ").split(", now ")
    assert len(before) == len(after) == 13
    [line] = lines(strategy(), strategy(weight=torch.ones(7)))
    assert line == f"criterion.weight: the run has nothing, now {before}"


class Opaque:
    """An object that only its class tells."""


class Note(EarlyStoppingPlugin):
    """A plugin with attributes of all kinds."""

    def __init__(self) -> None:
        super().__init__(2, "valid")
        self.model = tiny_net()
        self.table = {(1, 2): torch.arange(3), "fn": tiny_net, "where": Path("a"), "device": torch.device("cpu")}
        self.kinds = {"b", "a"}
        self.opaque = [Opaque(), lambda: 0]
        self.objects = np.array(["a", None, 2], dtype=object)
        self._private = Opaque()


def test_settings_are_json_without_addresses_and_reading_them_changes_nothing() -> None:
    subject = strategy(plugins=[Note()], criterion=smooth(0.1))
    plugins, before = list(subject.plugins), {name: id(value) for name, value in vars(subject).items()}
    text = json.dumps(identity(subject), allow_nan=False)
    assert "0x" not in text
    assert lines(subject, strategy(plugins=[Note()], criterion=smooth(0.1))) == []
    [note] = json.loads(text)["plugins"]
    assert note["table"]["fn"] == "tests.helpers.tiny_net"
    assert note["opaque"][0] == f"{__name__}.Opaque"
    assert note["objects"] == ["a", None, 2]
    assert "_private" not in note
    assert subject.plugins == plugins
    assert {name: id(value) for name, value in vars(subject).items()} == before


def test_evaluator_and_clock_are_no_settings() -> None:
    assert identity(strategy())["plugins"] == []
    assert lines(strategy(), strategy(evaluator=None, eval_mb_size=4)) == []


def test_loader_arguments_are_json() -> None:
    given = {"num_workers": 2, "collate_fn": tiny_net, "generator": torch.Generator(), "weights": torch.ones(2)}
    values = plain_values(given)
    assert values | {"weights": ""} == {
        "num_workers": 2,
        "collate_fn": "tests.helpers.tiny_net",
        "generator": "torch._C.Generator",
        "weights": "",
    }
    assert len(values["weights"]) == 64


ELSEWHERE = """
import json
from avalanche.training.plugins import EarlyStoppingPlugin
from distributed_eg.strategy.tasks.settings_identity import settings_identity
from tests.helpers import tiny_strategy

def everything():
    plugin = EarlyStoppingPlugin(2, "valid")
    plugin.kinds = {"a", "b", "c", "d"}
    strategy = tiny_strategy(plugins=[plugin], eval_every=1)
    return settings_identity(strategy, on_repeat="error", reference=None, added={"names": {"x", "y", "z"}})
"""


def test_another_process_with_another_hash_seed_gives_the_same() -> None:
    scope: dict[str, Any] = {}
    exec(compile(ELSEWHERE, "elsewhere", "exec"), scope)
    found = subprocess.run(
        [sys.executable, "-c", ELSEWHERE + "print(json.dumps(everything()))"],
        env={**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout.splitlines()[-1]) == scope["everything"]()
