"""The registry and the relatedness table: schemas, order, nulls, and what does not depend on who did it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distributed_eg.store import layout
from distributed_eg.store.records import RelatednessRecord, StageTiming, TaskManifest, TaskTimings
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.tables import (
    REGISTRY_SCHEMA,
    RELATEDNESS_SCHEMA,
    export_tables,
    registry_table,
    relatedness_table,
)
from distributed_eg.types import RelatednessRow, TransferChoice


def manifest(task: int, parent: int | None) -> TaskManifest:
    """A manifest with label 10·task and task + 1 classes."""
    autoencoder, relatedness, expert = (Artifact(f"{n}{task}", f"sha-{n}{task}", 1) for n in "are")
    transfer = "fresh" if parent is None else "lwf"
    classes = tuple(range(task + 1))
    return TaskManifest(task, 10 * task, (task,), classes, parent, transfer, None, autoencoder, relatedness, expert)


def related(task: int, candidates: list[int | None], chosen: int | None) -> RelatednessRecord:
    """A record in which ``chosen`` is the parent."""
    errors = (2.0,) * len(candidates)
    return RelatednessRecord(task, TransferChoice(chosen, "finetune"), 1.0, 4.0, "variance", tuple(candidates), errors)


TIMINGS = {
    0: TaskTimings(0, (StageTiming("features", "w0", 1.0), StageTiming("expert", "w1", 2.5))),
    2: TaskTimings(2, (StageTiming("expert", "w0", 4.0), StageTiming("expert", "w2", 8.0))),
}


def test_the_registry_has_one_row_a_task_in_task_order() -> None:
    table = registry_table([manifest(2, 0), manifest(0, None), manifest(1, 0)], TIMINGS)
    assert table.schema.equals(REGISTRY_SCHEMA)
    assert table.to_pydict() == {
        "task": [0, 1, 2],
        "label": [0, 10, 20],
        "parent": [None, 0, 0],
        "transfer": ["fresh", "lwf", "lwf"],
        "num_classes": [1, 2, 3],
        "autoencoder_sha256": ["sha-a0", "sha-a1", "sha-a2"],
        "expert_sha256": ["sha-e0", "sha-e1", "sha-e2"],
        "train_s": [3.5, 0.0, 12.0],
        "worker": ["w1", None, "w2"],
        "lwf_accuracy": [None, None, None],
        "finetune_accuracy": [None, None, None],
    }


def test_who_did_it_and_for_how_long_shows_in_two_columns_only() -> None:
    manifests = [manifest(0, None), manifest(1, 0)]
    others = {task: TaskTimings(task, (StageTiming("expert", "elsewhere", 99.0),)) for task in (0, 1)}
    quick, slow = registry_table(manifests, TIMINGS), registry_table(manifests, others)
    assert not quick.equals(slow)
    side = ["train_s", "worker"]
    assert quick.drop_columns(side).equals(slow.drop_columns(side))


def test_relatedness_has_one_row_a_task_and_candidate_with_null_for_the_root() -> None:
    records = [related(2, [None, 0, 1], 1), related(1, [None, 0], None), related(0, [], None)]
    table = relatedness_table(records, [manifest(0, None), manifest(1, 0), manifest(2, 0)])
    assert table.schema.equals(RELATEDNESS_SCHEMA)
    assert table["task"].to_pylist() == [1, 1, 2, 2, 2]
    assert table["label"].to_pylist() == [10, 10, 20, 20, 20]
    assert table["candidate"].to_pylist() == [None, 0, None, 0, 1]
    assert table["chosen"].to_pylist() == [True, False, False, False, True]
    assert table["transfer"].to_pylist() == ["lwf", None, None, None, "lwf"]  # what became of it
    assert table["own_error"].to_pylist() == [1.0] * 5
    assert table["relatedness"].to_pylist() == [0.75] * 5


def test_every_field_of_a_relatedness_row_is_a_column() -> None:
    fields = {field.name for field in dataclasses.fields(RelatednessRow)}
    later = {"shared_distance", "known_share"}
    assert fields | {"label"} | later == set(RELATEDNESS_SCHEMA.names)


def test_tables_of_an_empty_run_have_their_columns() -> None:
    assert registry_table([], {}).schema.equals(REGISTRY_SCHEMA)
    assert relatedness_table([], []).schema.equals(RELATEDNESS_SCHEMA)


@pytest.mark.parametrize("tasks", [0, 3])
def test_exports_read_back_equal(tmp_path: Path, tasks: int) -> None:
    registry = registry_table([manifest(task, task - 1 if task else None) for task in range(tasks)], TIMINGS)
    records = [related(task, [None, *range(task)], None) for task in range(tasks)]
    relatedness = relatedness_table(records, [manifest(task, None) for task in range(tasks)])
    export_tables(Storage(str(tmp_path)), registry, relatedness)
    for path, table in ((layout.REGISTRY_TABLE, registry), (layout.RELATEDNESS_TABLE, relatedness)):
        found: pa.Table = pq.read_table(tmp_path / path)
        assert found.equals(table)
        assert found.schema.equals(table.schema)


def test_an_export_replaces_the_one_before(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    empty = relatedness_table([], [])
    for tasks in (3, 1):
        export_tables(storage, registry_table([manifest(task, None) for task in range(tasks)], {}), empty)
    assert len(pq.read_table(tmp_path / layout.REGISTRY_TABLE)) == 1
    assert len(list((tmp_path / "tables").iterdir())) == 2
