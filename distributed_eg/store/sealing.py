"""Writing and reading a run directory: a file is whole under its final name, or it is not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from distributed_eg.errors import StorageError
from distributed_eg.store.layout import SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Artifact:
    """A sealed file: ``path`` relative to the run directory, and what its bytes must hash to."""

    path: str
    sha256: str
    size_bytes: int


class Storage:
    """A run directory on any ``pyarrow.fs`` file system; cheap to open, holds no state of the run.

    Args:
        uri: a local path, or a URI such as ``s3://bucket/run-7``.

    Raises:
        StorageError: the URI names no file system that can be opened.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            base, path = fs.FileSystem.from_uri(uri) if "://" in uri else (fs.LocalFileSystem(), os.path.abspath(uri))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ImportError) as error:
            raise StorageError(f"The storage {uri!r} names no file system that can be opened: {error}") from error
        self._local = Path(path) if isinstance(base, fs.LocalFileSystem) else None
        self._fs = fs.SubTreeFileSystem(path, base)

    def write(self, path: str, data: bytes) -> Artifact:
        """Seal ``data`` under ``path``.

        On a local disk or NFS the bytes go to a temporary name, are flushed and then renamed; object stores make an
        object visible only when it is whole.

        Raises:
            StorageError: the directory cannot be written.
        """
        try:
            if self._local is not None:
                _write_local(self._local / path, data)
            else:
                self._write_object(path, data)
        except OSError as error:
            raise StorageError(
                f"The storage {self.uri!r} cannot be written at {path!r}: {error} Check that it exists, that it is "
                "writable and that it has room."
            ) from error
        return Artifact(path, hashlib.sha256(data).hexdigest(), len(data))

    def _write_object(self, path: str, data: bytes) -> None:
        try:
            stream = self._fs.open_output_stream(path)
        except FileNotFoundError:  # a file system, unlike an object store, that wants the folder first
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            stream = self._fs.open_output_stream(path)
        with stream:
            stream.write(data)

    def read(self, path: str) -> bytes:
        """The bytes of ``path``.

        Raises:
            StorageError: it is missing or cannot be read.
        """
        try:
            with self._fs.open_input_stream(path) as stream:
                return bytes(stream.read())
        except OSError as error:
            raise StorageError(f"The run directory {self.uri!r} has no readable file {path!r}: {error}") from error

    def read_artifact(self, artifact: Artifact) -> bytes:
        """The bytes of a sealed file, verified.

        Raises:
            StorageError: it is missing, or its bytes have another hash than its record says.
        """
        data = self.read(artifact.path)
        found = hashlib.sha256(data).hexdigest()
        if found != artifact.sha256:
            raise StorageError(
                f"The file {artifact.path!r} in {self.uri!r} is damaged: {len(data)} bytes hash to {found[:12]}…, its "
                f"record says {artifact.size_bytes} bytes and {artifact.sha256[:12]}…."
            )
        return data

    def write_record(self, path: str, record: dict[str, Any]) -> Artifact:
        """Seal a JSON record, with its schema version."""
        body = {"schema_version": SCHEMA_VERSION, **record}
        return self.write(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())

    def read_record(self, path: str) -> dict[str, Any]:
        """A JSON record.

        Raises:
            StorageError: it is missing, is no JSON, or has another schema version.
        """
        try:
            record = json.loads(self.read(path))
        except ValueError as error:
            raise StorageError(f"The record {path!r} in {self.uri!r} is damaged: {error}") from error
        if not isinstance(record, dict):
            raise StorageError(f"The record {path!r} in {self.uri!r} is damaged: it holds {record!r}, not an object.")
        version = record.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise StorageError(
                f"The record {path!r} in {self.uri!r} has schema version {version}; this package reads "
                f"{SCHEMA_VERSION}. Use the package version that wrote it."
            )
        return record

    def exists(self, path: str) -> bool:
        """Whether a file of that name is there.

        Raises:
            StorageError: that cannot be told.
        """
        with self._asking(path):
            return bool(self._fs.get_file_info(path).type == fs.FileType.File)

    def list(self, path: str) -> list[str]:
        """Names of the files and folders directly under ``path``, sorted; none where it does not exist.

        Raises:
            StorageError: that cannot be told.
        """
        selector = fs.FileSelector(path, allow_not_found=True)
        with self._asking(path):
            return sorted(info.base_name for info in self._fs.get_file_info(selector))

    def delete(self, path: str) -> None:
        """Remove a file.

        Raises:
            StorageError: it is not there, or may not be removed.
        """
        with self._asking(path):
            self._fs.delete_file(path)

    @contextlib.contextmanager
    def _asking(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"The storage {self.uri!r} does not answer for {path!r}: {error}") from error


def _write_local(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
