"""Drivers in processes of their own, which may be killed; forked from one that has imported everything already."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.faults.chaos import installed

_FORKS = multiprocessing.get_context("forkserver")
_PRELOADED = ["tests.helpers", "distributed_eg.runtime.inline", "distributed_eg.strategy.strategy"]


def start(work: Callable[..., Any], *arguments: Any, chaos: Path) -> BaseProcess:
    """Begin ``work`` as a driver of its own, under the plan in ``chaos``."""
    # Not forked from this process: torch's threads, which it has, do not survive that.
    _FORKS.set_forkserver_preload(_PRELOADED)
    process = _FORKS.Process(target=_drive, args=(chaos, work, arguments))
    process.start()
    return process


def run(work: Callable[..., Any], *arguments: Any, chaos: Path, timeout_s: float = 60) -> int:
    """``start``, then wait for its end: the exit code, -9 where it was killed.

    Raises:
        TimeoutError: it has not ended in time; then it is killed.
    """
    process = start(work, *arguments, chaos=chaos)
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{work.__name__} has not ended within {timeout_s:g} s")
    return process.exitcode


def _drive(chaos: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with installed(chaos):
        work(*arguments)
