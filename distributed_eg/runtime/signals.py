"""Signals that end a run: SIGTERM as an exception, so that what has to be ended is ended, and closing undisturbed.

Job schedulers send SIGTERM and kill seconds later.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_EXIT_CODE = 128 + signal.SIGTERM


class _Handler:
    """SIGTERM's handler within a ``terminable`` block."""

    def __init__(self, after: Any) -> None:
        self.after = after
        """What handles SIGTERM once the block has ended."""
        self.was_told = False

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.was_told = True
        _terminate(number, frame)


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises ``SystemExit(143)``, as Ctrl-C raises ``KeyboardInterrupt``.

    Only the main thread can do so; elsewhere, and where the program has a handler of its own, nothing changes.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not _is_replaceable(before):
        yield
        return
    handler = _Handler(before)
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except SystemExit:
        if handler.was_told:  # Ray's calls pass it on under another code
            raise SystemExit(_EXIT_CODE) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, handler.after)


@contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Around ``ray.init``, which takes SIGTERM over: the handler of a ``terminable`` block comes back, and after that
    block SIGTERM still is an orderly exit, as Ray wants it."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if isinstance(handler, _Handler) and error.code == signal.SIGTERM:  # by Ray's handler, while it started
            handler.was_told = True
        raise
    finally:
        if isinstance(handler, _Handler) and threading.current_thread() is threading.main_thread():
            handler.after = _terminate
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block, which must be short, has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _is_replaceable(handler: object) -> bool:
    """Whether a handler is Python's default, ours, or the one that Ray sets, which ends the process by another code."""
    known = (signal.SIG_DFL, _terminate)
    return handler in known or (getattr(handler, "__module__", None) or "").partition(".")[0] == "ray"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(_EXIT_CODE)
