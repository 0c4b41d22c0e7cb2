"""The storage is full, read-only, slow, broken for a moment or for good: a clear error, and the run can be resumed."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed_eg.errors import StorageError
from distributed_eg.store.storage import TEMPORARY, Storage
from distributed_eg.store.verification import verify
from tests.faults.chaos import Chaos, Fault
from tests.faults.conftest import train
from tests.helpers import content

FOREVER = 10**6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run leaves."""
    storage = tmp_path_factory.mktemp("whole") / "run"
    train(storage)
    return content(storage)


def require_whole(storage: Path, whole: dict[str, bytes]) -> None:
    """Resume, and compare every byte."""
    train(storage)
    assert content(storage) == whole
    assert verify(Storage(str(storage))).damages == ()
    assert not list(storage.rglob(f"*{TEMPORARY}*"))


def why_it_ended(storage: Path) -> str:
    """Train; the message of the storage's error, empty where there was none."""
    try:
        train(storage)
    except StorageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("inside", [False, True], ids=["before", "half-way"])
def test_a_disk_that_is_full_from_the_nth_write_on(
    tmp_path: Path, chaos: Chaos, whole: dict[str, bytes], inside: bool
) -> None:
    """For every n: the driver raises one clear error that names the file, nothing half-written stays, and once there
    is room the same run goes on to the same bytes."""
    storage = tmp_path / "run"
    num_failed = 0
    while True:
        point = "inside seal *" if inside else "before seal *"
        chaos.plan(Fault(point, "full", nth=1 + num_failed % 12, times=FOREVER))
        told = why_it_ended(storage)
        if not any(chaos.fired()):
            break
        num_failed += 1
        # Only the last thing that a driver writes, that it gives the run back, may fail without ending the call.
        assert told == "" or ("No space left" in told and str(storage) in told)
        assert num_failed < 80
        assert not list(storage.rglob(f"*{TEMPORARY}*"))
    assert num_failed >= 10
    chaos.clear()
    require_whole(storage, whole)


@pytest.mark.parametrize("action", ["full", "denied", "broken"])
def test_a_write_that_fails_once_is_tried_again(
    tmp_path: Path, chaos: Chaos, whole: dict[str, bytes], action: str
) -> None:
    """What a worker seals: weights. Its stage runs again, and nobody is bothered."""
    chaos.plan(*(Fault(f"before seal tasks/0000{task}/{name}-*", action) for task, name in WEIGHTS))  # type: ignore[arg-type]
    train(tmp_path / "run")
    chaos.require_fired()
    assert content(tmp_path / "run") == whole


WEIGHTS = ((0, "autoencoder"), (1, "expert"), (2, "autoencoder"), (2, "expert"))


def test_a_read_that_fails_once_is_tried_again(tmp_path: Path, chaos: Chaos, whole: dict[str, bytes]) -> None:
    chaos.plan(Fault("read tasks/00001/autoencoder-*", "broken"), Fault("read tasks/00000/autoencoder-*", "broken"))
    train(tmp_path / "run")
    chaos.require_fired()
    assert content(tmp_path / "run") == whole


def test_a_record_that_cannot_be_written_ends_the_call_and_the_run_can_be_resumed(
    tmp_path: Path, chaos: Chaos, whole: dict[str, bytes]
) -> None:
    chaos.plan(Fault("before seal tasks/00001/manifest.json", "denied"))
    with pytest.raises(StorageError, match=r"tasks/00001/manifest\.json.*Permission denied.*is writable"):
        train(tmp_path / "run")
    require_whole(tmp_path / "run", whole)


def test_a_slow_storage_changes_nothing(tmp_path: Path, chaos: Chaos, whole: dict[str, bytes]) -> None:
    chaos.plan(Fault("before seal tasks/*", "delay", times=FOREVER, seconds=0.05))
    train(tmp_path / "run")
    assert content(tmp_path / "run") == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 256 KiB, for those who may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def test_a_real_disk_that_runs_full(small_disk: Path, whole: dict[str, bytes]) -> None:
    """Until the experts, there is room; they do not fit; with more room the run goes on."""
    size = sum(len(data) for path, data in whole.items() if not path.startswith("tasks/00002"))
    (small_disk / "others").write_bytes(bytes(max(0, 250 * 1024 - size)))
    with pytest.raises(StorageError, match="No space left") as caught:
        train(small_disk / "run")
    assert "has room" in str(caught.value)
    assert not list((small_disk / "run").rglob(f"*{TEMPORARY}*"))
    remount(small_disk, "size=4m")
    require_whole(small_disk / "run", whole)


def test_a_real_disk_that_becomes_read_only(small_disk: Path, whole: dict[str, bytes]) -> None:
    remount(small_disk, "size=4m")
    train(small_disk / "run", domains=(0, 0))
    remount(small_disk, "ro")
    with pytest.raises(StorageError, match=r"Read-only file system.*is writable"):
        train(small_disk / "run")
    remount(small_disk, "rw")
    require_whole(small_disk / "run", whole)


def test_errors_of_the_kit_are_those_of_the_system(tmp_path: Path, chaos: Chaos) -> None:
    """The kit's own faults carry the number that the package's messages are made from."""
    chaos.plan(Fault("before seal a", "full"))
    with pytest.raises(StorageError) as caught:
        Storage(str(tmp_path / "run")).write("a", b"x")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
