"""Checking a run directory against every hash in its records, and finding what no record names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from distributed_eg.errors import DamagedFileError, RunInUseError, StorageError
from distributed_eg.store import evaluations, layout, records
from distributed_eg.store.checkpoints import CHECKPOINTS
from distributed_eg.store.lease import Lease, LeaseRecord, holder_of, last_session
from distributed_eg.store.local_files import TEMPORARY
from distributed_eg.store.record_text import REPAIR, repair_of
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.tables import export_tables, fault_of_export, registry_rows, registry_table, relatedness_table
from distributed_eg.types import TaskId

_WEIGHTS = re.compile(
    rf"(root|statistics|root-autoencoder|{layout.TASKS}/\d{{5,}}/(autoencoder|summary|held-out|expert|checkpoint|rival))-[0-9a-f]+\.safetensors"
)
_EXPORTS = (layout.REGISTRY_TABLE, layout.RELATEDNESS_TABLE)
_REBUILT = (
    "It is an export for people and no part of the run, which is whole without it: every training that ends writes it "
    "anew, and so does `distributed-eg verify --rebuild-tables`."
)
_TASK_FILE = re.compile(rf"{layout.TASKS}/(\d{{5,}})/.+")


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong with a run directory; ``problem`` ends with what repairs it."""

    path: str
    problem: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, and what is wrong."""

    num_files: int
    """Damaged and missing ones included."""
    num_bytes: int
    """Of the files that are as they were recorded."""
    damages: tuple[Damage, ...]
    unchecked: tuple[str, ...]
    """Files that no record names, and what earlier drivers left in ``sessions/``; where a record is damaged, the
    exported tables, too, for nothing tells then what they should hold."""


def verify(storage: Storage) -> Verification:
    """Read every record of a run and every file that one names, and compare sizes and hashes; then compare the
    exported tables with what the records say.

    Raises:
        StorageError: the run directory cannot be listed; whatever is wrong inside it is told, not raised.
    """
    # Before the records: a driver may be at work, and what it has exported it had recorded.
    exports = {path: _read(storage, path) for path in _EXPORTS}
    found = records.read_all(storage)
    damages = [Damage(path, str(error)) for path, error in found.errors.items()]
    damages += _missing(storage, found)
    sizes = {path: artifact.size_bytes for path, artifact in found.artifacts.items()}
    checked: set[Artifact] = set()
    harmed = {damage.path for damage in damages} | _forgotten(found, only_swept=True)
    for record in found.records.values():
        for artifact in record.artifacts:
            if artifact in checked or artifact.path in harmed:
                continue
            checked.add(artifact)
            try:
                sizes[artifact.path] = len(storage.read_artifact(artifact))
            except StorageError as error:
                if isinstance(record, records.CheckpointRecord) and _has_changed(storage, record):
                    continue  # a driver works on the run
                # What cannot be a file of the run is the fault of the record that names it.
                path = artifact.path if isinstance(error, DamagedFileError) else record.path
                damages.append(Damage(path, f"Named by {record.path!r}: {error}"))
                harmed.add(artifact.path)
                sizes.pop(artifact.path, None)
    whole_records = not any(damage.path.endswith(".json") for damage in damages)
    measured = evaluations.read_all(storage)  # no other record rests on them, nor a table
    damages += [Damage(path, str(error)) for path, error in measured.errors.items()]
    sizes |= {path: artifact.size_bytes for path, artifact in measured.artifacts.items()}
    generation, session = last_session(storage)
    path = layout.session_file(generation)
    if isinstance(session, StorageError):
        damages.append(Damage(path, str(session)))
    elif session is not None:
        sizes[path] = storage.size(path)
    if whole_records:
        sizes |= {path: len(data) for path, data in exports.items() if data is not None}
        ended = isinstance(session, LeaseRecord) and not session.open
        damages += _wrong_exports(storage, found, exports, lags=not ended)
    damaged = {damage.path for damage in damages}
    intact = {path: size for path, size in sizes.items() if path not in damaged}
    unchecked = sorted(set(storage.walk()) - intact.keys() - damaged)
    return Verification(len(intact) + len(damaged), sum(intact.values()), tuple(damages), tuple(unchecked))


def rebuild_tables(storage: Storage) -> None:
    """Write the exported tables anew, from the records, as the run's driver.

    Raises:
        RunInUseError: a driver works on the run.
        StorageError: a record is damaged or missing, or the tables cannot be written.
    """
    lease = Lease.acquire(storage)
    try:
        found = records.read_all(storage)
        wrong = [*map(str, found.errors.values()), *(damage.problem for damage in _missing(storage, found))]
        if wrong:
            raise StorageError(f"The tables cannot be made anew, for they are made from the records. {wrong[0]}")
        export_tables(storage, *_tables(found))
    finally:
        lease.release()


def unnamed(storage: Storage) -> list[str]:
    """The files of the run directory that nothing names, records first, in the order in which they may be deleted.

    Those are weights of earlier attempts and of retired tasks, checkpoints of sealed tasks, and what killed writers
    left. Where a record cannot be read, or names a file that is not there, it may have named any file of its task (or,
    if it is the run's, any outside of the tasks), and none of them counts. Files of other kinds and in other places are
    not this package's, and are left alone.

    Raises:
        StorageError: the run directory cannot be listed.
    """
    found = records.read_all(storage)
    known = found.records.values()
    sealed = [record.task for record in known if isinstance(record, records.TaskManifest)]
    over = {kind.path_of(task) for kind in CHECKPOINTS for task in sealed}
    gone = over | _forgotten(found)
    named = [
        (record, file.path)
        for record in known
        if record.path not in over
        for file in record.artifacts
        if file.path not in gone
    ]
    files, paths = storage.walk(), {path for _, path in named}
    lost = paths.difference(files)
    doubtful = {_task_of(path) for path in found.errors} | {_task_of(r.path) for r, path in named if path in lost}
    left = [
        path
        for path in files
        if (path in over or _WEIGHTS.fullmatch(path) or path.rpartition("/")[2].startswith(TEMPORARY))
        and path not in paths
        and _task_of(path) not in doubtful
    ]
    return sorted(left, key=lambda path: (not path.endswith(".json"), path))


def collect(storage: Storage, *, dry_run: bool = False) -> dict[str, int]:
    """Remove what ``unnamed`` lists, as the run's driver: the size in bytes of each file, by its path.

    Args:
        storage: the run directory.
        dry_run: remove nothing, and write nothing either.

    Raises:
        RunInUseError: a driver works on the run.
        StorageError: run.json is damaged, so that nobody can tell whether this is a run, or a file cannot be removed.
    """
    storage.read_record(layout.RUN)
    if dry_run:
        holder = holder_of(storage)
        if holder is not None:
            raise RunInUseError(f"The run {storage.shown!r} is in use by {holder}. Try again when it has ended.")
        return {path: storage.size(path) for path in unnamed(storage)}
    lease = Lease.acquire(storage)
    try:
        sizes = {path: storage.size(path) for path in unnamed(storage)}
        # First: what is half removed is not missed.
        for record in records.read_all(storage, [records.RetirementRecord]).records.values():
            if isinstance(record, records.RetirementRecord) and record.is_retired and not record.is_swept:
                records.seal(storage, replace(record, is_swept=True))
        for path in sizes:
            storage.delete(path)
        return sizes
    finally:
        lease.release()


def _forgotten(found: records.StoredRecords, *, only_swept: bool = False) -> set[str]:
    """The weights of retired tasks that no begun task starts from, or of those whose files may have been removed."""
    known = found.records.values()
    manifests = {record.task: record for record in known if isinstance(record, records.TaskManifest)}
    needed = {
        record.choice.parent
        for record in known
        if isinstance(record, records.RelatednessRecord) and record.task not in manifests
    }
    retired = {
        record.task
        for record in known
        if isinstance(record, records.RetirementRecord) and record.is_retired and (record.is_swept or not only_swept)
    }
    gone = {m.task for m in manifests.values() if m.versions[0] in retired and (only_swept or m.task not in needed)}
    return {
        artifact.path
        for record in known
        if isinstance(record, records.AutoencoderRecord | records.RelatednessRecord | records.TaskManifest)
        if record.task in gone
        for artifact in record.artifacts
        if not artifact.path.endswith(".json")
    }


def _read(storage: Storage, path: str) -> bytes | None:
    return storage.read(path) if storage.exists(path) else None


def _wrong_exports(
    storage: Storage, found: records.StoredRecords, exports: Mapping[str, bytes | None], *, lags: bool
) -> Iterator[Damage]:
    """What is wrong with the exported tables, where no record is; ``lags``: they may tell of an earlier state."""
    manifests, timings = _sealed(found)
    num_tasks = sum(isinstance(record, records.TaskRecord) for record in found.records.values())
    stream = found.records.get(records.StreamRecord.path_of())
    # A call that was cut off may have sealed its last task and not have come to writing the tables.
    has_ended = isinstance(stream, records.StreamRecord) and stream.num_tasks >= num_tasks
    lags |= len(manifests) < num_tasks or not has_ended
    registry, relatedness = _tables(found)
    possible = ([*registry_rows(manifests, timings)], relatedness.to_pylist())
    for path, table, rows in zip(_EXPORTS, (registry, relatedness), possible, strict=True):
        if fault := fault_of_export(exports[path], table, rows, lags=lags):
            yield Damage(path, f"The table {path!r} in {storage.shown!r} {fault}. {_REBUILT}")


def _tables(found: records.StoredRecords) -> tuple[pa.Table, pa.Table]:
    """The tables that whole records add up to."""
    manifests, timings = _sealed(found)
    sealed = {manifest.task for manifest in manifests}
    known = found.records.values()
    related = [record for record in known if isinstance(record, records.RelatednessRecord) and record.task in sealed]
    return registry_table(manifests, timings), relatedness_table(related, manifests)


def _sealed(found: records.StoredRecords) -> tuple[list[records.TaskManifest], dict[TaskId, records.TaskTimings]]:
    known = found.records.values()
    manifests = [record for record in known if isinstance(record, records.TaskManifest)]
    return manifests, {record.task: record for record in known if isinstance(record, records.TaskTimings)}


def _has_changed(storage: Storage, record: records.CheckpointRecord) -> bool:
    """Whether a checkpoint's record is another one by now, or gone."""
    try:
        return records.read(storage, type(record), record.task) != record
    except StorageError:
        return True


def _missing(storage: Storage, found: records.StoredRecords) -> Iterator[Damage]:
    """Records that others need and that are not there, and manifests that name another autoencoder than its record."""
    needed = {layout.RUN: "every task"}
    for record in found.records.values():
        for path in _needs(record):
            needed.setdefault(path, repr(record.path))
        if isinstance(record, records.TaskManifest):
            own = found.records.get(records.AutoencoderRecord.path_of(record.task))
            if isinstance(own, records.AutoencoderRecord) and own.artifact != record.autoencoder:
                says = f"The manifest {record.path!r} in {storage.shown!r} names another autoencoder than {own.path!r}."
                yield Damage(record.path, f"{says} {REPAIR}")
    for path, by in needed.items():
        if path not in found.records and path not in found.errors:
            says = f"The record {path!r} in {storage.shown!r} is missing; {by} needs it."
            yield Damage(path, f"{says} {repair_of(path)}")


def _needs(record: records.Record) -> Iterator[str]:
    """Where the records are without which this one is worth nothing."""
    if isinstance(record, records.RelatednessRecord):
        tasks = (candidate for candidate in record.candidates if candidate is not None)
        yield from map(records.AutoencoderRecord.path_of, tasks)
    elif isinstance(record, records.TaskManifest):
        yield records.StatisticsRecord.path_of()
        yield records.TaskRecord.path_of(record.task)
        yield records.AutoencoderRecord.path_of(record.task)
        yield records.RelatednessRecord.path_of(record.task)
        yield records.TaskTimings.path_of(record.task)
        if record.parent is not None:
            yield records.TaskManifest.path_of(record.parent)


def _task_of(path: str) -> TaskId | None:
    """The task in whose folder a file is; None for files of the run itself."""
    match = _TASK_FILE.fullmatch(path)
    return int(match[1]) if match else None
