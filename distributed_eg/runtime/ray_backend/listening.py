"""Asks workers, while they train, how far their experts are."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import ray
from ray.exceptions import RayError

from distributed_eg.runtime.engine import Listener

_EVERY_S = 1.0
_EVERY_S_A_WORKER = 0.01
"""What asking one costs the driver is a hundredth of that."""


class Listening:
    """At most one question to a worker is open; nobody waits for an answer."""

    def __init__(self) -> None:
        self._open: dict[Any, str] = {}
        """The name of the worker by its answer's reference."""
        self._next_s = 0.0

    def hear(self, busy: Iterable[tuple[str, Any]], listener: Listener | None) -> None:
        """Hand the answers on that are there, and ask ``busy`` workers, by name and handle, where it is time to."""
        if listener is None:
            return
        there, _ = ray.wait(list(self._open), num_returns=len(self._open), timeout=0) if self._open else ([], [])
        for reference in there:
            worker = self._open.pop(reference)
            try:
                epoch = ray.get(reference)
            except RayError:  # it is lost, as the end of its stage will tell
                continue
            if epoch is not None:
                listener(worker, epoch)
        if time.monotonic() < self._next_s:
            return
        waited_for = {*self._open.values()}
        asked = {handle.epoch.remote(): name for name, handle in busy if name not in waited_for}
        self._open |= asked
        self._next_s = time.monotonic() + max(_EVERY_S, _EVERY_S_A_WORKER * len(asked))
