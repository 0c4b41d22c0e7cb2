"""The errors: one tree, each also what Python calls it, and whole on the other side of a process border."""

from __future__ import annotations

import copy
import pickle

import cloudpickle
import pytest

from distributed_eg import errors
from distributed_eg.errors import ExpertGateError

TREE: dict[str, tuple[type[BaseException], ...]] = {
    "ExpertGateError": (Exception,),
    "InputError": (ExpertGateError, ValueError),
    "BackboneError": (ExpertGateError, errors.InputError, ValueError),
    "ResumeError": (ExpertGateError, errors.InputError, ValueError),
    "StorageError": (ExpertGateError, OSError),
    "DamagedFileError": (ExpertGateError, errors.StorageError, OSError),
    "RunInUseError": (ExpertGateError, errors.StorageError, OSError),
    "ResourceError": (ExpertGateError, RuntimeError),
    "WorkerLostError": (ExpertGateError, RuntimeError),
    "StoppedError": (ExpertGateError, RuntimeError),
    "HookError": (ExpertGateError, RuntimeError),
    "DivergedError": (ExpertGateError, ArithmeticError),
    "TaskFailedError": (ExpertGateError, RuntimeError),
}
MESSAGE = "The images of task 3 (label 7) have shape (1, 28, 28); σ × μ − “quotes”, 100 %."


def defined() -> dict[str, type[BaseException]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == errors.__name__
    }


def test_the_tree_is_the_documented_one() -> None:
    assert set(defined()) == set(TREE)
    assert errors.__doc__ is not None
    for name, bases in TREE.items():
        assert name in errors.__doc__
        assert all(issubclass(defined()[name], base) for base in bases)


def test_one_except_clause_catches_all_of_them() -> None:
    for cls in defined().values():
        with pytest.raises(ExpertGateError, match="task 3"):
            raise cls(MESSAGE)


def test_errors_that_mean_different_things_do_not_catch_each_other() -> None:
    """A lost worker is retried, a wrong input is not."""
    kinds = [cls for cls in defined().values() if ExpertGateError in cls.__bases__]
    for cls in kinds:
        assert [other for other in kinds if issubclass(cls, other)] == [cls]


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("name", TREE)
def test_pickle_round_trip(name: str, protocol: int, pickler: object) -> None:
    error = defined()[name](MESSAGE)
    error.__notes__ = ["raised on worker 2"]
    back = pickle.loads(pickler.dumps(error, protocol=protocol))  # type: ignore[attr-defined]
    assert type(back) is type(error)
    assert str(back) == MESSAGE
    assert back.args == (MESSAGE,)
    assert back.__notes__ == ["raised on worker 2"]


@pytest.mark.parametrize("name", TREE)
def test_copies_are_equal(name: str) -> None:
    error = defined()[name](MESSAGE)
    for twin in (copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == MESSAGE


@pytest.mark.parametrize("name", TREE)
def test_every_error_is_documented(name: str) -> None:
    assert defined()[name].__doc__
