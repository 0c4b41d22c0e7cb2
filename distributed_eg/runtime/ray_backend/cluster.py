"""The Ray cluster itself: starting or attaching to it, its nodes, the room on them, who may talk to it."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.state import state as _state
from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from distributed_eg.config import ClusterConfig
from distributed_eg.errors import ResourceError
from distributed_eg.runtime.signals import keeping_sigterm

logger = logging.getLogger(__name__)

NAMESPACE = "distributed-eg"


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive."""

    id: str
    address: str
    cpus: float
    gpus: float
    leaving: bool
    """Somebody drains it: what runs there has a while to finish, and nothing new should go there."""

    def room_for(self, cpus: float, gpus: float) -> int:
        """How many workers of that shape the node holds when nobody else is on it."""
        by_cpu = self.cpus // cpus if cpus else math.inf
        # A fraction of a GPU never spans two GPUs.
        by_gpu = self.gpus // gpus if gpus >= 1 else math.inf
        if 0 < gpus < 1:
            by_gpu = self.gpus * (1 // gpus)
        fits = min(by_cpu, by_gpu)
        return int(fits) if math.isfinite(fits) else 1


def attach_or_start(config: ClusterConfig, cpus_per_worker: float) -> bool:
    """Attach to the cluster that ``config`` or RAY_ADDRESS names, else start Ray on this machine.

    Returns:
        Whether Ray was initialized here, so that whoever closes has to shut it down.

    Raises:
        ResourceError: no cluster answers at that address.
    """
    if ray.is_initialized():
        _warn_if_open("This process is attached to")
        return False
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            with keeping_sigterm():
                ray.init(address=address, namespace=NAMESPACE, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, AuthenticationError) as error:
            raise ResourceError(
                f"No Ray cluster answers at {address!r}: {error} Where it asks for a token, set RAY_AUTH_MODE=token "
                "and give it (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)."
            ) from error
        _warn_if_open(f"{address!r} is")
        return True
    wanted = 1 if config.num_workers == "auto" else config.num_workers
    # Ray asks for a token on a cluster that it starts itself, unless RAY_AUTH_MODE says otherwise.
    try:
        with keeping_sigterm():
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(wanted * cpus_per_worker)),
                include_dashboard=False,
                namespace=NAMESPACE,
                logging_level=logging.WARNING,
            )
    finally:
        _hide_token()
    _warn_if_open("RAY_AUTH_MODE makes this")
    return True


def nodes() -> list[Node]:
    """Nodes that are alive."""
    leaving = _state.get_draining_nodes()  # no public call tells
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0),
            node["Resources"].get("GPU", 0),
            node["NodeID"] in leaving,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _warn_if_open(what: str) -> None:
    if get_authentication_mode() != AuthenticationMode.TOKEN:
        logger.warning(
            "%s a Ray cluster that asks for no token: whoever reaches its ports can run any code on it and read its "
            "data. Start every node, and this process, with RAY_AUTH_MODE=token; cluster/README.md says how.",
            what,
        )


def _hide_token() -> None:
    """Ray writes its token with the umask's rights; whoever reads it can run code as this user."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid() and token.stat().st_mode & 0o077:
        token.chmod(0o600)
        logger.info("%s was readable by others; now it is not.", token)
