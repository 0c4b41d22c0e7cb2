"""Ray clusters on this machine as cluster/ starts them, for the tests that need one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 180.0
STOP_S = 60.0


@dataclass(frozen=True)
class LocalCluster:
    """What ``cluster/local.sh`` has started."""

    process: subprocess.Popen[str]
    port: int
    dashboard_port: int
    env: dict[str, str]

    @property
    def jobs(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def submit(self, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        """Have a job run to its end; its output is that of the command."""
        return subprocess.run(
            [*ray_command(), "job", "submit", "--address", self.jobs, "--", *entrypoint],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )


def ray_command() -> list[str]:
    """Ray's command, of the interpreter that runs the tests."""
    return [sys.executable, "-m", "ray.scripts.scripts"]


def environment(folder: Path) -> dict[str, str]:
    """As after the activation of the tests' own environment; Ray keeps its files in ``folder``."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": str(folder)}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[LocalCluster]:
    """A head and two nodes of one CPU, by ``cluster/local.sh``; that Ctrl-C ends all of it is seen at the end."""
    port, dashboard_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="r") as folder:  # a short name: sockets lie below
        env = environment(Path(folder))
        process = subprocess.Popen(
            [REPOSITORY / "cluster/local.sh", "2", "1"],
            env={**env, "PORT": str(port), "DASHBOARD_PORT": str(dashboard_port)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            assert f"jobs: http://127.0.0.1:{dashboard_port}" in process.stdout.readline()
            cluster = LocalCluster(process, port, dashboard_port, env)
            deadline = time.monotonic() + START_S
            while (tried := cluster.submit("true")).returncode:  # jobs are taken a while after the nodes are there
                assert time.monotonic() < deadline, tried.stdout[-1000:] + tried.stderr[-1000:]
            yield cluster
            below = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)  # as Ctrl-C does
            assert process.wait(STOP_S) == 0
            _, alive = psutil.wait_procs(below, STOP_S)
            assert alive == [], "cluster/local.sh has left processes behind"
        finally:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """End a process, and whatever it has left below it."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(below, 10)
    for left in alive:
        left.kill()
