"""Who drives a run: at most one driver at a time, each with a number, its generation, above all before it."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from distributed_eg.errors import DamagedFileError, RunInUseError, StorageError
from distributed_eg.store import layout
from distributed_eg.store.storage import Storage, record_bytes

logger = logging.getLogger(__name__)

LEASE_S = 60.0
"""For how long a driver that cannot be looked at, being on another machine, counts as alive after its last renewal."""

_SAME_START_S = 2.0  # a process's start is reckoned from the boot time, which moves when the clock is set right
_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that drives a run, and where its number means something."""

    host: str
    boot_id: str
    """Empty where the system has none."""
    pid_namespace: int
    """0 where the system has none; containers on one machine have one each."""
    pid: int
    started: float
    start_ticks: int
    """When it started, by a clock that nobody sets; 0 where the system does not tell."""


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """What ``sessions/`` holds for each driver; the one with the highest generation drives, while it is open."""

    generation: int
    holder: Holder
    renewed_at: float
    open: bool
    token: str = ""
    """Tells the holding process itself whether it still holds the run: it may have failed to write that it does not."""


class Lease:
    """The right to write a run directory, renewed by a thread until it is released; made by ``acquire``."""

    def __init__(self, storage: Storage, record: LeaseRecord, now: Callable[[], float]) -> None:
        self.generation = record.generation
        self._storage = storage
        self._record = record
        self._now = now
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=_thread_of(record), daemon=True)

    @classmethod
    def acquire(cls, storage: Storage, now: Callable[[], float] = time.time) -> Lease:
        """Become the driver of the run.

        Exclusive on local disks and NFS. On an object store two drivers that start within the same moment may both
        get through (see ``Storage.create``).

        Args:
            storage: the run directory.
            now: seconds since the epoch.

        Raises:
            RunInUseError: another driver holds the run, or took it at the same moment.
            StorageError: the run directory cannot be read or written.
        """
        generation, last = _latest(storage)
        if last is not None and _is_alive(last, now()):
            raise RunInUseError(
                f"The run {storage.uri!r} is in use by {_described(last, now())}. Wait until it has ended, or end it; "
                f"the lease of a driver that died on another machine expires {LEASE_S:.0f} s after its last renewal."
            )
        record = LeaseRecord(generation + 1, _this_process(), now(), open=True, token=uuid.uuid4().hex)
        lease = cls(storage, record, now)
        lease._thread.start()  # first: by it another thread of this process sees that the record's driver is alive
        created = False
        try:
            created = storage.create(layout.session_file(record.generation), record_bytes(asdict(record)))
        finally:
            if not created:
                lease._stop.set()
        if not created:
            raise RunInUseError(
                f"The run {storage.uri!r} was taken by another driver at this moment, as its number "
                f"{record.generation}. Start only one driver for each run, or wait until that one has ended."
            )
        return lease

    def release(self) -> None:
        """Let the next driver in at once; the second call does nothing, and a storage that went away is only logged."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            logger.warning(
                "The lease of %r cannot be given back: its last renewal hangs. It expires in %.0f s.",
                self._storage.uri,
                LEASE_S,
            )
            return
        try:
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
            raise StorageError(f"The run {self._storage.uri!r} has no {path!r} any more; was it removed?")
        record = replace(self._record, renewed_at=self._now(), open=is_open)
        self._storage.write_record(path, asdict(record))


def superseded(storage: Storage, generation: int) -> bool:
    """Whether a later driver took the run over: the one with this generation must not write any more.

    Raises:
        StorageError: that cannot be told.
    """
    return storage.exists(layout.session_file(generation + 1))


def holder_of(storage: Storage, now: Callable[[], float] = time.time) -> str | None:
    """Which driver holds the run, in words for a message; None where no living one does.

    Raises:
        StorageError: the run directory cannot be read.
    """
    _, last = _latest(storage)
    return _described(last, now()) if last is not None and _is_alive(last, now()) else None


def _latest(storage: Storage) -> tuple[int, LeaseRecord | None]:
    """The highest generation so far, 0 where there is none, and its record, None where that is damaged."""
    names = [name.removesuffix(".json") for name in storage.list(layout.SESSIONS) if name.endswith(".json")]
    generation = max((int(name) for name in names if name.isdecimal()), default=0)
    if not generation:
        return 0, None
    path = layout.session_file(generation)
    try:
        raw = storage.read_record(path)
        try:
            holder = Holder(**raw["holder"])
            started, ticks = float(holder.started), int(holder.start_ticks)
            holder = replace(holder, pid=int(holder.pid), started=started, start_ticks=ticks)
            renewed_at, is_open, token = float(raw["renewed_at"]), bool(raw["open"]), str(raw["token"])
            return generation, LeaseRecord(generation, holder, renewed_at, is_open, token)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"The record {path!r} in {storage.uri!r} is damaged: {error!r}.") from error
    except DamagedFileError as error:
        logger.warning("It cannot be told who drove the run last, so that the run counts as free. %s", error)
        return generation, None


def _is_alive(record: LeaseRecord, now: float) -> bool:
    if not record.open:
        return False
    holder, here = record.holder, _this_process()
    if (holder.host, holder.boot_id, holder.pid_namespace) == (here.host, here.boot_id, here.pid_namespace):
        if holder.pid == here.pid:
            return any(thread.name == _thread_of(record) for thread in threading.enumerate())
        try:
            process = psutil.Process(holder.pid)
            same = abs(process.create_time() - holder.started) < _SAME_START_S
            if holder.start_ticks:
                same = _start_ticks(holder.pid) == holder.start_ticks
            return same and bool(process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            logger.debug("Process %d may not be looked at; its lease's last renewal decides.", holder.pid)
    return now - record.renewed_at < LEASE_S


def _thread_of(record: LeaseRecord) -> str:
    """Name of the thread that renews a lease."""
    return f"distributed-eg-lease-{record.token}"


def _described(record: LeaseRecord, now: float) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.holder.started))
    return (
        f"process {record.holder.pid} on {record.holder.host!r}, which started at {since} and last renewed its lease "
        f"{max(0.0, now - record.renewed_at):.0f} s ago"
    )


def _this_process() -> Holder:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return Holder(
        host=socket.gethostname(),
        boot_id=boot.read_text(encoding="ascii").strip() if boot.exists() else "",
        pid_namespace=namespace.stat().st_ino if namespace.exists() else 0,
        pid=os.getpid(),
        started=float(psutil.Process().create_time()),
        start_ticks=_start_ticks(os.getpid()),
    )


def _start_ticks(pid: int) -> int:
    """When a process started, in ticks since the system did; 0 where the system does not tell, or it is gone."""
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, ValueError, IndexError):
        return 0
