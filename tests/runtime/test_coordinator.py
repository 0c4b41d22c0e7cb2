"""The coordinator: the single writer, whose every answer is in the run directory already."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distributed_eg.errors import RunInUseError, StorageError
from distributed_eg.runtime.coordinator import Coordinator
from distributed_eg.store import layout
from distributed_eg.store.lease import Lease
from distributed_eg.store.records import (
    AutoencoderRecord,
    Record,
    RelatednessRecord,
    StageTiming,
    StatisticsRecord,
    TaskManifest,
    TaskRecord,
    TaskTimings,
    artifact_of_record,
)
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.types import TransferChoice


def artifact(name: str) -> Artifact:
    """An artifact that nobody reads."""
    return Artifact(f"{name}.safetensors", f"sha-{name}", 1)


def records_of(task: int, relatedness: Artifact | None = None) -> list[Record]:
    """What the stages of a task leave behind; the manifest last, once its relatedness is sealed."""
    parent = task - 1 if task else None
    choice = TransferChoice(parent, "lwf") if task else TransferChoice(None, "fresh")
    found: list[Record] = [
        AutoencoderRecord(task, 10 + task, "linear", artifact(f"a{task}"), 60),
        RelatednessRecord(task, choice, 1.0, 4.0, "variance", (parent,) if task else (), (0.1 + 0.2,) if task else ()),
    ]
    if relatedness is not None:
        a, e = artifact(f"a{task}"), artifact(f"e{task}")
        classes = (2 * task, 2 * task + 1)
        found.append(TaskManifest(task, 10 + task, (task,), classes, parent, choice.transfer, 0.5, a, relatedness, e))
    return found


def timings(task: int, seconds: float = 1.5) -> TaskTimings:
    """Who trained a task's expert."""
    return TaskTimings(task, (StageTiming("expert", "w0", seconds),))


def seal(coordinator: Coordinator, task: int) -> None:
    """Record everything of a task, as a driver does."""
    autoencoder, related = records_of(task)
    coordinator.record(autoencoder)
    sealed = coordinator.record(related)
    coordinator.record(timings(task))
    coordinator.record(records_of(task, sealed)[2])


STATISTICS = StatisticsRecord(artifact("s"), 60, artifact("root"))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def content(uri: str) -> dict[str, bytes]:
    """Every file of a run directory."""
    return {str(file): file.read_bytes() for file in sorted(Path(uri).rglob("*")) if file.is_file()}


def test_a_new_run_is_empty_and_asking_writes_nothing(uri: str) -> None:
    assert Coordinator(uri, 1).registry() == Registry()
    assert not Path(uri).exists()


def test_an_answer_is_in_the_run_directory_already(uri: str) -> None:
    coordinator = Coordinator(uri, 1)
    for record in (STATISTICS, *records_of(0)):
        sealed = coordinator.record(record)
        assert Storage(uri).read_artifact(sealed)
    known = coordinator.registry()
    assert (known.statistics, known.autoencoders[0], known.relatedness[0]) == (STATISTICS, *records_of(0))


def test_a_new_coordinator_on_the_same_directory_knows_the_same(uri: str) -> None:
    """Two sealed tasks and one that was interrupted after its relatedness."""
    coordinator = Coordinator(uri, 1)
    coordinator.record(STATISTICS)
    for task in (0, 1):
        seal(coordinator, task)
    for record in records_of(2):
        coordinator.record(record)
    again = Coordinator(uri, 1).registry()
    known = coordinator.registry()
    assert again == known
    assert [ours.equals(theirs) for ours, theirs in zip(again.tables(), known.tables(), strict=True)] == [True, True]


def test_a_coordinator_that_restarts_between_any_two_records_ends_with_the_same_files(tmp_path: Path) -> None:
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    coordinator = Coordinator(whole, 1)
    coordinator.record(STATISTICS)
    for task in (0, 1, 2):
        seal(coordinator, task)
    coordinator.export()
    Coordinator(broken, 1).record(STATISTICS)
    for task in (0, 1, 2):
        Coordinator(broken, 1).record(records_of(task)[0])
        sealed = Coordinator(broken, 1).record(records_of(task)[1])
        Coordinator(broken, 1).record(timings(task))
        Coordinator(broken, 1).record(records_of(task, sealed)[2])
    Coordinator(broken, 1).export()
    assert [*content(whole).values()] == [*content(broken).values()]


@pytest.mark.parametrize("restarted", [False, True])
def test_sealing_the_same_record_twice_changes_nothing(uri: str, restarted: bool) -> None:
    """A driver that lost the answer asks again, possibly of a new coordinator."""
    coordinator = Coordinator(uri, 1)
    coordinator.record(STATISTICS)
    seal(coordinator, 0)
    before = content(uri)
    second = Coordinator(uri, 1) if restarted else coordinator
    sealed = artifact_of_record(second.registry().relatedness[0])
    assert [second.record(record) for record in (STATISTICS, *records_of(0, sealed))] == [
        coordinator.record(record) for record in (STATISTICS, *records_of(0, sealed))
    ]
    assert content(uri) == before


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("which", range(4), ids=["statistics", "autoencoder", "relatedness", "task 0"])
def test_another_record_for_the_same_task_is_refused(uri: str, which: int, restarted: bool) -> None:
    coordinator = Coordinator(uri, 1)
    coordinator.record(STATISTICS)
    seal(coordinator, 0)
    before = content(uri)
    known = [STATISTICS, *records_of(0, artifact_of_record(coordinator.registry().relatedness[0]))][which]
    changes = [{"num_samples": 61}, {"num_samples": 61}, {"variance": 4.5}, {"expert": artifact("another")}][which]
    other = dataclasses.replace(known, **changes)
    what = ["statistics", "00000/autoencoder", "00000/relatedness", "00000/manifest"][which]
    second = Coordinator(uri, 1) if restarted else coordinator
    with pytest.raises(StorageError, match=f"already holds another .*{what}.json"):
        second.record(other)
    assert content(uri) == before
    second.record(known)


@pytest.mark.parametrize("restarted", [False, True])
def test_what_a_failed_task_left_may_be_replaced(uri: str, restarted: bool) -> None:
    """Task 1 failed while its expert trained; its data were mended, so another autoencoder and parent come of them."""
    coordinator = Coordinator(uri, 1)
    coordinator.record(STATISTICS)
    seal(coordinator, 0)
    for record in records_of(1):
        coordinator.record(record)
    coordinator = Coordinator(uri, 1) if restarted else coordinator
    autoencoder, relatedness = (
        dataclasses.replace(old, **change)
        for old, change in zip(records_of(1), ({"num_samples": 59}, {"variance": 5.0}), strict=True)
    )
    coordinator.record(autoencoder)
    sealed = coordinator.record(relatedness)
    coordinator.record(records_of(1, sealed)[2])
    for known in (coordinator.registry(), Coordinator(uri, 1).registry()):
        assert (known.autoencoders[1], known.relatedness[1]) == (autoencoder, relatedness)
        assert artifact_of_record(known.relatedness[1]) == sealed
        assert set(known.manifests) == {0, 1}


def test_statistics_may_be_replaced_only_while_no_task_is_sealed(uri: str) -> None:
    """A first task that failed left its statistics; errors of sealed tasks, though, are compared under one pair."""
    coordinator = Coordinator(uri, 1)
    coordinator.record(STATISTICS)
    other = dataclasses.replace(STATISTICS, num_samples=61)
    coordinator.record(other)
    assert Coordinator(uri, 1).registry().statistics == other
    seal(coordinator, 0)
    with pytest.raises(StorageError, match="statistics"):
        coordinator.record(STATISTICS)
    assert Coordinator(uri, 1).registry().statistics == other


def test_a_record_that_could_not_be_written_is_not_known(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full for a moment: nothing was recorded, and another result may take the place."""
    coordinator = Coordinator(uri, 1)
    seal(coordinator, 0)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    first, second = records_of(1)[0], AutoencoderRecord(1, 11, "linear", artifact("another"), 60)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        coordinator.record(first)
    monkeypatch.undo()
    assert 1 not in coordinator.registry().autoencoders
    coordinator.record(second)
    assert Coordinator(uri, 1).registry().autoencoders[1] == second


def test_a_task_without_a_manifest_is_not_in_the_tables(uri: str) -> None:
    coordinator = Coordinator(uri, 1)
    coordinator.record(STATISTICS)
    seal(coordinator, 0)
    for record in records_of(1):
        coordinator.record(record)
    coordinator.record(TaskTimings(1, (StageTiming("relate", "w0", 2.0),)))
    for known in (coordinator.registry(), Coordinator(uri, 1).registry()):
        registry, relatedness = known.tables()
        assert registry["task"].to_pylist() == [0]
        assert relatedness["task"].to_pylist() == []
    seal(coordinator, 1)
    registry, relatedness = Coordinator(uri, 1).registry().tables()
    assert registry["task"].to_pylist() == [0, 1]
    assert relatedness["task"].to_pylist() == [1]


def test_timings_may_always_be_replaced(uri: str) -> None:
    """A sealed task's stage was run again; nothing names what its timings were."""
    coordinator = Coordinator(uri, 1)
    coordinator.record(STATISTICS)
    seal(coordinator, 0)
    sealed = coordinator.record(timings(0, 2.5))
    assert Storage(uri).read_artifact(sealed)
    assert Coordinator(uri, 1).registry().timings == coordinator.registry().timings == {0: timings(0, 2.5)}


def test_the_same_record_is_the_same_whatever_it_went_through(uri: str) -> None:
    """NaN equals no NaN, and a tuple comes back from JSON as a list; what is sealed is the same."""
    coordinator = Coordinator(uri, 1)
    coordinator.record(STATISTICS)
    arrival = TaskRecord(0, 10, (0, 1), (0,), None, {"classes": (0, 1), "mean": float("nan")})
    coordinator.record(arrival)
    seal(coordinator, 0)
    assert Coordinator(uri, 1).record(arrival) == artifact_of_record(arrival)


def test_the_export_reads_back_equal(uri: str) -> None:
    coordinator = Coordinator(uri, 1)
    coordinator.record(STATISTICS)
    for task in (1, 0, 2):  # as they end, not in order
        seal(coordinator, task)
    coordinator.export()
    tables = coordinator.registry().tables()
    for path, table in zip((layout.REGISTRY_TABLE, layout.RELATEDNESS_TABLE), tables, strict=True):
        found = pq.read_table(Path(uri) / path)
        assert found.equals(table)
        assert found.schema.equals(table.schema)
    assert tables[0]["task"].to_pylist() == [0, 1, 2]
    assert tables[0]["train_s"].to_pylist() == [1.5] * 3


def test_tables_do_not_depend_on_the_export_nor_on_its_files(uri: str) -> None:
    coordinator = Coordinator(uri, 1)
    seal(coordinator, 0)
    coordinator.export()
    expected = coordinator.registry().tables()
    (Path(uri) / layout.REGISTRY_TABLE).write_bytes(b"damaged")
    again = Coordinator(uri, 1)
    assert all(a.equals(b) for a, b in zip(again.registry().tables(), expected, strict=True))
    again.export()
    assert pq.read_table(Path(uri) / layout.REGISTRY_TABLE).equals(expected[0])


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    coordinator = Coordinator(str(tmp_path / "file" / "run"), 1)
    with pytest.raises(StorageError, match="file/run"):
        coordinator.record(STATISTICS)


def test_what_arrived_is_kept_and_may_change_only_while_its_task_is_not_sealed(uri: str) -> None:
    coordinator = Coordinator(uri, 1)
    arrival = TaskRecord(0, 10, (0, 1), (0,), None, {"length": 60})
    corrected = dataclasses.replace(arrival, identity={"length": 61})
    coordinator.record(arrival)
    coordinator.record(corrected)
    seal(coordinator, 0)
    assert Coordinator(uri, 1).registry().arrivals == {0: corrected}
    with pytest.raises(StorageError, match=r"another .*00000/task\.json"):
        coordinator.record(arrival)


def test_nothing_is_written_for_a_driver_whose_run_was_taken_over(uri: str) -> None:
    """It was paused past its lease: its late reports must not meet the next driver's."""
    storage = Storage(uri)
    first = Lease.acquire(storage)
    coordinator = Coordinator(uri, first.generation)
    seal(coordinator, 0)
    first.release()
    second = Lease.acquire(storage)
    before = content(uri)
    calls = (lambda: coordinator.record(records_of(1)[0]), lambda: coordinator.record(timings(0)), coordinator.export)
    for call in calls:
        with pytest.raises(RunInUseError, match="Another driver has taken over"):
            call()
    assert content(uri) == before
    assert Coordinator(uri, second.generation).record(records_of(1)[0])
    second.release()


def test_damaged_records_are_left_out_and_told(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever resumes makes them again; nothing else is lost with them."""
    coordinator = Coordinator(uri, 1)
    coordinator.record(STATISTICS)
    for task in (0, 1, 2):
        seal(coordinator, task)
    (Path(uri) / layout.task_file(1, "autoencoder")).write_text("{")
    (Path(uri) / layout.task_file(2, "manifest")).write_text("")
    registry = Coordinator(uri, 2).registry()
    assert set(registry.autoencoders) == {0, 2}
    assert set(registry.manifests) == {0, 1}
    assert [layout.task_file(1, "autoencoder") in text for text in caplog.messages].count(True) == 1
