"""Signals that end a run: each as an exception that is not lost, and closing undisturbed.

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
    """A signal's handler within a ``terminable`` block."""

    def __init__(self, after: Any) -> None:
        self.after = after
        """What handles it once the block has ended."""
        self.was_told = False

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.was_told = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        _terminate(number, frame)


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises ``SystemExit(143)``, as Ctrl-C raises ``KeyboardInterrupt``; ``raise_if_told``
    does so again where the exception went astray.

    Only the main thread can do so; elsewhere, and where the program has a handler of its own, nothing changes.
    """
    handlers: dict[int, _Handler] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: _Handler(known) for number, known in before.items() if _is_replaceable(known)}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    except SystemExit:
        if signal.SIGTERM in handlers and handlers[signal.SIGTERM].was_told:  # Ray's calls give it another code
            raise SystemExit(_EXIT_CODE) from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler.after)


def raise_if_told() -> None:
    """Raise what a signal has raised within the ``terminable`` block, where somebody swallowed it: Ray's calls may."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if isinstance(handler, _Handler) and handler.was_told:
                handler(number, None)


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
    known = (signal.SIG_DFL, signal.default_int_handler, _terminate)
    return handler in known or (getattr(handler, "__module__", None) or "").partition(".")[0] == "ray"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(_EXIT_CODE)
