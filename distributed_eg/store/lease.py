"""Who drives a run: at most one driver at a time, each with a number, its generation, above all before it."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distributed_eg.errors import DamagedFileError, RunInUseError, StorageError
from distributed_eg.store import layout
from distributed_eg.store.local_files import sync_folder
from distributed_eg.store.record_text import record_bytes, repair_of
from distributed_eg.store.storage import Storage

try:
    import fcntl
except ImportError:  # a system without such locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LEASE_S = 60.0
"""For how long a driver whose lock cannot be looked at, as on another machine, is alive after its last renewal."""

_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that drives a run, to be named in messages."""

    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """What ``sessions/`` holds for each driver; the one with the highest generation drives, while it is open."""

    generation: int
    holder: Holder
    renewed_at: float
    open: bool
    lock: str = ""
    """Which lock (see ``_locked``) its process holds for as long as it drives; empty where it has none."""


class Lease:
    """The right to write a run directory, renewed by a thread until it is released; made by ``acquire``."""

    def __init__(self, storage: Storage, record: LeaseRecord, now: Callable[[], float]) -> None:
        self.generation = record.generation
        self._storage = storage
        self._record = record
        self._now = now
        self._lock = ExitStack()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="distributed-eg-lease", daemon=True)

    @classmethod
    def acquire(cls, storage: Storage, now: Callable[[], float] = time.time) -> Lease:
        """Become the driver of the run; ``now`` gives seconds since the epoch.

        Exclusive on local disks and NFS. On an object store two drivers that start within the same moment may both
        get through (see ``Storage.create``).

        Raises:
            RunInUseError: another driver holds the run, or took it at the same moment.
            StorageError: the run directory cannot be read or written.
        """
        with ExitStack() as held:
            lock = held.enter_context(_locked(storage))
            generation, last = _latest(storage)
            driver = _living(last, lock, now())
            holder = Holder(socket.gethostname(), os.getpid())
            record = LeaseRecord(generation + 1, holder, now(), open=True, lock=lock or "")
            if driver is None and not storage.create(layout.session_file(generation + 1), record_bytes(asdict(record))):
                driver = "a process that took it at this moment"
            if driver is not None:
                raise RunInUseError(
                    f"The run {storage.shown!r} is in use by {driver}. Wait until it has ended, or end it; the lease "
                    f"of a driver that died on another machine expires {LEASE_S:.0f} s after its last renewal."
                )
            lease = cls(storage, record, now)
            lease._thread.start()
            lease._lock = held.pop_all()
        if lock:  # a child that the driver forks, and that outlives it, must not hold the run
            os.register_at_fork(after_in_child=lease._lock.close)
        return lease

    def release(self) -> None:
        """Let the next driver in at once; the second call does nothing, and a storage that went away is only logged."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._lock.close()
        self._thread.join(_PATIENCE_S)
        try:
            if self._thread.is_alive():
                raise StorageError(f"The last renewal of the lease of {self._storage.shown!r} hangs.")
            self._write(is_open=False)
        except StorageError as error:
            logger.warning("The lease could not be given back; it expires in %.0f s. %s", LEASE_S, error)

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_S / 4):
            try:
                self._write(is_open=True)
            except StorageError as error:
                logger.warning("The lease could not be renewed, which is tried again. %s", error)

    def _write(self, *, is_open: bool) -> None:
        path = layout.session_file(self.generation)
        if not self._storage.exists(path):  # a run that was removed must not come to be again
            raise StorageError(f"The run {self._storage.shown!r} has no {path!r} any more; was it removed?")
        self._storage.write_record(path, asdict(replace(self._record, renewed_at=self._now(), open=is_open)))


def superseded(storage: Storage, generation: int) -> bool:
    """Whether a later driver took the run over, so that the one with this generation must not write any more;
    ``StorageError`` where that cannot be told."""
    return storage.exists(layout.session_file(generation + 1))


def holder_of(storage: Storage, now: Callable[[], float] = time.time) -> str | None:
    """Which driver holds the run, in words for a message; None where no living one does. Writes nothing;
    ``StorageError`` where the run directory cannot be read."""
    _, last = _latest(storage)
    with _locked(storage, only_look=True) as lock:
        return _living(last, lock, now())


@contextmanager
def _locked(storage: Storage, *, only_look: bool = False) -> Iterator[str | None]:
    """Hold the system's lock on the local folder ``sessions/``, which ends with this process, however that ends.

    Gives what tells this lock from all others, on other machines and file systems, too; an empty text where there is
    none to be had, None where somebody else holds it. ``only_look`` lets others look, too, and makes no folder.
    """
    with ExitStack() as undo:
        lock: str | None = ""
        if fcntl is not None and storage.local_folder is not None:
            folder = storage.local_folder / layout.SESSIONS
            try:
                new = [] if only_look else [path for path in (folder, *folder.parents) if not path.exists()]
                for path in reversed(new):
                    path.mkdir(exist_ok=True)
                    sync_folder(path.parent)  # a power cut must not take a folder of the run
                descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
                undo.callback(os.close, descriptor)
                fcntl.flock(descriptor, (fcntl.LOCK_SH if only_look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                status, boot = os.fstat(descriptor), Path("/proc/sys/kernel/random/boot_id")
                system = boot.read_text(encoding="ascii").strip() if boot.exists() else socket.gethostname()
                lock = f"{system}:{status.st_dev}:{status.st_ino}"
            except BlockingIOError:
                lock = None
            except OSError as error:  # where that is more than a lack of locks, the first write tells
                logger.info("No lock on %r, so that a lease ends by its release or expiry: %s", str(folder), error)
        yield lock


def last_session(storage: Storage) -> tuple[int, LeaseRecord | DamagedFileError | None]:
    """The highest generation so far, 0 where there is none, and its record, or why that cannot be read."""
    names = [name.removesuffix(".json") for name in storage.list(layout.SESSIONS) if name.endswith(".json")]
    generation = max((int(name) for name in names if name.isdecimal()), default=0)
    try:
        return generation, _read(storage, generation) if generation else None
    except DamagedFileError as error:
        return generation, error


def _latest(storage: Storage) -> tuple[int, LeaseRecord | None]:
    """The same, where a damaged record is none, with a warning."""
    generation, last = last_session(storage)
    if isinstance(last, DamagedFileError):
        logger.warning("Nobody can tell who drove the run last, so that it counts as free: %s", last)
        return generation, None
    return generation, last


def _read(storage: Storage, generation: int) -> LeaseRecord:
    path = layout.session_file(generation)
    raw = storage.read_record(path)
    try:
        holder = Holder(str(raw["holder"]["host"]), int(raw["holder"]["pid"]))
        lock = str(raw.get("lock", ""))  # older versions of this package hold none
        return LeaseRecord(generation, holder, float(raw["renewed_at"]), bool(raw["open"]), lock)
    except (KeyError, TypeError, ValueError) as error:
        what = f"The record {path!r} in {storage.shown!r} is damaged"
        raise DamagedFileError(f"{what}: it tells no driver ({error!r}). {repair_of(path)}") from error


def _living(last: LeaseRecord | None, lock: str | None, now: float) -> str | None:
    """The driver in words, told by the newest record and what ``_locked`` gave; None where no living one is known."""
    if last is None or not last.open:
        return None if lock is not None else "a process that has just begun, or is about to end"
    if lock is not None and (now - last.renewed_at >= LEASE_S or (lock and lock == last.lock)):
        return None
    idle_s = max(0.0, now - last.renewed_at)
    return f"process {last.holder.pid} on {last.holder.host!r}, which last renewed its lease {idle_s:.0f} s ago"
