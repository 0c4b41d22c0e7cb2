"""``cluster/local.sh``: several nodes on the loopback, for whoever has the token; ``conftest.py`` sees to its end."""

from __future__ import annotations

import subprocess

import psutil
import pytest

from tests.cluster.conftest import LocalCluster, ray_command

pytestmark = pytest.mark.ray


def test_it_listens_on_the_loopback_only(local_cluster: LocalCluster) -> None:
    below = psutil.Process(local_cluster.process.pid).children(recursive=True)
    assert sum("raylet" in process.name() for process in below) == 3
    ears = [c for process in below for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert {ear.laddr.ip.removeprefix("::ffff:") for ear in ears} == {"127.0.0.1"}


def test_nobody_gets_in_with_another_token(local_cluster: LocalCluster) -> None:
    done = subprocess.run(
        [*ray_command(), "job", "list", "--address", local_cluster.jobs],
        env={**local_cluster.env, "RAY_AUTH_TOKEN": "of-another-cluster-0123456789abcdef0123456789"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "AuthenticationError" in done.stdout + done.stderr
