"""The seam between a run and where its calls run: what an engine must do, and what it reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from distributed_eg.runtime.coordinator import CoordinatorApi
from distributed_eg.runtime.messages import Done, Epoch, Evaluated, Progress, Raised, Request, WorkerSetup
from distributed_eg.runtime.shipping import Shipper
from distributed_eg.schedule.events import WorkerJoined, WorkerLeaving, WorkerLost


@dataclass(frozen=True, slots=True)
class Ended:
    """A call ended, well or not; ``call`` is what it was submitted as."""

    call: int | None
    worker: str
    outcome: Done | Raised


Report: TypeAlias = WorkerJoined | WorkerLeaving | WorkerLost | Ended
Listener: TypeAlias = Callable[[str, Epoch], None]
"""Told how far the expert is that a worker trains."""


class Engine(Protocol):
    """Runs requests on workers. Made without starting anything; where ``start`` fails, ``close`` has to follow.

    ``begin`` and ``end`` stand around what a strategy is called for; right after ``start``, which may come again where
    ``begin`` says so, it has begun.
    """

    shipper: Shipper
    coordinator: CoordinatorApi
    listener: Listener | None
    """Called from within ``wait``; None: nobody wants to know."""

    def observe(self, seen: Progress | Evaluated) -> None:
        """Told of every stage that starts or ends, and of every evaluation, for whoever watches the cluster."""

    def start(self) -> None:
        """Attach to or start what the workers run on, and the coordinator.

        Raises:
            ResourceError: what was asked for is not there.
            RunInUseError: another driver works on the run.
        """

    def add_workers(self, setup: WorkerSetup, num_tasks: int | None) -> None:
        """Bring the pool to its size for ``num_tasks`` tasks (None: unknown); a ready worker reports ``WorkerJoined``.

        Raises:
            ResourceError: no node can hold such a worker.
        """

    def workers(self) -> list[WorkerJoined]:
        """Workers that are ready, and stay."""

    def submit(self, call: int | None, worker: str, request: Request) -> None:
        """Begin a call; its ``Ended`` carries the same number, None where nobody waits for it."""

    def wait(self) -> list[Report]:
        """Reports since the last call, lost workers first; waits a moment for the first. What a lost worker was given
        ends with it, and is not reported.

        Raises:
            ResourceError: no worker came up in time.
            WorkerLostError: no worker is left and none will come.
        """

    def begin(self) -> bool:
        """Work from now on; False where what ``start`` began is gone, so that ``start`` has to come again."""

    def end(self) -> None:
        """Give up every call whose answer is waited for: it is not wanted any more, and its worker is free or replaced.
        Until ``begin`` all that ``start`` began may go, where something else needs the room."""

    def close(self) -> None:
        """End everything that ``start`` and ``add_workers`` began, within a few seconds, whatever runs there."""
