"""Why a call on a worker failed, and whose exception it was: told from the exception and the frames that it passed."""

from __future__ import annotations

import dis
import signal
import traceback
from collections.abc import Iterator
from types import FrameType, FunctionType

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # not in its stub

from distributed_eg.errors import DamagedFileError, HookError, StorageError, WorkerLostError, told
from distributed_eg.runtime.worker.contract import item_of
from distributed_eg.schedule.events import Cause

_NO_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory"),
    *("cublas_status_alloc_failed", "cusolver_status_alloc_failed", "cusparse_status_insufficient_resources"),
    *("cudnn_status_alloc_failed", "cudnn_status_internal_error_device_allocation_failed", "miopenstatusallocfailed"),
    *("when calling `cublascreate(", "when calling `cusolverdncreate("),  # whatever is said: no room for a handle
    # cuDNN says so where it finds no room for its handle, or for the workspace of any of its engines.
    *("cudnn_status_not_initialized", "unable to find an engine to execute this computation"),
)
"""What torch says, in a plain RuntimeError, where the machine or its accelerator has no memory left."""
_BROKEN = (
    *("cuda error", "hip error", "cuda driver error", "nccl error", "cudnn error", "miopen error"),
    *("cublas_status_", "cusolver_status_", "cusparse_status_", "cudnn_status_", "cufft_", "device-side assert"),
)
"""What torch says, in a RuntimeError, where an accelerator reports anything else: the process cannot go on with it."""
_ONLY_ASKED_WRONG = ("cudnn_status_not_supported", "cudnn_status_bad_param")
"""What is said of the call alone."""


def cause_of(error: BaseException) -> Cause:
    """The cause of a failed stage. What a user's code raises is its own, whatever class and text it gives it; only an
    allocator that found no memory there, or an accelerator that broke, is believed."""
    if isinstance(error, HookError):
        found = error.__cause__
        if found is None or (_is_stated(found) and _dispatch(found)[1]):
            return Cause.RAISED
        return _of_the_machine(found)
    if is_ours(error):
        if isinstance(error, DamagedFileError):  # a file of another task: writing again does not help this one
            return Cause.RAISED
        if isinstance(error, StorageError):
            return Cause.STORAGE
        if isinstance(error, WorkerLostError):  # data that lay on a lost node
            return Cause.NODE_LOST
        return Cause.RAISED if error.__cause__ is None else cause_of(error.__cause__)
    return _of_the_machine(error)


def is_ours(error: BaseException) -> bool:
    """Whether it is an error of this package that its own code raised: users may raise the same classes, and one of
    the storage is a fault of the run's only where no user's code asked for it."""
    raised_in = [frame.f_globals.get("__name__") for frame in _frames(error)][-1:]
    if type(error).__module__ != "distributed_eg.errors" or not all(_is_of_ours(name) for name in raised_in):
        return False
    return not isinstance(error, StorageError | WorkerLostError) or not _dispatch(error)[0]


def ends_process(error: BaseException) -> bool:
    """Whether it is meant for the process, not for the stage that it came up in: Ctrl-C, or what a signal's handler
    raised. A plain ``sys.exit()`` in a user's code is not."""
    if isinstance(error, Exception | KeyboardInterrupt):
        return isinstance(error, KeyboardInterrupt)
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    functions = [part for handler in handlers for part in (handler, vars(type(handler)).get("__call__"))]
    codes = [part.__code__ for part in functions if isinstance(part, FunctionType)]
    return any(frame.f_code in codes for frame in _frames(error))


def users_error(error: BaseException, doing: str, *, place: str = "", note: str = "") -> HookError:
    """What a user's code raised while ``doing``, as an error of ours: where, its class and text, and its traceback."""
    lines = "" if is_ours(error) else "".join(traceback.format_exception(error))  # ours says all there is to say
    return HookError(f"{doing} failed{place or _dispatch(error)[0]}: {told(error)}\n{note}{lines}")


def _dispatch(error: BaseException) -> tuple[str, bool]:
    """Whose code raised it, such as " in the plugin X in before_forward", from the innermost frame of Avalanche's or
    torch's own dispatch, empty without one; and whether that is a user's: all in a loop is, but our own plugins."""
    found, is_users = "", True
    for frame in _frames(error):
        name, local, before = frame.f_code.co_name, frame.f_locals, found
        if name == "trigger_plugins" and {"p", "event"} <= local.keys():
            is_users = not _is_of_ours(type(local["p"]).__module__)
            found = f" in the plugin {type(local['p']).__name__} in {local['event']}" if is_users else ""
        elif name == "_update_metrics_and_loggers" and {"metric", "callback"} <= local.keys():
            found = f" in the metric {_named(local['metric'])} in {local['callback']}"
        elif name == "_getitem_recursive_call" and {"dd", "idx"} <= local.keys():
            found = f" in {item_of(local['dd'], local['idx'])}"
        elif name == "fetch" and "data" in local:
            found = " in the collate function"
        elif name == "criterion" and hasattr(local.get("self"), "_criterion"):
            found = f" in the criterion {_named(local['self']._criterion)}"
        elif name == "optimizer_step":
            found = " in the optimizer's step"
        is_users |= found not in ("", before)
    return found, is_users


def _named(value: object) -> str:
    try:
        return str(getattr(value, "__name__", value))
    except Exception:  # its __str__ may be what is broken
        return type(value).__name__


def _of_the_machine(error: BaseException) -> Cause:
    """What the machine says by an error that nobody's Python code raised: it has no memory, or its accelerator broke;
    RAISED: neither."""
    says = told(error).lower() if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in says for words in _NO_MEMORY):
        return Cause.OUT_OF_MEMORY
    is_broken = isinstance(error, torch.AcceleratorError) or any(words in says for words in _BROKEN)
    if isinstance(error, LinAlgError) or any(words in says for words in _ONLY_ASKED_WRONG):
        is_broken = False
    return Cause.ACCELERATOR if is_broken else Cause.RAISED


def _is_stated(error: BaseException) -> bool:
    """Whether a ``raise`` statement of somebody's raised it. Allocators are no Python code: what a statement says of
    memory is an opinion, and comes again."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _frames(error: BaseException) -> Iterator[FrameType]:
    return (frame for frame, _line in traceback.walk_tb(error.__traceback__))


def _is_of_ours(module: object) -> bool:
    return str(module).partition(".")[0] == "distributed_eg"
