"""A driver and the token of a Ray cluster, in a process of its own, for a process reads once whether it uses a token.

    security.py own RUN            trains on a cluster that the package starts; tells its address, then waits for the
                                   end of the standard input
    security.py attach ADDRESS     attaches to a cluster that is there, or is refused
    security.py unguarded          attaches to a cluster that it makes by hand

Each prints JSON lines.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cloudpickle
import psutil
import ray
from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]

from distributed_eg import ClusterConfig
from distributed_eg.errors import ResourceError


class Records(logging.Handler):
    """Everything that is logged in this process, by whomever."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []
        logging.getLogger().addHandler(self)
        logging.getLogger().setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.records.append(record)

    @property
    def text(self) -> str:
        """All of them, with all that they carry."""
        return "\n".join(f"{record.getMessage()} {vars(record)}" for record in self.records)

    @property
    def warnings(self) -> list[str]:
        """What the package itself warned of."""
        ours = [r for r in self.records if r.name.startswith("distributed_eg") and r.levelno >= logging.WARNING]
        return [record.getMessage() for record in ours]


def own(run: str) -> dict[str, Any]:
    """Train two tasks on a cluster that the package starts itself, under a umask that hides nothing; close it."""
    from tests import helpers
    from tests.faults.chaos import wait_for

    cloudpickle.register_pickle_by_value(helpers)
    os.umask(0o022)
    records = Records()

    def tell_address() -> None:
        wait_for(ray.is_initialized, 60, "the cluster")
        print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)

    threading.Thread(target=tell_address, daemon=True).start()
    scratch = Path(run).with_name("scratch")
    scratch.mkdir()
    with helpers.tiny_strategy(ClusterConfig(num_workers=1, storage=run, scratch=str(scratch))) as strategy:
        strategy.train(helpers.tiny_benchmark((0, 1)).train_stream)
        guarded = get_authentication_mode() == AuthenticationMode.TOKEN
        sys.stdin.read()
        processes = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(processes, timeout=20)
    file = Path.home() / ".ray" / "auth_token"
    token = file.read_text().strip()
    files = [path for path in Path(run).rglob("*") if path.is_file()]
    return {
        "guarded": guarded,
        "num_processes": len(processes),
        "left": [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE],
        "scratch": os.listdir(scratch),
        "rows": strategy.registry.num_rows,
        "rights": oct(file.stat().st_mode & 0o777),
        "num_records": len(records.records),
        "num_files": len(files),
        "logged": token in records.text,
        "in_files": [str(path) for path in files if token.encode() in path.read_bytes()],
        "warnings": records.warnings,
    }


def attach(address: str) -> dict[str, Any]:
    """Attach to the cluster at ``address`` as the engine does."""
    from distributed_eg.runtime.ray_backend.cluster import attach_or_start

    records, error, started = Records(), "", time.monotonic()
    try:
        attach_or_start(ClusterConfig(address=address), 1)
    except ResourceError as refused:
        error = str(refused)
    took_s = time.monotonic() - started
    ray.shutdown()
    return {"error": error, "seconds": took_s, "warnings": records.warnings}


def unguarded() -> dict[str, Any]:
    """Attach to a cluster that asks for no token, where the environment says so."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        return attach(cluster.address)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    roles: dict[str, Callable[..., dict[str, Any]]] = {"own": own, "attach": attach, "unguarded": unguarded}
    print(json.dumps(roles[sys.argv[1]](*sys.argv[2:])), flush=True)
