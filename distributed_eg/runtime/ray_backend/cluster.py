"""The Ray cluster itself: starting or attaching to it, its nodes, the room on them, who may talk to it."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._private.state import available_resources_per_node
from ray._private.state import state as _state
from ray._raylet import AuthenticationMode, GcsClient, get_authentication_mode  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RpcError
from ray.util.client import ray as client

from distributed_eg.config import ClusterConfig
from distributed_eg.errors import InputError, ResourceError
from distributed_eg.masking import masked, masked_in
from distributed_eg.runtime.ray_backend.cpus import usable_cpus
from distributed_eg.runtime.signals import keeping_sigterm

logger = logging.getLogger(__name__)

NAMESPACE = "distributed-eg"
_RETRY_S = 0.5
_TOKEN_ADVICE = "Start every node, and this process, with RAY_AUTH_MODE=token; cluster/README.md says how."


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
        by_cpu = _times(cpus, self.cpus) if cpus else math.inf
        by_gpu = self.gpus // 1 * _times(gpus, 1) if gpus else math.inf  # a part of a GPU never spans two
        fits = min(by_cpu, by_gpu)
        return int(fits) if math.isfinite(fits) else 1


def _times(share: float, of: float) -> int:
    """How often a share goes into something, counted as Ray does, in ten-thousandths: 1 // 0.1 is 9."""
    return round(10_000 * of) // round(10_000 * share)


def refuse_client(config: ClusterConfig) -> None:
    """Refuse Ray Client, and whatever else is no cluster's own address, before anything starts.

    Raises:
        InputError: ``config`` or RAY_ADDRESS names such an address, or this process is connected by Ray Client.
    """
    address = None if ray.is_initialized() else _address(config)
    if client.is_connected():
        what = "This process is connected by Ray Client (ray.init of a ray:// address)"
    elif address is not None and "://" in address:
        what = f"{address!r} is no address of a Ray cluster itself, but of a service in front of it, such as Ray Client"
    else:
        return
    raise InputError(
        f"{what}, through which no workers can be driven. Run this program on a node of the cluster, by `ray job "
        "submit` for instance, and give the address host:port that `ray start` printed, or 'auto'."
    )


def attach_or_start(config: ClusterConfig, cpus_per_worker: float) -> bool:
    """Attach to the cluster that ``config`` or RAY_ADDRESS names, else start Ray on this machine.

    Returns:
        Whether Ray was initialized here, so that whoever closes has to shut it down.

    Raises:
        InputError: this process is attached to another cluster than ``config`` names.
        ResourceError: no cluster answers at that address within ``startup_timeout_s``.
    """
    if ray.is_initialized():
        _refuse_other_cluster(config)
        _warn_if_open("This process is attached to")
        return False
    address = _address(config)
    if address:
        try:
            _wait_for(address, config.startup_timeout_s)
            _init(address=address)
        except (ConnectionError, RuntimeError, ValueError, AuthenticationError, RpcError) as error:
            told = masked_in(str(error), address).rstrip(".")
            raise ResourceError(
                f"No Ray cluster answers at {masked(address)!r}: {told}. Where the address is right, start the "
                "cluster, or raise startup_timeout_s until it is up; where it comes from RAY_ADDRESS, unset that to "
                "start Ray on this machine. Where it asks for a token, set RAY_AUTH_MODE=token and give it "
                "(RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)."
            ) from (error if told == str(error).rstrip(".") else None)
        _warn_if_open(f"{masked(address)!r} is")
        return True
    wanted = 1 if config.num_workers == "auto" else config.num_workers
    # Ray asks for a token on a cluster that it starts itself, unless RAY_AUTH_MODE says otherwise.
    try:
        num_cpus = max(usable_cpus(), math.ceil(wanted * cpus_per_worker))
        _init(address="local", num_cpus=num_cpus, include_dashboard=False)
    finally:
        _hide_token()
    _warn_if_open("RAY_AUTH_MODE makes this", "Leave it out, or set it to token.")
    return True


def _address(config: ClusterConfig) -> str | None:
    """The cluster to attach to; None: Ray is started here."""
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "auto":  # Ray itself looks there first, too
        address = os.environ.get("RAY_ADDRESS") or address
    return None if address == "local" else address


def _init(**options: Any) -> None:
    """``ray.init``; nothing of a start that was interrupted stays."""
    try:
        with keeping_sigterm():
            ray.init(namespace=NAMESPACE, logging_level=logging.WARNING, **options)
    except BaseException:
        ray.shutdown()
        raise


def _wait_for(address: str, timeout_s: float) -> None:
    """Wait until a cluster answers: ``ray.init`` would try for a quarter of an hour, and hear no signal meanwhile.

    Raises:
        ConnectionError: none does in time.
        AuthenticationError: a token is to be used, and there is none.
    """
    until = time.monotonic() + timeout_s
    host, port = _endpoint(address)
    said = False
    while True:
        try:
            socket.create_connection((host, int(port)), max(0.1, until - time.monotonic())).close()
            break
        except OSError as error:
            if time.monotonic() + _RETRY_S > until:
                raise ConnectionError(f"not within startup_timeout_s={timeout_s:g} ({error}).") from error
            if not said:
                logger.warning("Nobody answers at %s (%s); trying for %.0f s.", address, error, timeout_s)
                said = True
        time.sleep(_RETRY_S)
    if address == "auto":  # only ray.init itself finds the token of a cluster that it found itself
        return
    ensure_token_if_auth_enabled(create_token_if_missing=False)  # a client without one would end the process
    # Somebody listens; whether that is a cluster only a call tells, which may hang: another thread can be left alone.
    answers: Future[None] = Future()
    threading.Thread(target=_ask, args=(address, answers), name="distributed-eg-probe", daemon=True).start()
    try:
        answers.result(max(0.1, until - time.monotonic()))
    except FutureTimeoutError:
        raise ConnectionError(
            f"somebody listens there, but no Ray cluster answered within startup_timeout_s={timeout_s:g}."
        ) from None


def _ask(address: str, answers: Future[None]) -> None:
    try:
        GcsClient(address=address)
        answers.set_result(None)
    except Exception as error:  # it is raised again where somebody waits for it
        answers.set_exception(error)


def _refuse_other_cluster(config: ClusterConfig) -> None:
    """A process is attached to one cluster at a time: training on another one than was named must not go unseen."""
    here = ray.get_runtime_context().gcs_address
    if config.address not in (None, "auto", "local") and _endpoint(config.address) != _endpoint(here):
        raise InputError(
            f"ClusterConfig.address is {masked(config.address)!r}, but this process is attached to the Ray cluster at "
            f"{here!r}, and to one only at a time. Close the strategies that use that one and call ray.shutdown() "
            "first, or leave address out."
        )


def _endpoint(address: str) -> tuple[str, str]:
    """Host and port as Ray understands them: this machine by its address, however it is called."""
    host, _, port = str(services.canonicalize_bootstrap_address(address)).rpartition(":")
    try:
        return socket.gethostbyname(host.strip("[]")), port
    except OSError:  # a name that this machine does not know, or an IPv6 address
        return host.strip("[]"), port


def nodes(*, free: bool = False) -> list[Node]:
    """Nodes that are alive; with ``free`` only what nobody holds of them now."""
    leaving = _state.get_draining_nodes()  # no public call tells
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    room = {name: node["Resources"] for name, node in alive.items()}
    if free:
        room |= {name: there for name, there in available_resources_per_node().items() if name in alive}
    return [
        Node(name, node["NodeManagerAddress"], room[name].get("CPU", 0), room[name].get("GPU", 0), name in leaving)
        for name, node in alive.items()
    ]


def refuse_infeasible(there: list[Node], cpus: float, gpus: float, *, is_shared: bool) -> None:
    """Refuse workers of a shape that no node can ever hold; ``is_shared``: another strategy of this process uses the
    Ray that was started here.

    Raises:
        ResourceError: what was asked for, and what the nodes offer.
    """
    if any(node.room_for(cpus, gpus) for node in there if not node.leaving):
        return
    offers = ", ".join(f"{node.address}: {node.cpus:g} CPU, {node.gpus:g} GPU" for node in there)
    lower = " or ".join(name for name, demand in {"cpus_per_worker": cpus, "gpus_per_worker": gpus}.items() if demand)
    advice = "Close the other strategies of this process first: Ray is as large as their first one needed it."
    raise ResourceError(
        f"A worker asks for {cpus:g} CPU and {gpus:g} GPU, which no node has ({offers}); lower {lower}, or add a node."
        f"{f' {advice}' if is_shared else ''}"
    )


def _warn_if_open(what: str, advice: str = _TOKEN_ADVICE) -> None:
    if get_authentication_mode() != AuthenticationMode.TOKEN:
        logger.warning(
            "%s a Ray cluster that asks for no token: whoever reaches its ports can run any code on it and read its "
            "data. %s",
            what,
            advice,
        )


def _hide_token() -> None:
    """Ray writes its token with the umask's rights; whoever reads it can run code as this user."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid() and token.stat().st_mode & 0o077:
        token.chmod(0o600)
        logger.info("%s was readable by others; now it is not.", token)
