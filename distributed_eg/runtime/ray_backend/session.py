"""Ray in this process, which all its strategies share: who uses it, who started it, who makes room for another one."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

import ray

from distributed_eg.config import ClusterConfig
from distributed_eg.runtime.ray_backend.cluster import attach_or_start

logger = logging.getLogger(__name__)


class User(Protocol):
    """An engine that uses this process's Ray."""

    def is_at_rest(self) -> bool:
        """Whether no call of a strategy works with it."""

    def num_workers(self) -> int:
        """How many workers it holds."""

    def give_way(self) -> None:
        """End all that it holds, and stay a user."""


class Session:
    """The one connection to Ray that a process can have.

    A user is told apart from one of an earlier connection, which went with ``ray.shutdown``, by the connection's name.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while somebody comes, goes, begins to work or makes room; a finalizer may do so in the midst of it."""
        self._users: dict[User, str] = {}
        """With the connection that each uses; who worked last stands last."""
        self._ours: str | None = None
        """The connection that was made here, and that the last user ends."""

    def enter(self, user: User, config: ClusterConfig, cpus_per_worker: float) -> None:
        """Attach to the cluster or start Ray, where this process has none yet; raises what ``attach_or_start`` does."""
        with self.lock:
            if attach_or_start(config, cpus_per_worker):
                self._ours = _connection()
            self._users[user] = _connection()

    def leave(self, user: User) -> None:
        """The last one ends Ray, where it was started here and nobody has ended it since."""
        with self.lock:
            self._users.pop(user, None)
            here = _connection()
            if here and here == self._ours and here not in self._users.values():
                ray.shutdown()

    def holds(self, user: User) -> bool:
        """Whether the connection that the user entered is there still."""
        return user in self._users and self._users[user] == _connection()

    def works(self, user: User) -> None:
        """Note that the user works now: it makes room last."""
        self._users[user] = self._users.pop(user)

    def make_room(self, user: User, num_workers: int) -> None:
        """Have others that are at rest give way, who worked longest ago first, until they held that many workers."""
        with self.lock:
            for other in list(self._users):
                if num_workers > 0 and other is not user and other.is_at_rest() and self.holds(other):
                    logger.info("Another strategy of this process is at rest: its workers make room, and come back.")
                    num_workers -= other.num_workers()
                    other.give_way()

    def is_shared(self, user: User) -> bool:
        """Whether others of this process use the Ray that was started here, which is as large as the first needed."""
        return bool(self._ours) and any(self.holds(other) for other in self._users if other is not user)

    def others_work(self, user: User) -> bool:
        """Whether another user of this process works now, and holds what it works with."""
        return any(not other.is_at_rest() for other in self._users if other is not user)


def _connection() -> str:
    """What tells this process's connection to Ray from any other; empty where there is none."""
    if not ray.is_initialized():
        return ""
    context = ray.get_runtime_context()
    return f"{context.get_node_id()}-{context.get_job_id()}"


SESSION = Session()
"""Ray keeps its connection for a whole process; so does what counts its users."""
