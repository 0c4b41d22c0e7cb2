"""Writing and reading a run directory: a file is whole under its final name, or it is not there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from distributed_eg import given
from distributed_eg.errors import DamagedFileError, StorageError
from distributed_eg.masking import masked, masked_in
from distributed_eg.store import local_files
from distributed_eg.store.local_files import TEMPORARY
from distributed_eg.store.record_text import REPAIR, parse_record, record_bytes

_HASH_DIGITS = 16
_FAULTS = (OSError, pa.ArrowException)
"""What file systems raise; Google's, where it does not know better, none of Python's own."""


@dataclass(frozen=True)  # without slots, with which it pickles three times slower; a request has one for each task
class Artifact:
    """A sealed file: ``path`` relative to the run directory, and what its bytes must hash to."""

    path: str
    sha256: str
    size_bytes: int


class Storage:
    """A run directory on any ``pyarrow.fs`` file system; cheap to open, holds no state of the run.

    ``uri`` is a local path, or a URI such as ``s3://bucket/run-7``. Paths are relative to the run directory.

    Raises:
        InputError: it is empty, or neither a path nor a URI.
        StorageError: the URI names no file system that can be opened; from each method, too: the run directory cannot
            be written or read, does not keep what is written, or the path leads out of it.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        where = given.location(uri, "The run directory")
        self.uri = where if "://" in where else os.path.abspath(where)
        """What any process opens it by: a URI as it was given, secrets included, or an absolute path."""
        self.shown = masked(self.uri)
        """The same for messages, without secrets."""
        try:
            base, path = fs.FileSystem.from_uri(where) if "://" in where else (fs.LocalFileSystem(), self.uri)
        except (ValueError, pa.ArrowNotImplementedError, OSError, ImportError) as error:
            told, cause = self._told(error)
            raise StorageError(f"The storage {self.shown!r} names no file system that can be opened: {told}") from cause
        self.local_folder: Path | None = Path(path) if isinstance(base, fs.LocalFileSystem) else None
        """The run directory as a folder of this machine; None on an object store."""
        self._real_folder = "" if self.local_folder is None else os.path.realpath(self.local_folder)
        self._fs = fs.SubTreeFileSystem(path, base)
        self._verified: dict[Artifact, tuple[int, ...]] = {}
        """What ``verified_file`` has seen, and of which file on disk."""

    def __repr__(self) -> str:
        return f"Storage({self.shown!r})"

    def write(self, path: str, data: bytes) -> Artifact:
        """Seal ``data`` under ``path``.

        On a local disk or NFS the bytes go to a temporary name, are flushed and then renamed; object stores make an
        object visible only when it is whole. Both are asked for its size; other damage is found when it is read.
        """
        self._check(path)
        with self._writing(path):
            if self.local_folder is not None:
                with local_files.temporary(self.local_folder / path, partial(Path.write_bytes, data=data)) as file:
                    local_files.flush(file, len(data))
                    file.replace(self.local_folder / path)
            else:
                self._write_object(path, data)
        return artifact_of(path, data)

    def write_file(self, prefix: str, suffix: str, fill: Callable[[Path], object]) -> Artifact:
        """Seal what ``fill`` writes to a local file, as ``write`` does, under a name with its own hash."""
        assert self.local_folder is not None
        self._check(prefix)
        with self._writing(prefix), local_files.temporary(self.local_folder / prefix, fill) as file:
            size_bytes = file.stat().st_size
            with ThreadPoolExecutor(1) as pool:
                flushed = pool.submit(local_files.flush, file, size_bytes)
                sha256 = sha256_of(file)
                flushed.result()
            artifact = Artifact(hashed_path(prefix, sha256, suffix), sha256, size_bytes)
            file.replace(self.local_folder / artifact.path)
        return artifact

    def create(self, path: str, data: bytes) -> bool:
        """Write a file that must not be there yet: whether this call made it.

        Of several callers at once exactly one makes it, on local disks and NFS. Object stores have no such call in
        ``pyarrow.fs``: there the last of several writers within the same moment wins, which each of them sees only if
        it wrote before this call read back.
        """
        self._check(path)
        with self._writing(path):
            if self.local_folder is not None:
                with local_files.temporary(self.local_folder / path, partial(Path.write_bytes, data=data)) as file:
                    local_files.flush(file, len(data))
                    return local_files.link(file, self.local_folder / path, data)
            if self.exists(path):
                return False
            self._write_object(path, data)
            return self.read(path) == data

    def _write_object(self, path: str, data: bytes) -> None:
        try:
            stream = self._fs.open_output_stream(path)
        except FileNotFoundError:  # a file system, unlike an object store, that wants the folder first
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            stream = self._fs.open_output_stream(path)
        with stream:
            stream.write(data)
        kept = self._fs.get_file_info(path).size
        if kept != len(data):
            raise OSError(f"the store reports {kept} bytes after {len(data)} bytes were written.")

    def read(self, path: str) -> bytes:
        """The bytes of ``path``; ``StorageError`` where it is missing."""
        self._check(path, follow=True)
        try:
            with self._fs.open_input_stream(path) as stream:
                return bytes(stream.read())
        except _FAULTS as error:
            told, cause = self._told(error)
            raise StorageError(f"The run directory {self.shown!r} has no readable file {path!r}: {told}") from cause

    def read_artifact(self, artifact: Artifact) -> bytes:
        """The bytes of a sealed file, verified.

        Raises:
            DamagedFileError: it is missing, or its bytes have another size or hash than its record says.
        """
        says = f"its record says {artifact.size_bytes} bytes and {str(artifact.sha256)[:12]}…"
        try:
            data = self.read(artifact.path)
        except StorageError as error:
            self._check(artifact.path, follow=True)
            if self.exists(artifact.path):
                raise
            message = f"The file {artifact.path!r} in {self.shown!r} is missing; {says}. {REPAIR}"
            raise DamagedFileError(message) from error
        found = artifact_of(artifact.path, data)
        if found != artifact:
            raise DamagedFileError(
                f"The file {found.path!r} in {self.shown!r} is damaged: {len(data)} bytes hash to {found.sha256[:12]}…"
                f", {says}. {REPAIR}"
            )
        return data

    def verified_file(self, artifact: Artifact) -> Path:
        """Where a sealed file of a local run directory is; it is read and hashed the first time, and whenever it is
        another one than it was then. Raises what ``read_artifact`` does."""
        assert self.local_folder is not None
        self._check(artifact.path, follow=True)
        file = self.local_folder / artifact.path
        try:
            status = file.stat()
            seen = status.st_ino, status.st_size, status.st_mtime_ns
            if self._verified.get(artifact) != seen and sha256_of(file) == artifact.sha256:
                self._verified[artifact] = seen
        except OSError:
            seen = None
        if seen is None or self._verified.get(artifact) != seen:
            self.read_artifact(artifact)  # says what is wrong
        return file

    def write_record(self, path: str, record: dict[str, Any]) -> Artifact:
        """Seal a JSON record, with its schema version."""
        return self.write(path, record_bytes(record))

    def read_record(self, path: str) -> dict[str, Any]:
        """A JSON record.

        Raises:
            DamagedFileError: it is no JSON object, or not the one that was sealed.
            StorageError: it is missing, or has another schema version.
        """
        return self.parse_record(path, self.read(path))

    def parse_record(self, path: str, data: bytes) -> dict[str, Any]:
        """What ``read_record`` gives, of a file whose bytes were read already."""
        return parse_record(f"The record {path!r} in {self.shown!r}", path, data)

    def exists(self, path: str) -> bool:
        """Whether a file of that name is there."""
        self._check(path)
        with self._asking(path):
            return bool(self._fs.get_file_info(path).type == fs.FileType.File)

    def size(self, path: str) -> int:
        """Size of a file in bytes; ``StorageError`` where it is not there."""
        return int(self._info(path).size)

    def modified_s(self, path: str) -> float:
        """When a file was written, in seconds since 1970; ``StorageError`` where it is not there."""
        return float(self._info(path).mtime.timestamp())

    def _info(self, path: str) -> fs.FileInfo:
        self._check(path)
        with self._asking(path):
            info = self._fs.get_file_info(path)
        if info.type != fs.FileType.File:
            raise StorageError(f"The run directory {self.shown!r} has no file {path!r}.")
        return info

    def walk(self) -> list[str]:
        """Paths of all files of the run directory, sorted; symbolic links are neither listed nor followed."""
        with self._asking(""):
            if self.local_folder is None:
                selector = fs.FileSelector("", recursive=True, allow_not_found=True)
                infos = self._fs.get_file_info(selector)
                return sorted(info.path for info in infos if info.type == fs.FileType.File)
            found = [
                Path(folder, name) for folder, _, names in os.walk(self.local_folder, onerror=_raise) for name in names
            ]
            return sorted(
                file.relative_to(self.local_folder).as_posix()
                for file in found
                if file.is_file() and not file.is_symlink()
            )

    def list(self, path: str) -> list[str]:
        """Names of the files and folders directly under ``path``, sorted; none where it does not exist."""
        self._check(path, follow=True)
        # Google's store has no folders, and shows none that nobody made: what lies in them tells their names.
        selector = fs.FileSelector(path, recursive=self.local_folder is None, allow_not_found=True)
        with self._asking(path):
            infos = self._fs.get_file_info(selector)
        return sorted({info.path[len(path) :].lstrip("/").partition("/")[0] for info in infos})

    def delete(self, path: str) -> None:
        """Remove a file; ``StorageError`` where it is not there, or may not be removed."""
        self._check(path)
        with self._asking(path):
            self._fs.delete_file(path)

    def sweep(self) -> int:
        """Remove the temporary files that killed writers left, and say how many; object stores have none.

        A file that somebody is writing at this moment goes too, and its writer gets an error: call it while nobody
        writes.
        """
        if self.local_folder is None:
            return 0
        left = [path for path in self.walk() if path.rpartition("/")[2].startswith(TEMPORARY)]
        with self._asking(TEMPORARY):
            for path in left:
                (self.local_folder / path).unlink(missing_ok=True)
        return len(left)

    def _check(self, path: str, *, follow: bool = False) -> None:
        """Refuse a path that leads out of the run directory, by its text or by a symbolic link.

        The last part of a path may be a link where it is only looked at, replaced or removed; ``follow`` says that
        what it points to will be read.
        """
        says = f"{path!r:.200} names no file inside the run directory {self.shown!r}"
        if not _is_plain(path):
            raise StorageError(f"{says}; the record that names it may have been tampered with. Nothing was touched.")
        if self.local_folder is None:
            return
        target = self.local_folder / path
        real = os.path.realpath(target if follow else target.parent)
        if os.path.commonpath([real, self._real_folder]) != self._real_folder:
            raise StorageError(
                f"{says}: a symbolic link leads to {real!r}; it, or the record that names it, may have been "
                "tampered with. Nothing was touched."
            )

    @contextlib.contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except _FAULTS as error:
            told, cause = self._told(error)
            raise StorageError(
                f"The storage {self.shown!r} cannot be written at {path!r}: {told} Check that it exists, that it is "
                "writable and that it has room."
            ) from cause

    @contextlib.contextmanager
    def _asking(self, path: str) -> Iterator[None]:
        try:
            yield
        except _FAULTS as error:
            told, cause = self._told(error)
            raise StorageError(f"The storage {self.shown!r} does not answer for {path!r}: {told}") from cause

    def _told(self, error: Exception) -> tuple[str, Exception | None]:
        """What an error of another library says, without secrets, and the error itself where it holds none: whatever
        prints a traceback prints the causes, too."""
        told = masked_in(str(error), self.uri)
        return told, error if told == str(error) else None


def artifact_of(path: str, data: bytes) -> Artifact:
    """What ``data`` is called once it is sealed under ``path``."""
    return Artifact(path, hashlib.sha256(data).hexdigest(), len(data))


def hashed_path(prefix: str, sha256: str, suffix: str) -> str:
    """The path of a file that is named by its hash."""
    return f"{prefix}-{sha256[:_HASH_DIGITS]}{suffix}"


def sha256_of(file: Path) -> str:
    """The hash of a local file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_plain(path: object) -> bool:
    """Whether a path is of the kind that this package writes: relative, of named parts, without any tricks."""
    if not isinstance(path, str) or re.search(r"[\\\0\ud800-\udfff]|^[A-Za-z]:", path):
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a folder that is not there has no files
        raise error
