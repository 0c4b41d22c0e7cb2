"""What runs under faults are held against."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_eg import ClusterConfig
from tests.faults.chaos import Chaos, installed
from tests.helpers import DOMAINS, SETTINGS, hashes, outcome, shared_model, tiny_benchmark, tiny_strategy


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Chaos]:
    """The kit, in this process: for inline runs, and for what a driver writes itself."""
    with installed(tmp_path / "chaos") as kit:
        yield kit
        kit.clear()


@pytest.fixture(scope="session", autouse=True)
def nodes_script(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[str], Path] | None]:
    """``nodes.py`` and the file that it prints to, where a test asks what it tells. It mostly waits for Ray: it begins
    with the first test of this folder, and plays its stories while others run."""
    if not any(item.path.name == "test_nodes.py" for item in request.session.items):
        yield None
        return
    printed = tmp_path_factory.mktemp("nodes") / "printed"
    command = [sys.executable, str(Path(__file__).with_name("nodes.py"))]
    with printed.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, text=True) as process:
        yield process, printed
        process.kill()


@pytest.fixture(scope="session")
def undisturbed() -> dict[str, Any]:
    """Everything that must not depend on faults, of a run over four tasks."""
    return train_and_evaluate(ClusterConfig(engine="inline"))


def train_and_evaluate(cluster: ClusterConfig, **overrides: Any) -> dict[str, Any]:
    """One run over four tasks, of which one learns without forgetting."""
    benchmark = tiny_benchmark(DOMAINS)
    with tiny_strategy(cluster, **{**SETTINGS, "model": shared_model(), **overrides}) as strategy:
        strategy.train(benchmark.train_stream)
        return outcome(strategy, strategy.eval(benchmark.test_stream))


def train(storage: Path, domains: tuple[int, ...] = (0, 0, 1), **overrides: Any) -> list[tuple[str, str]]:
    """Train inline into ``storage``, or go on with what it holds; return the hashes of all that is sealed."""
    cluster = ClusterConfig(engine="inline", storage=str(storage), resume=True, checkpoint_every_s=0)
    with tiny_strategy(cluster, **{**SETTINGS, "train_epochs": 3, **overrides}) as strategy:
        strategy.train(tiny_benchmark(domains).train_stream)
        return hashes(strategy)
