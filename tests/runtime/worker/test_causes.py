"""Why stages fail, told from what they raised."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.utils import trigger_plugins

from distributed_eg.errors import (
    DamagedFileError,
    DivergedError,
    ExpertGateError,
    HookError,
    InputError,
    StorageError,
    WorkerLostError,
)
from distributed_eg.runtime.worker.causes import cause_of, ends_process, is_ours, users_error
from distributed_eg.schedule.events import Cause
from distributed_eg.store.storage import Storage
from tests.helpers import tiny_strategy


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("x"), Cause.RAISED),
        (InputError("x"), Cause.RAISED),
        (DivergedError("x"), Cause.RAISED),
        (DamagedFileError("another task's file"), Cause.RAISED),
        (StorageError("x"), Cause.STORAGE),
        (WorkerLostError("its data lay on a node that is gone"), Cause.NODE_LOST),
        (MemoryError(), Cause.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), Cause.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), Cause.OUT_OF_MEMORY),
        (RuntimeError("shape mismatch"), Cause.RAISED),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            Cause.OUT_OF_MEMORY,
        ),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling"), Cause.OUT_OF_MEMORY),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
            Cause.OUT_OF_MEMORY,
        ),
        (
            RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
            Cause.OUT_OF_MEMORY,
        ),
        (torch.linalg.LinAlgError("linalg.eigh: cusolver error: CUSOLVER_STATUS_INVALID_VALUE"), Cause.RAISED),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if"), Cause.RAISED),
        (RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"), Cause.RAISED),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), Cause.OUT_OF_MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), Cause.OUT_OF_MEMORY),
        (RuntimeError("Unable to find an engine to execute this computation"), Cause.OUT_OF_MEMORY),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), Cause.OUT_OF_MEMORY),
        (torch.AcceleratorError("CUDA error: out of memory"), Cause.OUT_OF_MEMORY),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), Cause.ACCELERATOR),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), Cause.ACCELERATOR),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), Cause.ACCELERATOR),
        (torch.AcceleratorError("CUDA-capable device(s) is/are busy or unavailable"), Cause.ACCELERATOR),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), Cause.ACCELERATOR),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), Cause.ACCELERATOR),
        (
            raised_from(HookError("x"), torch.AcceleratorError("CUDA error: unspecified launch failure")),
            Cause.ACCELERATOR,
        ),
        (ValueError("CUDA error: device-side assert triggered"), Cause.RAISED),
        (raised_from(HookError("x"), MemoryError()), Cause.OUT_OF_MEMORY),
        (raised_from(HookError("x"), raised_from(ValueError(), OSError("x"))), Cause.RAISED),
    ],
    ids=lambda value: value.value if isinstance(value, Cause) else repr(value)[:40],
)
def test_a_cause_is_told_from_what_was_raised(error: Exception, cause: Cause) -> None:
    assert cause_of(error) is cause


def caught(run: Callable[[], object]) -> BaseException:
    """What it raises, with its traceback."""
    try:
        run()
    except BaseException as error:
        return error
    raise AssertionError


def raises(error: BaseException) -> Callable[[], object]:
    """What raises ``error`` by a statement."""

    def run() -> object:
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [
        StorageError("x"),
        WorkerLostError("x"),
        MemoryError(),
        RuntimeError("out of memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ConnectionError(),
        SystemExit(1),
    ],
    ids=repr,
)
def test_what_a_users_statement_raises_comes_again(error: BaseException) -> None:
    """Whatever it says of itself: this module is none of the package's."""
    found = caught(raises(error))
    assert cause_of(caught(lambda: _from(found))) is Cause.RAISED
    assert not is_ours(found)
    assert not ends_process(found)


def test_what_an_allocator_raises_is_believed() -> None:
    for run in (lambda: bytearray(2**62), lambda: torch.empty(2**60)):
        error = caught(run)
        assert cause_of(error) is Cause.OUT_OF_MEMORY
        told = caught(lambda error=error: _from(error))
        assert cause_of(told) is Cause.OUT_OF_MEMORY


def _from(error: BaseException) -> None:
    raise users_error(error, "Training") from error


def test_what_our_own_code_raises_is_ours_where_no_plugin_called_it(tmp_path: Path) -> None:
    """A plugin may open another run."""
    assert is_ours(caught(lambda: _storage_fails(tmp_path)))
    plugin = SupervisedPlugin()
    plugin.before_forward = lambda *_, **__: _storage_fails(tmp_path)  # type: ignore[method-assign, assignment]
    with tiny_strategy(plugins=[plugin]) as strategy:
        assert not is_ours(caught(lambda: trigger_plugins(strategy, "before_forward")))


def _storage_fails(path: Path) -> None:
    Storage(str(path)).read_record("none")


def test_ctrl_c_and_signals_are_the_processs() -> None:
    assert ends_process(caught(raises(KeyboardInterrupt())))
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
    try:
        assert ends_process(caught(lambda: signal.raise_signal(signal.SIGUSR1)))
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ours_are_all_picked_up() -> None:
    """Whatever of our own a stage raises has a cause that the machine knows."""

    def below(kind: type[Exception]) -> list[type[Exception]]:
        return [kind, *(deeper for child in kind.__subclasses__() for deeper in below(child))]

    for kind in below(ExpertGateError):
        assert cause_of(kind("x")) in Cause
