"""The registry and the relatedness table as Arrow tables, and their Parquet exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq

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
)
RELATEDNESS_SCHEMA = _schema(
    **{"task": "int64", "label": "int64", "candidate": "int64?", "error": "float64", "own_error": "float64"},
    **{"variance": "float64", "unit": "string", "relatedness": "float64", "chosen": "bool", "transfer": "string?"},
)


def registry_table(manifests: Sequence[TaskManifest], timings: Mapping[TaskId, TaskTimings]) -> pa.Table:
    """One row a sealed task, its newest version, in task order; ``train_s`` sums that version's stages, ``worker``
    trained its expert."""
    rows = []
    first = first_numbers(manifests)
    newest = {manifest.versions[0]: manifest for manifest in sorted(manifests, key=lambda manifest: manifest.task)}
    for _, manifest in sorted(newest.items()):
        stages = timings[manifest.task].stages if manifest.task in timings else ()
        workers = [timing.worker for timing in stages if timing.stage == "expert"]
        rows.append(
            {
                "task": manifest.versions[0],
                "label": manifest.label,
                "parent": None if manifest.parent is None else first[manifest.parent],
                "transfer": manifest.transfer,
                "num_classes": len(manifest.classes),
                "autoencoder_sha256": manifest.autoencoder.sha256,
                "expert_sha256": manifest.expert.sha256,
                "train_s": sum(timing.seconds for timing in stages),
                "worker": workers[-1] if workers else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=REGISTRY_SCHEMA)


def relatedness_table(records: Sequence[RelatednessRecord], manifests: Sequence[TaskManifest]) -> pa.Table:
    """One row a sealed task and candidate, in order of arrival; candidate null stands for the pretrained root."""
    first = first_numbers(manifests)
    labels = {manifest.task: manifest.label for manifest in manifests}
    rows = [
        {
            **asdict(row),
            "task": first[record.task],
            "label": labels[record.task],
            "candidate": None if row.candidate is None else first.get(row.candidate, row.candidate),
        }
        for record in sorted(records, key=lambda record: record.task)
        for row in record.rows
    ]
    return pa.Table.from_pylist(rows, schema=RELATEDNESS_SCHEMA)


def first_numbers(manifests: Sequence[TaskManifest]) -> dict[TaskId, TaskId]:
    """The number that users see, of every version's number."""
    return {manifest.task: manifest.versions[0] for manifest in manifests}


def export_tables(storage: Storage, registry: pa.Table, relatedness: pa.Table) -> None:
    """Write both tables as Parquet, for people; nothing of ours reads them back."""
    for path, table in ((layout.REGISTRY_TABLE, registry), (layout.RELATEDNESS_TABLE, relatedness)):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        storage.write(path, sink.getvalue().to_pybytes())
