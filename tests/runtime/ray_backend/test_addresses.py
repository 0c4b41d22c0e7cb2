"""Addresses at which there is no cluster to use: refused by name, in time, and open to signals meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.client import ray as client

from distributed_eg import ClusterConfig
from distributed_eg.errors import InputError, ResourceError
from distributed_eg.runtime.ray_backend.cluster import attach_or_start, refuse_client
from distributed_eg.runtime.signals import terminable
from tests.helpers import tiny_benchmark, tiny_strategy


@pytest.fixture(autouse=True)
def unattached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has no Ray yet, whatever the suite's has."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def silent() -> Iterator[str]:
    """Where somebody listens who never says a word."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead() -> str:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("by", ["address", "RAY_ADDRESS", "auto"])
def test_a_dead_cluster_is_waited_for_no_longer_than_asked(
    dead: str, by: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = ClusterConfig(startup_timeout_s=0.7, address={"address": dead, "auto": "auto"}.get(by))
    if by != "address":
        monkeypatch.setenv("RAY_ADDRESS", dead)
    started = time.monotonic()
    with pytest.raises(
        ResourceError, match=rf"No Ray cluster answers at '{dead}'.*startup_timeout_s=0\.7.*RAY_ADDRESS"
    ):
        attach_or_start(config, 1)
    assert time.monotonic() - started < 5
    assert "Nobody answers" in caplog.text


def test_whoever_listens_without_being_a_cluster_is_left_in_time(silent: str) -> None:
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"somebody listens there.*startup_timeout_s=1"):
        attach_or_start(ClusterConfig(address=silent, startup_timeout_s=1), 1)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("address", ["nowhere", "nowhere:notaport", "no.such.host.invalid:6379"])
def test_what_is_no_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(ResourceError, match=rf"No Ray cluster answers at '{address}'"):
        attach_or_start(ClusterConfig(address=address, startup_timeout_s=0), 1)


def test_sigterm_is_heard_while_a_cluster_is_waited_for(dead: str) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        timer.start()
        with pytest.raises(SystemExit) as stop, terminable():
            attach_or_start(ClusterConfig(address=dead, startup_timeout_s=60), 1)
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143


@pytest.mark.parametrize("address", ["ray://head:10001", "http://127.0.0.1:8265", "anyscale://cluster"])
@pytest.mark.parametrize("by", ["address", "RAY_ADDRESS"])
def test_ray_client_is_refused_before_anything_starts(
    address: str, by: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    storage = tmp_path / "run"
    if by == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    config = ClusterConfig(address=address if by == "address" else None, storage=str(storage))
    with pytest.raises(InputError, match=rf"'{address}' is no address .* Ray Client.*host:port"):
        tiny_strategy(config).train(tiny_benchmark((0,)).train_stream)
    assert not storage.exists()


def test_a_process_that_is_connected_by_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "is_connected", lambda: True)
    with pytest.raises(InputError, match="This process is connected by Ray Client"):
        refuse_client(ClusterConfig())


def test_an_address_that_starts_ray_here_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (None, "local", "auto"):
        refuse_client(ClusterConfig(address=address))
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    refuse_client(ClusterConfig(address="127.0.0.1:6379"))
    refuse_client(ClusterConfig(address="local"))
