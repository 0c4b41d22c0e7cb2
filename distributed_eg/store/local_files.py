"""Files on a local disk or NFS that are whole under their final name, or not there: what ``Storage`` writes with."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

TEMPORARY = ".writing-"
"""How the names of files begin that are being written, or whose writer was killed."""

_NO_FOLDER_SYNC = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def temporary(target: Path, fill: Callable[[Path], object]) -> Iterator[Path]:
    """A file beside ``target`` that ``fill`` writes, to be flushed and put in its place; gone afterwards."""
    new_folders = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        file.touch(exist_ok=False)
        mode = file.stat().st_mode
        fill(file)
        file.chmod(mode)  # safetensors replaces the file by one that nobody else may read
        yield file
        for folder in (target.parent, *(folder.parent for folder in new_folders)):
            sync_folder(folder)
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def flush(file: Path, size_bytes: int) -> None:
    """Make a file's bytes last.

    Raises:
        OSError: the disk cannot, or keeps another number of them.
    """
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
    if (kept := file.stat().st_size) != size_bytes:
        raise OSError(f"the disk keeps {kept} bytes after {size_bytes} bytes were written.")


def link(temporary: Path, target: Path, data: bytes) -> bool:
    """Give a file its final name too, unless that is taken: whether it got it."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # NFS may say so after it did the work, when its first answer was lost: then the file has two names.
        return temporary.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # Buckets mounted as folders: as exclusive, but others may see the file before it is whole.
        try:
            with target.open("xb") as stream:
                stream.write(data)
        except FileExistsError:
            return False
    return True


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last, on file systems that can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
