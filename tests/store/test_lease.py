"""The lease: one driver at a time, whoever dies and whoever comes at the same moment."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from distributed_eg.errors import RunInUseError, StorageError
from distributed_eg.store import lease as module
from distributed_eg.store.lease import LEASE_S, Holder, Lease, LeaseRecord, holder_of, superseded
from distributed_eg.store.storage import Artifact, Storage

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = """
import os, subprocess, sys, time
from distributed_eg.errors import RunInUseError
from distributed_eg.store.lease import Lease
from distributed_eg.store.storage import Storage
print("ready", flush=True)
for what in map(str.strip, sys.stdin):
    try:
        if what == "fork":
            print(os.fork() or time.sleep(600), flush=True)
        elif what == "exec":
            print(subprocess.Popen(["sleep", "600"], close_fds=False).pid, flush=True)
        else:
            lease = Lease.acquire(Storage(what))
            print(lease.generation, flush=True)
    except RunInUseError as error:
        print(error, flush=True)
"""
ELSEWHERE = Holder(host="node-7", pid=1)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


@contextmanager
def driver() -> Iterator[subprocess.Popen[str]]:
    """A process that takes the lease of each run directory that it is told."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], what: Storage | str) -> None:
    assert process.stdin is not None
    process.stdin.write((what if isinstance(what, str) else what.uri) + "\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write(
    storage: Storage,
    holder: Holder,
    renewed_at: float,
    *,
    generation: int = 1,
    is_open: bool = True,
    lock: str = "another-system:1:2",
) -> None:
    record = LeaseRecord(generation, holder, renewed_at, is_open, lock)
    storage.write_record(f"sessions/{generation:05d}.json", asdict(record))


def descriptors(folder: Path) -> list[str]:
    """What this process has open below a folder, removed or not."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return [target for target in found if target.startswith(str(folder))]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "distributed-eg-lease"]


@pytest.fixture(autouse=True)
def nothing_stays_open(tmp_path: Path) -> Iterator[None]:
    yield
    assert descriptors(tmp_path) == []
    assert threads() == []


def test_the_first_driver_gets_the_run_and_its_record_says_who_it_is(storage: Storage) -> None:
    assert holder_of(storage) is None
    lease = Lease.acquire(storage)
    assert lease.generation == 1
    record = storage.read_record("sessions/00001.json")
    assert record["holder"]["pid"] == os.getpid()
    assert record["open"] is True
    assert f"process {os.getpid()}" in (holder_of(storage) or "")
    lease.release()
    assert storage.read_record("sessions/00001.json")["open"] is False
    assert holder_of(storage) is None


def test_the_same_process_is_refused_while_it_holds_the_run_itself(storage: Storage) -> None:
    lease = Lease.acquire(storage)
    with pytest.raises(RunInUseError, match=rf"process {os.getpid()} on .*renewed.*expires 60 s") as caught:
        Lease.acquire(storage)
    assert storage.uri in str(caught.value)
    lease.release()
    again = Lease.acquire(storage)
    assert again.generation == 2
    again.release()


def test_a_process_that_could_not_write_that_it_gave_a_run_back_may_take_it_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full: whoever makes room at the same prompt, and trains again, must not be refused by himself."""
    storage = Watched(str(tmp_path / "run"))
    lease = Lease.acquire(storage)
    storage.failures_left = 1
    lease.release()
    assert "could not be given back" in caplog.text
    assert storage.read_record("sessions/00001.json")["open"] is True
    again = Lease.acquire(storage)
    assert again.generation == 2
    again.release()


def test_generations_grow_beyond_their_five_digits(storage: Storage) -> None:
    write(storage, ELSEWHERE, 0.0, generation=99_999)
    lease = Lease.acquire(storage)
    assert lease.generation == 100_000
    lease.release()
    lease = Lease.acquire(storage)
    assert lease.generation == 100_001
    lease.release()


def test_a_driver_in_another_process_is_named_and_its_death_frees_the_run_at_once(storage: Storage) -> None:
    """Even before its parent has noticed: a killed process is a zombie until then."""
    with driver() as process:
        tell(process, storage)
        assert answer(process) == "1"
        with pytest.raises(RunInUseError, match=f"process {process.pid} "):
            Lease.acquire(storage)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        lease = Lease.acquire(storage)
        assert lease.generation == 2
        lease.release()
    assert Lease.acquire(storage).release() is None  # and after it has


def test_another_process_is_refused_by_this_one(storage: Storage) -> None:
    lease = Lease.acquire(storage)
    with driver() as process:
        tell(process, storage)
        assert f"process {os.getpid()} " in answer(process)
        lease.release()
        tell(process, storage)
        assert answer(process) == "2"


@pytest.mark.parametrize("how", ["fork", "exec"])
def test_a_child_that_outlives_the_driver_does_not_hold_the_run(storage: Storage, how: str) -> None:
    with driver() as process:
        tell(process, storage)
        assert answer(process) == "1"
        tell(process, how)
        child = int(answer(process))
        try:
            with pytest.raises(RunInUseError, match=f"process {process.pid} "):  # nor does it give it away
                Lease.acquire(storage)
            process.kill()
            process.wait()
            os.kill(child, 0)
            assert holder_of(storage) is None
            Lease.acquire(storage).release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_driver_that_was_paused_past_its_lease_keeps_a_run_whose_lock_is_seen(storage: Storage) -> None:
    """Asleep with its machine, say: when they wake up, nobody else may have begun."""
    lease = Lease.acquire(storage, lambda: 1000.0)
    for now in (0.0, 5000.0):
        assert "process" in (holder_of(storage, lambda now=now: now) or "")
        with pytest.raises(RunInUseError):
            Lease.acquire(storage, lambda now=now: now)
    lease.release()


def test_a_driver_elsewhere_counts_as_alive_until_its_lease_expires(storage: Storage) -> None:
    """What it locked on another machine, or by another mount of the same disk, cannot be looked at here."""
    write(storage, ELSEWHERE, 1000.0)
    expires(storage)


def expires(storage: Storage) -> None:
    """What ``ELSEWHERE`` renewed at 1000 s is its own for a minute."""
    for now in (990.0, 1000.0, 1000.0 + LEASE_S - 1):  # clocks of two machines differ a little
        with pytest.raises(RunInUseError, match="process 1 on 'node-7'"):
            Lease.acquire(storage, lambda now=now: now)
        assert holder_of(storage, lambda now=now: now) is not None
    assert holder_of(storage, lambda: 1000.0 + LEASE_S) is None
    lease = Lease.acquire(storage, lambda: 1000.0 + LEASE_S)
    assert lease.generation == 2
    lease.release()


def test_a_driver_of_an_older_version_counts_as_alive_until_its_lease_expires(storage: Storage) -> None:
    """Its records know of no lock, but of other things."""
    holder = {**asdict(ELSEWHERE), "boot_id": "a", "pid_namespace": 1, "started": 0.0, "start_ticks": 3}
    record = {"generation": 1, "holder": holder, "renewed_at": 1000.0, "open": True, "token": "b"}
    storage.write_record("sessions/00001.json", record)
    expires(storage)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP, errno.EBADF, None])
def test_without_locks_the_expiry_decides(
    storage: Storage, error: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(error, "no locks here")

    if error is None:
        monkeypatch.setattr(module, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", refuse)
    caplog.set_level(logging.INFO, "distributed_eg")
    write(storage, ELSEWHERE, 1000.0, lock="")
    expires(storage)
    assert ("no locks here" in caplog.text) == (error is not None)
    lease = Lease.acquire(storage)
    with pytest.raises(RunInUseError, match=f"process {os.getpid()} "):
        Lease.acquire(storage)
    monkeypatch.undo()  # a lock that others get says nothing about one who has none
    assert f"process {os.getpid()} " in (holder_of(storage) or "")
    lease.release()
    assert holder_of(storage) is None


def test_a_driver_that_has_not_written_its_record_yet_is_told_of(storage: Storage) -> None:
    write(storage, ELSEWHERE, 1000.0, is_open=False)
    with module._locked(storage):
        assert "just begun" in (holder_of(storage) or "")
        with pytest.raises(RunInUseError, match="just begun"):
            Lease.acquire(storage)
    assert holder_of(storage) is None


def test_whoever_looks_writes_nothing_and_may_look_together_with_others(storage: Storage, tmp_path: Path) -> None:
    assert holder_of(storage) is None
    assert list(tmp_path.iterdir()) == []
    write(storage, ELSEWHERE, 1000.0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with module._locked(storage, only_look=True):
        assert holder_of(storage, lambda: 2000.0) is None
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_closed_lease_holds_nobody_up(storage: Storage) -> None:
    write(storage, ELSEWHERE, 1000.0, is_open=False)
    Lease.acquire(storage, lambda: 1000.0).release()


def test_a_driver_that_was_paused_past_its_lease_is_told_apart_from_its_follower(storage: Storage) -> None:
    write(storage, ELSEWHERE, 1000.0)
    assert not superseded(storage, 1)
    lease = Lease.acquire(storage, lambda: 2000.0)
    assert superseded(storage, 1)
    assert not superseded(storage, lease.generation)
    # It wakes up and renews what it had: that changes nothing any more.
    write(storage, ELSEWHERE, 2001.0)
    assert str(os.getpid()) in (holder_of(storage, lambda: 2001.0) or "")
    lease.release()
    assert superseded(storage, 1)


def test_of_two_processes_that_race_for_an_expired_lease_one_wins(tmp_path: Path) -> None:
    with driver() as one, driver() as other:
        for turn in range(20):
            storage = Storage(str(tmp_path / str(turn)))
            write(storage, ELSEWHERE, 0.0)
            for process in (one, other):
                tell(process, storage)
            answers = [answer(process) for process in (one, other)]
            assert answers.count("2") == 1, answers
            (refused,) = [text for text in answers if text != "2"]
            assert "is in use by" in refused
            assert storage.list("sessions") == ["00001.json", "00002.json"]


def test_what_another_machine_takes_at_the_same_moment_is_its_own(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "create", lambda path, data: False)
    with pytest.raises(RunInUseError, match="in use by a process that took it at this moment"):
        Lease.acquire(storage)


def test_what_fails_on_the_way_in_leaves_no_lock(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create", fail)
        with pytest.raises(StorageError, match="the disk is full"):
            Lease.acquire(storage)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(StorageError, match="the disk is full"):
            Lease.acquire(storage)
    lease = Lease.acquire(storage)
    assert lease.generation == 2
    lease.release()


def test_a_run_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="file/run"):
        Lease.acquire(Storage(str(tmp_path / "file/run")))


def test_new_folders_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    Lease.acquire(Storage(str(tmp_path / "runs/one"))).release()
    folders = (tmp_path, tmp_path / "runs", tmp_path / "runs/one", tmp_path / "runs/one/sessions")
    assert {folder.stat().st_ino for folder in folders} <= set(flushed)


def test_threads_that_race_get_one_lease(storage: Storage) -> None:
    start = threading.Barrier(4)
    won: list[Lease] = []

    def acquire() -> None:
        start.wait(30)
        try:
            won.append(Lease.acquire(storage))
        except RunInUseError:
            return

    racers = [threading.Thread(target=acquire) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    (lease,) = won
    lease.release()


class Watched(Storage):
    """A storage whose writes can be waited for, and made to fail."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.failures_left = 0
        self.renewed = threading.Event()

    def write_record(self, path: str, record: dict[str, Any]) -> Artifact:
        if self.failures_left:
            self.failures_left -= 1
            raise StorageError("the network is down")
        artifact = super().write_record(path, record)
        self.renewed.set()
        return artifact


def test_it_is_renewed_until_it_is_released_through_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LEASE_S", 0.02)
    storage = Watched(str(tmp_path / "run"))
    storage.failures_left = 2
    ticks = iter(range(100, 1_000_000))
    with caplog.at_level(logging.WARNING):
        lease = Lease.acquire(storage, lambda: float(next(ticks)))
        assert storage.renewed.wait(30)
    assert storage.read_record("sessions/00001.json")["renewed_at"] > 101
    assert [record.message for record in caplog.records if "the network is down" in record.message]
    lease.release()
    assert storage.read_record("sessions/00001.json")["open"] is False
    assert threads() == []


def test_release_is_immediate_leaves_no_thread_and_may_be_repeated(storage: Storage) -> None:
    lease = Lease.acquire(storage)
    assert len(threads()) == 1
    started = time.monotonic()
    lease.release()
    assert time.monotonic() - started < LEASE_S / 8
    assert threads() == []
    follower = Lease.acquire(storage)
    lease.release()
    assert storage.read_record("sessions/00002.json")["open"] is True
    follower.release()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)


def _replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


@pytest.mark.parametrize("harm", [_remove, _replace_by_a_file], ids=lambda harm: harm.__name__)
def test_release_never_raises_and_does_not_bring_a_removed_run_back(
    storage: Storage, tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    lease = Lease.acquire(storage)
    harm(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        lease.release()
    assert "could not be given back" in caplog.text
    assert threads() == []
    assert not (tmp_path / "run").is_dir()


@pytest.mark.parametrize("body", [b"", b'{"schema_version": 1, "holder": 3}', b'{"schema_version": 1, "open": tr'])
def test_a_damaged_record_does_not_lock_the_run_for_ever(
    storage: Storage, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    storage.write("sessions/00004.json", body)
    with caplog.at_level(logging.WARNING):
        lease = Lease.acquire(storage)
    assert lease.generation == 5
    assert "sessions/00004.json" in caplog.text
    lease.release()


def test_files_of_others_beside_the_records_are_no_drivers(storage: Storage) -> None:
    for name in (".nfs0001", "notes.json", "00009.json.bak", "²²²²².json"):
        storage.write(f"sessions/{name}", b"x")
    lease = Lease.acquire(storage)
    assert lease.generation == 1
    lease.release()


def test_an_object_store_keeps_the_lease_too() -> None:
    pytest.importorskip("fsspec")
    storage = Storage(f"fsspec+memory://bucket-{os.getpid()}-{time.monotonic_ns()}/run")
    lease = Lease.acquire(storage)
    with pytest.raises(RunInUseError):
        Lease.acquire(storage)
    lease.release()
    Lease.acquire(storage).release()
    assert json.loads(storage.read("sessions/00002.json"))["generation"] == 2
