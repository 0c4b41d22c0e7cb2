"""The registry and the relatedness table as Arrow tables, and their Parquet exports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distributed_eg.method.relatedness import relatedness
from distributed_eg.store import layout
from distributed_eg.store.records import RelatednessRecord, TaskManifest, TaskTimings
from distributed_eg.store.storage import Storage
from distributed_eg.types import TaskId


def _schema(**columns: str) -> pa.Schema:
    """Columns by their Arrow types; a type with a question mark may be null."""
    return pa.schema([pa.field(n, pa.type_for_alias(kind.rstrip("?")), kind[-1] == "?") for n, kind in columns.items()])


REGISTRY_SCHEMA = _schema(
    **{"task": "int64", "label": "int64", "parent": "int64?", "transfer": "string", "num_classes": "int64"},
    **{"autoencoder_sha256": "string", "expert_sha256": "string", "train_s": "float64", "worker": "string?"},
    **{"lwf_accuracy": "float64?", "finetune_accuracy": "float64?"},
)
RELATEDNESS_SCHEMA = _schema(
    **{"task": "int64", "label": "int64", "candidate": "int64?", "error": "float64", "own_error": "float64"},
    **{"variance": "float64", "unit": "string", "relatedness": "float64", "chosen": "bool", "transfer": "string?"},
    **{"shared_distance": "float64?", "known_share": "float64?"},
)


_WRITER = re.compile(r"parquet-cpp-arrow version \d[\w.+-]*")


def registry_table(manifests: Sequence[TaskManifest], timings: Mapping[TaskId, TaskTimings]) -> pa.Table:
    """One row a sealed task, its newest version, in task order; ``train_s`` sums that version's stages, ``worker``
    trained its expert."""
    newest = {row["task"]: row for row in registry_rows(manifests, timings)}
    return pa.Table.from_pylist([row for _, row in sorted(newest.items())], schema=REGISTRY_SCHEMA)


def registry_rows(
    manifests: Sequence[TaskManifest], timings: Mapping[TaskId, TaskTimings]
) -> Iterator[dict[str, int | float | str | None]]:
    """A row for every version of every sealed task, oldest first."""
    first = first_numbers(manifests)
    for manifest in sorted(manifests, key=lambda manifest: manifest.task):
        stages = timings[manifest.task].stages if manifest.task in timings else ()
        workers = [timing.worker for timing in stages if timing.stage == "expert"]
        yield {
            "task": manifest.versions[0],
            "label": manifest.label,
            "parent": None if manifest.parent is None else first[manifest.parent],
            "transfer": manifest.transfer,
            "num_classes": len(manifest.classes),
            "autoencoder_sha256": manifest.autoencoder.sha256,
            "expert_sha256": manifest.expert.sha256,
            "train_s": sum(timing.seconds for timing in stages),
            "worker": workers[-1] if workers else None,
            "lwf_accuracy": None if manifest.contest is None else manifest.contest.lwf,
            "finetune_accuracy": None if manifest.contest is None else manifest.contest.finetune,
        }


def relatedness_table(records: Sequence[RelatednessRecord], manifests: Sequence[TaskManifest]) -> pa.Table:
    """One row a sealed task and candidate, in order of arrival; candidate null stands for the pretrained root."""
    first = first_numbers(manifests)
    labels = {manifest.task: manifest.label for manifest in manifests}
    transfers = {manifest.task: manifest.transfer for manifest in manifests}
    parts = [RELATEDNESS_SCHEMA.empty_table()]
    for record in sorted(records, key=lambda record: record.task):
        size, chosen = len(record.candidates), [c == record.choice.parent for c in record.candidates]
        columns = {
            "task": pa.repeat(first[record.task], size),
            "label": pa.repeat(labels[record.task], size),
            "candidate": pa.array([None if c is None else first.get(c, c) for c in record.candidates], pa.int64()),
            "error": pa.array(record.errors, pa.float64()),
            "own_error": pa.repeat(record.own_error, size),
            "variance": pa.repeat(record.variance, size),
            "unit": pa.repeat(record.unit, size),
            "relatedness": pa.array(relatedness(record.errors, record.own_error, record.variance, record.unit)),
            "chosen": pa.array(chosen, pa.bool_()),
            "transfer": pa.array([transfers[record.task] if is_chosen else None for is_chosen in chosen], pa.string()),
            "shared_distance": pa.array(record.shared_distances or [None] * size, pa.float64()),
            "known_share": pa.array(record.known_shares or [None] * size, pa.float64()),
        }
        parts.append(pa.table(columns, schema=RELATEDNESS_SCHEMA))
    return pa.concat_tables(parts).combine_chunks()


def first_numbers(manifests: Sequence[TaskManifest]) -> dict[TaskId, TaskId]:
    """The number that users see, of every version's number."""
    return {manifest.task: manifest.versions[0] for manifest in manifests}


def export_tables(storage: Storage, registry: pa.Table, relatedness: pa.Table) -> None:
    """Write both tables as Parquet, for people; nothing of ours rests on them."""
    for path, table in ((layout.REGISTRY_TABLE, registry), (layout.RELATEDNESS_TABLE, relatedness)):
        storage.write(path, _parquet(table))


def fault_of_export(data: bytes | None, table: pa.Table, known: Sequence[Mapping[str, Any]], *, lags: bool) -> str:
    """What is wrong with an exported table, as the end of a sentence; empty where nothing is.

    Args:
        data: the file's bytes; None where there is none.
        table: what it should hold.
        known: all rows that an earlier export of the same run can have held.
        lags: whether it may be missing, or hold an earlier state of the run.
    """
    if data is None:
        return "" if lags else "is missing"
    if data == _parquet(table):
        return ""
    try:
        found, writer = pq.read_table(pa.BufferReader(data)), pq.read_metadata(pa.BufferReader(data)).created_by
        rows = found.to_pylist()
    except (ValueError, OSError, pa.ArrowException) as error:  # UnicodeDecodeError is a ValueError
        return f"is no whole Parquet file ({(str(error).splitlines() or [''])[0]:.100})"
    # Columns that came later say nothing of what an earlier version trained.
    num_columns = len(found.column_names)
    if all(table[name].null_count == len(table) for name in table.column_names[num_columns:]):
        table = table.select(table.column_names[:num_columns])
        known = [{name: row[name] for name in table.column_names} for row in known]
    wanted = [repr(row) for row in table.to_pylist()]  # as text, NaN equals NaN
    strange = [row for row in rows if repr(row) not in {*wanted, *map(repr, known)}]
    if strange and {row.get("task") for row in strange} - {row["task"] for row in known}:
        return (
            "tells of tasks that are not sealed: were their files removed, a resumed training with the same stream "
            "makes them again"
        )
    # Another version of pyarrow writes the same rows in other bytes.
    by_another = writer != _writer() and _WRITER.fullmatch(str(writer)) is not None
    as_written = found.schema == table.schema and (by_another or data == _parquet(found))
    if strange or not as_written:
        return "is not what the records say"
    return "" if lags or [repr(row) for row in rows] == wanted else "does not hold every sealed task"


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def _writer() -> str:
    """What this version of pyarrow writes down as the writer of a file."""
    return str(pq.read_metadata(pa.BufferReader(_parquet(REGISTRY_SCHEMA.empty_table()))).created_by)
