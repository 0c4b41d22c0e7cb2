"""The coordinator is killed before and after every record: it comes back from the run directory, and nobody notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from distributed_eg import ClusterConfig
from distributed_eg.errors import RunInUseError
from distributed_eg.runtime.ray_backend.engine import RayEngine
from distributed_eg.store.storage import Storage
from distributed_eg.store.verification import unnamed, verify
from tests.faults.chaos import Chaos, Fault, wait_for
from tests.faults.conftest import train_and_evaluate

pytestmark = [pytest.mark.ray, pytest.mark.faults]


@pytest.fixture
def chaos(ray_local: Path) -> Iterator[Chaos]:
    """The kit, in every process of the suite's Ray."""
    kit = Chaos(ray_local)
    kit.clear()
    yield kit
    kit.clear()


def test_it_is_killed_around_every_kind_of_record(chaos: Chaos, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """No committed task is lost, none is committed twice: a record that was sealed is sealed again with the same
    bytes, one that was not is sealed once."""
    names = ["statistics.json", *(f"tasks/00001/{name}.json" for name in ("task", "autoencoder", "relatedness"))]
    names += ["tasks/00002/timings.json", "tasks/00002/manifest.json", "tables/registry.parquet"]
    moments = ("before", "inside", "after")
    faults = [Fault(f"{moments[i % 3]} seal {name}", "kill") for i, name in enumerate(names)]
    faults += [
        Fault("after seal tasks/00003/manifest.json", "kill"),
        Fault("before seal tasks/00000/manifest.json", "kill"),
    ]
    chaos.plan(*faults)
    run = tmp_path / "run"
    cluster = ClusterConfig(num_workers=2, gpus_per_worker=0, storage=str(run))
    assert train_and_evaluate(cluster) == undisturbed
    chaos.require_fired()
    storage = Storage(str(run))
    assert verify(storage).damages == ()
    assert unnamed(storage) == []
    wait_for(lambda: ray.util.list_named_actors(all_namespaces=True) == [], 20, "the end of the coordinator")


def test_a_second_driver_on_the_same_cluster_is_refused_by_name(
    chaos: Chaos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the storage cannot tell: the coordinator's name is the run's."""
    monkeypatch.setattr("distributed_eg.runtime.ray_backend.actors._NAME_TIMEOUT_S", 1.0)
    config = ClusterConfig(num_workers=1, gpus_per_worker=0, storage=str(tmp_path / "run"))
    first = RayEngine(config, str(tmp_path / "run"), "a-run", 1)
    first.start()
    try:
        second = RayEngine(config, str(tmp_path / "run"), "a-run", 2)
        with pytest.raises(RunInUseError, match="coordinator-a-run: another driver works on it"):
            second.start()
        second.close()
    finally:
        first.close()
    third = RayEngine(config, str(tmp_path / "run"), "a-run", 3)
    third.start()
    third.close()
