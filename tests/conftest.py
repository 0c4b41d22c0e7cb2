"""Fixtures of the whole suite: one Ray for all of it, and the data that some tests need."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before Ray is imported anywhere: no address of another cluster, no telemetry, a token of its own.
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(
    RAY_AUTH_MODE="token",
    RAY_DEDUP_LOGS="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_memory_monitor_refresh_ms="0",
)
os.environ.setdefault("RAY_AUTH_TOKEN", "test-suite-token-0123456789abcdef0123456789abcdef")
warnings.filterwarnings("ignore", message="no QP solver found")

import cloudpickle  # noqa: E402
import pytest  # noqa: E402

from tests import helpers  # noqa: E402
from tests.faults import chaos as kit  # noqa: E402

# Ray's workers cannot import this folder: what they need of it travels by value.
cloudpickle.register_pickle_by_value(helpers)

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def ray_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray on this machine with 2 CPUs and 2 declared GPUs; strategies of the suite attach to it.

    Gives the folder in which its processes look for a plan of the chaos kit.
    """
    import ray

    folder = tmp_path_factory.mktemp("chaos")
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200 * 2**20,
        _temp_dir=tempfile.mkdtemp(prefix="r"),
        namespace="distributed-eg",
        runtime_env=kit.runtime_env(folder),
    )
    yield folder
    ray.shutdown()


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """Folder with MNIST and Fashion-MNIST in torchvision's layout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the datasets are not at {SHARED_DATA.parent.name}/{SHARED_DATA.name} beside the repository")
    return SHARED_DATA
