"""The registry read from a run directory: what it adds up to, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from distributed_eg.config import AutoencoderConfig, MethodConfig
from distributed_eg.errors import StorageError
from distributed_eg.store import records
from distributed_eg.store.records import (
    AutoencoderRecord,
    RelatednessRecord,
    StageTiming,
    StatisticsRecord,
    TaskManifest,
    TaskRecord,
    TaskTimings,
)
from distributed_eg.store.registry import ExpertRef, GateRef, Registry
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.types import TransferChoice

STATISTICS = StatisticsRecord(Artifact("s", "sha-s", 1), 60)


def write_task(storage: Storage, task: int, label: int) -> TaskManifest:
    """Every record of a task whose parent is the task before."""
    parent = task - 1 if task else None
    autoencoder, expert = Artifact(f"a{task}", f"sha-a{task}", 1), Artifact(f"e{task}", f"sha-e{task}", 1)
    columns = ((parent,), (2.0,)) if task else ((), ())
    choice = TransferChoice(parent, "lwf" if task else "fresh")
    records.seal(storage, AutoencoderRecord(task, label, "linear", autoencoder, 60))
    related = records.seal(storage, RelatednessRecord(task, choice, 1.0, 4.0, "variance", *columns))
    classes = (2 * task, 2 * task + 1)
    records.seal(storage, TaskRecord(task, label, classes, (task,), None, {}))
    manifest = TaskManifest(task, label, (task,), classes, parent, choice.transfer, None, autoencoder, related, expert)
    records.seal(storage, manifest)
    records.seal(storage, TaskTimings(task, (StageTiming("expert", "w0", 1.0),)))
    return manifest


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A run of three tasks with labels 30, -4 and 7."""
    storage = Storage(str(tmp_path / "run"))
    records.seal(storage, STATISTICS)
    for task, label in enumerate((30, -4, 7)):
        write_task(storage, task, label)
    return storage


def test_an_empty_directory_is_an_empty_registry(tmp_path: Path) -> None:
    registry = Registry.read(Storage(str(tmp_path / "nothing")))
    assert registry == Registry()
    assert [len(table) for table in registry.tables()] == [0, 0]


def test_labels_name_sealed_tasks(storage: Storage) -> None:
    registry = Registry.read(storage)
    assert {task: manifest.label for task, manifest in registry.newest.items()} == {0: 30, 1: -4, 2: 7}
    found = [registry.of_label(label) for label in (30, -4, 7, 0)]
    assert [manifest and manifest.task for manifest in found] == [0, 1, 2, None]


def test_a_new_label_gets_a_new_number_and_a_failed_one_the_number_that_it_had(
    storage: Storage, tmp_path: Path
) -> None:
    assert Registry().number(5) == 0
    assert Registry.read(storage).number(5) == 3
    (tmp_path / "run/tasks/00001/manifest.json").unlink()
    registry = Registry.read(storage)
    assert registry.number(-4) == 1
    assert registry.number(5) == 3


def test_references_name_what_was_sealed(storage: Storage) -> None:
    registry = Registry.read(storage)
    assert registry.expert_ref(2) == ExpertRef(Artifact("e2", "sha-e2", 1), (4, 5))
    method = MethodConfig(autoencoder=AutoencoderConfig(kind="linear"), temp=0.5, confidence_threshold=0.1)
    autoencoders = tuple((task, Artifact(f"a{task}", f"sha-a{task}", 1)) for task in range(3))
    assert registry.gate_ref(method) == GateRef("linear", STATISTICS, autoencoders, 0.5, 0.1)


def test_a_task_without_a_manifest_is_no_task_yet(storage: Storage, tmp_path: Path) -> None:
    """Its autoencoder must not take part in the gate: there would be no expert to send a sample to."""
    (tmp_path / "run/tasks/00002/manifest.json").unlink()
    registry = Registry.read(storage)
    assert set(registry.autoencoders) == {0, 1, 2}
    assert set(registry.manifests) == {0, 1}
    assert registry.of_label(7) is None
    assert [task for task, _ in registry.gate_ref(MethodConfig()).autoencoders] == [0, 1]
    assert [set(table["task"].to_pylist()) for table in registry.tables()] == [{0, 1}, {1}]


def test_tables_are_in_task_order_whatever_the_order_of_commits(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for task in (2, 0, 1):
        write_task(storage, task, task)
    registry, relatedness = Registry.read(storage).tables()
    assert registry["task"].to_pylist() == [0, 1, 2]
    assert registry["parent"].to_pylist() == [None, 0, 1]
    assert relatedness["candidate"].to_pylist() == [0, 1]


def test_timings_are_not_needed(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "run/tasks/00001/timings.json").unlink()
    registry, _ = Registry.read(storage).tables()
    assert registry["train_s"].to_pylist() == [1.0, 0.0, 1.0]
    assert registry["worker"].to_pylist() == ["w0", None, "w0"]


def test_a_manifest_that_names_another_autoencoder_is_refused(storage: Storage) -> None:
    record = records.read(storage, AutoencoderRecord, 1)
    assert record is not None
    records.seal(storage, replace(record, artifact=replace(record.artifact, sha256="another")))
    with pytest.raises(StorageError, match=r"00001/manifest\.json.*does not fit"):
        Registry.read(storage)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def _change(file: Path) -> None:
    """Still JSON, still a record of that task, but not the one that was sealed."""
    file.write_text(file.read_text().replace("2.0", "2.5").replace("sha-a1", "sha-b1"))


@pytest.mark.parametrize("harm", [_truncate, Path.unlink, _change], ids=["truncated", "missing", "changed"])
@pytest.mark.parametrize("name", ["autoencoder", "relatedness"])
def test_a_sealed_task_whose_records_are_harmed_is_refused_and_named(
    storage: Storage, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    """The manifest names the hash of the relatedness record, and the autoencoder that the other record describes."""
    harm(tmp_path / "run" / f"tasks/00001/{name}.json")
    with pytest.raises(StorageError, match=r"task 1|tasks/00001"):
        Registry.read(storage)


def test_a_damaged_manifest_is_named_and_does_not_unseal_the_task(storage: Storage, tmp_path: Path) -> None:
    _truncate(tmp_path / "run/tasks/00001/manifest.json")
    with pytest.raises(StorageError, match=r"tasks/00001/manifest\.json"):
        Registry.read(storage)


def test_what_others_put_beside_the_tasks_is_left_alone(storage: Storage, tmp_path: Path) -> None:
    """Desktops and NFS leave files of their own in any folder that somebody looks into."""
    (tmp_path / "run/tasks/.DS_Store").write_bytes(b"\0")
    (tmp_path / "run/tasks/.nfs0000000012").write_bytes(b"")
    (tmp_path / "run/tasks/00001/.writing-abc").write_bytes(b"half")
    assert set(Registry.read(storage).manifests) == {0, 1, 2}


def test_a_record_is_found_in_the_place_that_it_was_added_to(storage: Storage) -> None:
    """One call keeps a record of any kind; the driver's copy is as the coordinator's."""
    registry, copy = Registry.read(storage), Registry()
    for record in records.read_all(storage).records.values():
        assert copy.find(record) is None
        copy.add(record)
        assert copy.find(record) is record
        assert registry.find(record) == record
    assert copy == registry
    other = replace(STATISTICS, num_samples=1)
    copy.add(other)
    assert copy.find(STATISTICS) is copy.statistics is other
