"""SIGTERM as an exception, so that what has to be ended is ended: job schedulers send it and kill seconds later."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises ``SystemExit(143)``, as Ctrl-C raises ``KeyboardInterrupt``.

    Only the main thread can do so; elsewhere, and where the program has a handler of its own, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread() or not _replaceable(signal.getsignal(signal.SIGTERM)):
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _replaceable(handler: object) -> bool:
    """Whether a handler is Python's default or the one that Ray sets, which ends the process by another code."""
    return handler is signal.SIG_DFL or getattr(handler, "__module__", "").partition(".")[0] == "ray"


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(_EXIT_CODE)
