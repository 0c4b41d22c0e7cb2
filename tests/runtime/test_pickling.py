"""The pickler of all that travels: what Python can pickle arrives; what it cannot is named by the way to it."""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import pickle
import sqlite3
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import cloudpickle
import numpy
import pytest
import torch
from torchvision import transforms

from distributed_eg.errors import InputError, WorkerLostError
from distributed_eg.runtime import pickling
from distributed_eg.runtime.pickling import dumps, load
from tests.helpers import tiny_benchmark, tiny_strategy

# As a script's own module: all that is defined here travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LOCK = threading.Lock()


class Box:
    """Holds a value."""

    def __init__(self, value: object) -> None:
        self.value = value


class Slots:
    """Has no ``__dict__``."""

    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held = held


class Raises:
    """Raises when it is pickled, or when it is made again."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


class Guarded:
    """One of its methods reads a lock of its module."""

    def method(self) -> Any:
        """Reads it."""
        return LOCK


class Colour(enum.Enum):
    """An enumeration of a script."""

    RED = 1


@dataclasses.dataclass
class Point:
    """A dataclass of a script."""

    x: int = 0
    colour: Colour = Colour.RED


def linked(length: int) -> Box:
    """Boxes in boxes."""
    return functools.reduce(lambda inner, _: Box(inner), range(length), Box(None))


def in_a_circle(culprit: object) -> Box:
    """The culprit behind a circle."""
    box = Box(None)
    box.value = [Box(box), culprit]
    return box


def names_submodules(x: Any) -> Any:
    """Reads attributes that are named as submodules of torch are."""
    return torch.zeros(1), x.classes, x.ops, x.backends.cudnn.deterministic, x._dynamo.config


# What travels

MODULES = {
    "plain": numpy,
    "with a dot": torch.nn.functional,
    "torch.ops": torch.ops,
    "torch.ops.aten": torch.ops.aten,
    "torch.classes": torch.classes,
    "cudnn": torch.backends.cudnn,
    "itself": sys.modules["distributed_eg.runtime.pickling"],
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES.keys())
def test_a_module_that_is_held_travels_by_its_name(module: Any) -> None:
    assert pickle.loads(dumps(Box(module), "A box")).value is module


def test_attribute_names_that_torch_has_as_submodules_do_no_harm() -> None:
    """cloudpickle takes them for ``torch.classes`` and its like, which are modules of classes of their own."""
    model = Box(None)
    model.classes, model.ops, model.backends, model._dynamo = 1, 2, torch.backends, torch._dynamo
    assert pickle.loads(dumps(names_submodules, "A function"))(model)[1:3] == (1, 2)


@pytest.mark.parametrize(
    "value",
    [Colour.RED, Point(3), logging.getLogger("a.b"), logging.LoggerAdapter(logging.getLogger("a"), {})],
    ids=str,
)
def test_what_scripts_define_and_hold_travels(value: Any) -> None:
    arrived = pickle.loads(dumps(Box(value), "A box")).value
    assert str(arrived) == str(value)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_is_printed_to_is_that_of_the_worker(stream: str) -> None:
    """A notebook's, and pytest's, are no plain files."""
    assert pickle.loads(dumps(Box(getattr(sys, stream)), "A box")).value is getattr(sys, stream)


def test_functions_of_a_script_travel() -> None:
    offset = 2
    for function in (lambda x: x + offset, functools.partial(int.__add__, 2)):
        assert pickle.loads(dumps(function, "A function"))(1) == 3


# What does not

CANNOT: dict[str, tuple[Callable[[], Any], str, str]] = {
    "lock": (threading.Lock, "value", "TypeError"),
    "weak reference": (lambda: weakref.ref(Box), "value", "TypeError"),
    "generator": (lambda: (i for i in "a"), "value", "TypeError"),
    "database": (lambda: sqlite3.connect(":memory:"), "value", "TypeError"),
    "log handler": (logging.StreamHandler, "value.lock", "TypeError"),
    "slot": (lambda: Slots(threading.Lock()), "value.held", "TypeError"),
    "containers": (lambda: {"a": [0, (1, threading.Lock())]}, "value.a.1.1", "TypeError"),
    "transform": (
        lambda: transforms.Compose([transforms.ToTensor(), Box(threading.Lock())]),
        "value.transforms.1.value",
        "TypeError",
    ),
    "closure": (lambda: (lambda held: lambda: held)(threading.Lock()), "value.__closure__.held", "TypeError"),
    "global": (Guarded, "value.method.__globals__.LOCK", "TypeError"),
    "circle": (lambda: in_a_circle(threading.Lock()), "value.value.1", "TypeError"),
    "KeyError": (lambda: Raises(KeyError("x")), "value", "KeyError"),
    "OSError": (lambda: Raises(OSError("x")), "value", "OSError"),
    "StopIteration": (lambda: Raises(StopIteration()), "value", "StopIteration"),
    "RecursionError": (lambda: Raises(RecursionError()), "value", "PicklingError"),
}


@pytest.mark.parametrize(("make", "where", "error"), CANNOT.values(), ids=CANNOT.keys())
def test_what_cannot_be_pickled_is_named_by_the_way_to_it(make: Callable[[], Any], where: str, error: str) -> None:
    with pytest.raises(InputError) as caught:
        dumps(Box(make()), "The plugin X")
    message = str(caught.value)
    assert message.startswith(f"The plugin X cannot be sent to a worker: attribute '{where}' of Box, a ")
    assert f" cannot be pickled: {error}: " in message
    assert "before_training" in message


def test_a_value_that_cannot_be_pickled_itself_has_no_way_to_it() -> None:
    with pytest.raises(InputError, match=r"^The lock cannot be sent to a worker: TypeError: cannot pickle "):
        dumps(threading.Lock(), "The lock")


def test_what_is_nested_too_deeply_is_told_in_short() -> None:
    with pytest.raises(InputError, match=r"'value\.value.*…\.value") as caught:
        dumps(linked(100_000), "The list")
    assert len(str(caught.value)) < 500


# What cannot be made again


def refuse(error: BaseException) -> None:
    """Raise it."""
    raise error


@pytest.mark.parametrize("error", [KeyError("k"), OSError("gone"), RuntimeError("no GPU"), SystemExit(2)], ids=repr)
def test_what_cannot_be_made_again_is_named(error: BaseException) -> None:
    with pytest.raises(InputError, match=r"^The plugin X cannot be made on a worker .*: ") as caught:
        load(partial(refuse, error), "The plugin X")
    assert f"{type(error).__name__}: {error}" in str(caught.value)
    assert "py_modules" not in str(caught.value)


def test_a_missing_module_is_named_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"The plugin X .* No module named 'not_there'.*py_modules.*working_dir"):
        load(partial(__import__, "not_there"), "The plugin X")


@pytest.mark.parametrize("error", [WorkerLostError("the data"), MemoryError()], ids=repr)
def test_what_is_no_fault_of_the_value_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        load(partial(refuse, error), "The plugin X")
    assert caught.value is error


class Elsewhere:
    """Has every tensor count as one on a card; notes what is moved to the CPU before it is pickled."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.moved = 0
        cpu = torch.Tensor.cpu

        def noted(tensor: torch.Tensor) -> torch.Tensor:
            self.moved += 1
            return cpu(tensor)

        patch.setattr(torch.Tensor, "cpu", noted)
        patch.setattr(pickling, "_TRAVEL", ("meta",))


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0)[::2],
        torch.nn.Parameter(torch.ones(2), requires_grad=False),
        {"in": [torch.nn.Linear(2, 2)]},
        torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0])),
    ],
    ids=["view", "parameter", "module", "criterion"],
)
def test_tensors_arrive_on_the_cpu(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker, or a driver, may have no card, or fewer: what was on one must not need one to be read."""
    elsewhere = Elsewhere(monkeypatch)
    arrived = pickle.loads(dumps(value, "it"))
    assert elsewhere.moved
    assert type(arrived) is type(value)
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(arrived), tensors_in(value), strict=True))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Its tensors, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [*(value["in"][0] if isinstance(value, dict) else value).state_dict().values()]


def test_all_that_travels_goes_through_that_pickler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmark, trainer with its plugins and metrics, network on the way to workers."""
    elsewhere = Elsewhere(monkeypatch)
    with tiny_strategy(criterion=torch.nn.CrossEntropyLoss(weight=torch.ones(2))) as strategy:
        strategy.train(tiny_benchmark((0,)).train_stream)
    assert elsewhere.moved > 3
