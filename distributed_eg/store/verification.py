"""Checking a run directory against every hash in its records, and finding what no record names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from distributed_eg.errors import DamagedFileError, RunInUseError, StorageError
from distributed_eg.store import layout, records
from distributed_eg.store.lease import Lease, holder_of
from distributed_eg.store.records import AutoencoderRecord, RelatednessRecord, StatisticsRecord, TaskManifest
from distributed_eg.store.storage import REPAIR, TEMPORARY, Artifact, Storage, repair_of
from distributed_eg.types import TaskId

_RUN_WEIGHTS = re.compile(r"(root|statistics|root-autoencoder)-[0-9a-f]+\.safetensors")
_TASK_WEIGHTS = re.compile(r"(autoencoder|expert|checkpoint)-[0-9a-f]+\.safetensors")
_TASK_FILE = re.compile(rf"{layout.TASKS}/(\d{{5,}})/(.+)")


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


@dataclass(frozen=True, slots=True)
class _Record:
    """A record that is there: its value and the files that it names, or why it cannot be read."""

    path: str
    value: object = None
    artifacts: tuple[Artifact, ...] = ()
    size_bytes: int = 0
    error: str | None = None


def verify(storage: Storage) -> Verification:
    """Read every record of a run and every file that one names, and compare sizes and hashes.

    Raises:
        StorageError: the run directory cannot be listed; whatever is wrong inside it is told, not raised.
    """
    found = {record.path: record for record in _read_records(storage)}
    damages = [Damage(record.path, record.error) for record in found.values() if record.error is not None]
    damages += _missing(storage, found)
    sizes = {record.path: record.size_bytes for record in found.values() if record.error is None}
    checked: set[Artifact] = set()
    harmed = {damage.path for damage in damages}
    for record in found.values():
        for artifact in record.artifacts:
            if artifact in checked or artifact.path in harmed:
                continue
            checked.add(artifact)
            try:
                sizes[artifact.path] = len(storage.read_artifact(artifact))
            except StorageError as error:
                if record.path.endswith("/checkpoint.json") and _has_changed(storage, record):
                    continue  # a driver works on the run
                # What cannot be a file of the run is the fault of the record that names it.
                path = artifact.path if isinstance(error, DamagedFileError) else record.path
                damages.append(Damage(path, f"Named by {record.path!r}: {error}"))
                harmed.add(artifact.path)
                sizes.pop(artifact.path, None)
    num_files = len(sizes.keys() | {damage.path for damage in damages})
    return Verification(num_files, sum(sizes.values()), tuple(damages))


def _has_changed(storage: Storage, record: _Record) -> bool:
    """Whether a checkpoint's record is another one by now, or gone."""
    task = _task_of(record.path)
    assert task is not None
    again = _read_record(storage, record.path, lambda: _read_checkpoint(storage, task))
    return again is None or again != record


def unnamed(storage: Storage) -> list[str]:
    """The files of the run directory that nothing names, records first, in the order in which they may be deleted.

    Those are weights of earlier attempts, checkpoints of sealed tasks, and what killed writers left. Where a record
    cannot be read, or names a file that is not there, it may have named any file of its task (or, if it is the run's,
    any outside of the tasks), and none of them counts. Files of other kinds and in other places are not this
    package's, and are left alone.

    Raises:
        StorageError: the run directory cannot be listed.
    """
    found = _read_records(storage)
    sealed = {record.value.task for record in found if isinstance(record.value, TaskManifest)}
    over = {layout.task_file(task, "checkpoint") for task in sealed}
    named = {artifact.path for record in found if record.path not in over for artifact in record.artifacts}
    files = storage.walk()
    present = set(files)
    doubtful = {
        _task_of(record.path)
        for record in found
        if record.error is not None
        or (record.path not in over and any(artifact.path not in present for artifact in record.artifacts))
    }
    left = []
    for path in files:
        task, name = _task_of(path), path.rpartition("/")[2]
        if task in doubtful or path in named:
            continue
        if name.startswith(TEMPORARY):
            left.append(path)
        elif task is None:
            left += [path] if _RUN_WEIGHTS.fullmatch(path) else []
        elif path in over or _TASK_WEIGHTS.fullmatch(name):
            left.append(path)
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
            raise RunInUseError(f"The run {storage.uri!r} is in use by {holder}. Try again when it has ended.")
        return {path: storage.size(path) for path in unnamed(storage)}
    lease = Lease.acquire(storage)
    try:
        sizes = {path: storage.size(path) for path in unnamed(storage)}
        for path in sizes:
            storage.delete(path)
        return sizes
    finally:
        lease.release()


def _read_records(storage: Storage) -> list[_Record]:
    """Every record that is there, but those of sessions, which nobody needs any more."""
    found = [
        _read_record(storage, layout.RUN, lambda: _read_artifact_of(storage, layout.RUN, "backbone", "root")),
        _read_record(storage, layout.STATISTICS, lambda: records.read_statistics(storage)),
    ]
    for task in records.stored_tasks(storage):
        for name, read in _READERS.items():
            found.append(_read_record(storage, layout.task_file(task, name), partial(read, storage, task)))
    return [record for record in found if record is not None]


def _read_record(storage: Storage, path: str, read: Callable[[], object]) -> _Record | None:
    try:
        if not storage.exists(path):
            return None
        value = read()
        artifacts = _artifacts(value)
        for artifact in artifacts:
            types = (type(artifact.path), type(artifact.sha256), type(artifact.size_bytes))
            if types != (str, str, int):
                message = f"The record {path!r} in {storage.uri!r} is damaged: it names {artifact}."
                raise DamagedFileError(f"{message} {repair_of(path)}")
        return _Record(path, value, artifacts, storage.size(path))
    except StorageError as error:
        # A driver that works on the run may just have removed it.
        return _Record(path, error=str(error)) if storage.exists(path) else None


def _read_artifact_of(storage: Storage, path: str, *keys: str) -> Artifact:
    """The artifact below ``keys`` of a record."""
    value = storage.read_record(path)
    try:
        for key in keys:
            value = value[key]
        return Artifact(**value)
    except (KeyError, TypeError) as error:
        raise DamagedFileError(
            f"The record {path!r} in {storage.uri!r} is damaged: {error!r}. {repair_of(path)}"
        ) from error


def _read_checkpoint(storage: Storage, task: TaskId) -> Artifact:
    return _read_artifact_of(storage, layout.task_file(task, "checkpoint"), "tensors")


_READERS: dict[str, Callable[[Storage, TaskId], object]] = {
    "task": records.read_task,
    "autoencoder": records.read_autoencoder,
    "relatedness": records.read_relatedness,
    "manifest": records.read_manifest,
    "timings": records.read_timings,
    "checkpoint": _read_checkpoint,
}
"""How each of a task's records is read."""


def _artifacts(value: object) -> tuple[Artifact, ...]:
    """The files that a record names."""
    if isinstance(value, Artifact):
        return (value,)
    if isinstance(value, StatisticsRecord):
        return (value.artifact,) if value.root_autoencoder is None else (value.artifact, value.root_autoencoder)
    if isinstance(value, AutoencoderRecord):
        return (value.artifact,)
    if isinstance(value, TaskManifest):
        return (value.autoencoder, value.relatedness, value.expert)
    return ()


def _missing(storage: Storage, found: dict[str, _Record]) -> Iterator[Damage]:
    """Records that others need and that are not there, and manifests that name another autoencoder than its record."""

    told = set()

    def need(path: str, by: str) -> Iterator[Damage]:
        if path not in found and path not in told:
            told.add(path)
            yield Damage(path, f"The record {path!r} in {storage.uri!r} is missing; {by} needs it. {repair_of(path)}")

    yield from need(layout.RUN, "every task")
    for record in found.values():
        value = record.value
        if isinstance(value, RelatednessRecord):
            for row in value.rows:
                if isinstance(row.candidate, int):
                    yield from need(layout.task_file(row.candidate, "autoencoder"), f"task {value.task}")
        elif isinstance(value, TaskManifest):
            own = layout.task_file(value.task, "autoencoder")
            yield from need(layout.STATISTICS, f"task {value.task}")
            yield from need(layout.task_file(value.task, "task"), f"task {value.task}")
            yield from need(own, f"task {value.task}")
            if isinstance(value.parent, int):
                yield from need(layout.task_file(value.parent, "manifest"), f"task {value.task}")
            known = found[own].value if own in found else None
            if isinstance(known, AutoencoderRecord) and known.artifact != value.autoencoder:
                yield Damage(
                    record.path,
                    f"The manifest {record.path!r} in {storage.uri!r} names another autoencoder than {own!r}. {REPAIR}",
                )


def _task_of(path: str) -> TaskId | None:
    """The task in whose folder a file is; None for files of the run itself."""
    match = _TASK_FILE.fullmatch(path)
    return int(match[1]) if match else None
