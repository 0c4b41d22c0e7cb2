"""Records as text: JSON with a schema version and its own hash, and what repairs one that is damaged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import Any

from distributed_eg.errors import DamagedFileError, StorageError
from distributed_eg.store.layout import EVALUATIONS, RUN, SCHEMA_VERSION, SESSIONS, STREAM

REPAIR = (
    "To repair it, resume the training with the same storage (`ClusterConfig(resume=True)`, or the same "
    "`distributed-eg run … --storage …` command): the stage that made it is run again."
)

LATER = {"later": True}
"""Metadata of a record's field that earlier versions did not have, and that is None where it says nothing."""


def fields_of(record: Any) -> dict[str, Any]:
    """A dataclass's fields, not copied as ``asdict`` does: a long run's relatedness has thousands of values.

    Those that came ``LATER`` are left out where they say nothing: such a record is what earlier versions wrote.
    """
    values = ((field, getattr(record, field.name)) for field in fields(record))
    return {field.name: value for field, value in values if value is not None or field.metadata != LATER}


def record_bytes(record: dict[str, Any]) -> bytes:
    """A JSON record as it is sealed, with its schema version and its own hash; dataclasses in it are objects."""
    body = json.loads(json.dumps(record, default=fields_of))
    sealed = {"schema_version": SCHEMA_VERSION, "sha256": _digest(body), **body}
    return f"{json.dumps(sealed, indent=1, sort_keys=True)}\n".encode()


def parse_record(what: str, path: str, data: bytes) -> dict[str, Any]:
    """A record, of the bytes that were sealed under ``path``; ``what`` names it in errors.

    Raises:
        DamagedFileError: it is no JSON object, or not the one that was sealed.
        StorageError: it has another schema version.
    """
    try:
        record = json.loads(data)
    except ValueError as error:
        raise DamagedFileError(f"{what} is damaged: {error}. {repair_of(path)}") from error
    if not isinstance(record, dict):
        raise DamagedFileError(f"{what} is damaged: it holds {record!r:.60}, no object. {repair_of(path)}")
    version = record.pop("schema_version", None)
    is_as_sealed = record.pop("sha256", None) == _digest(record)
    if version == SCHEMA_VERSION and is_as_sealed:
        return record
    if version == SCHEMA_VERSION or is_as_sealed or type(version) is not int:
        raise DamagedFileError(f"{what} is damaged: its content has another hash than it says. {repair_of(path)}")
    raise StorageError(
        f"{what} has schema version {version}; this package reads {SCHEMA_VERSION}. Use the package version that "
        "wrote it."
    )


def repair_of(path: str) -> str:
    """What repairs a record of the run directory, as a sentence."""
    if path == RUN:
        return "Nothing else holds what the run is: restore the file from a copy of it."
    if path.startswith(f"{SESSIONS}/"):
        return "It says who drove the run last, and nothing rests on it: the next driver writes its own."
    if path.startswith(f"{EVALUATIONS}/"):
        return (
            "It says what an evaluation measured, and nothing rests on it: remove it, and measure again "
            "(`distributed-eg eval`, or `strategy.eval`)."
        )
    if path.endswith("/timings.json"):
        return (
            "It says who did the task's stages and for how long, which cannot be had again, and nothing rests on it: a "
            "resumed training writes down that it is not known."
        )
    if path == STREAM:
        return (
            "It says in which calls tasks were brought: remove it, and a task that is brought again with the same data "
            "and settings is trained as its next version; the next driver writes it anew."
        )
    return REPAIR


def _digest(body: dict[str, Any]) -> str:
    """What a record of this schema version hashes to."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **body}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
