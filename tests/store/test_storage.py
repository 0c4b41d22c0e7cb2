"""`Storage`: what is under its final name is whole; what is damaged, missing or foreign is said with its name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import stat
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distributed_eg.errors import DamagedFileError, StorageError
from distributed_eg.store.layout import SCHEMA_VERSION
from distributed_eg.store.record_text import REPAIR
from distributed_eg.store.storage import Artifact, Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def files(root: Path) -> list[str]:
    """All files below ``root``, hidden ones too."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_sealed_file_is_the_only_one_there_and_its_artifact_describes_it(storage: Storage, tmp_path: Path) -> None:
    artifact = storage.write("tasks/00003/expert.bin", b"weights")
    assert artifact == Artifact("tasks/00003/expert.bin", hashlib.sha256(b"weights").hexdigest(), 7)
    assert files(tmp_path) == ["run/tasks/00003/expert.bin"]
    assert storage.read_artifact(artifact) == b"weights"


def test_an_empty_file_can_be_sealed(storage: Storage) -> None:
    assert storage.read_artifact(storage.write("empty", b"")) == b""


def test_nothing_is_created_before_something_is_written(storage: Storage, tmp_path: Path) -> None:
    assert not storage.exists("run.json")
    assert storage.list("tasks") == []
    assert files(tmp_path) == []
    assert not (tmp_path / "run").exists()


def test_writing_again_replaces_the_whole_file(storage: Storage, tmp_path: Path) -> None:
    storage.write("a", b"a long first version")
    storage.write("a", b"short")
    assert storage.read("a") == b"short"
    assert files(tmp_path) == ["run/a"]


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there_and_no_temporary_file(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    storage.write("tasks/a", b"old")
    monkeypatch.setattr(os, call, _full)
    for path in ("tasks/a", "tasks/b"):
        with pytest.raises(StorageError, match="No space left") as caught:
            storage.write(path, b"new")
        assert path in str(caught.value)
        assert storage.uri in str(caught.value)
    monkeypatch.undo()
    assert files(tmp_path) == ["run/tasks/a"]
    assert storage.read("tasks/a") == b"old"


def test_an_interrupted_write_leaves_no_temporary_file(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between writing and renaming."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write("a", b"data")
    assert files(tmp_path) == []


def test_writers_of_one_path_do_not_mix_and_a_reader_never_sees_half(storage: Storage, tmp_path: Path) -> None:
    """Two attempts at one stage may seal the same path at the same moment."""
    versions = [bytes([i]) * 100_000 for i in range(4)]
    storage.write("a", versions[0])

    def write_and_read(data: bytes) -> set[bytes]:
        seen = set()
        for _ in range(5):
            storage.write("a", data)
            seen.add(storage.read("a"))
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = set().union(*pool.map(write_and_read, versions))
    assert seen <= set(versions)
    assert files(tmp_path) == ["run/a"]


def test_sealed_files_are_as_readable_as_the_user_wants(storage: Storage, tmp_path: Path) -> None:
    """A run directory on NFS is read by colleagues, and by workers of another user: the umask decides, nothing else."""
    umask = os.umask(0o022)
    try:
        storage.write("a", b"data")
    finally:
        os.umask(umask)
    assert (tmp_path / "run/a").stat().st_mode & 0o777 == 0o644


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [_flip, _truncate, _extend, Path.unlink, _become_a_folder], ids=lambda f: f.__name__)
def test_a_harmed_artifact_is_named(storage: Storage, tmp_path: Path, harm: Callable[[Path], None]) -> None:
    artifact = storage.write("tasks/00000/expert-1.safetensors", bytes(range(256)))
    harm(tmp_path / "run" / artifact.path)
    with pytest.raises(DamagedFileError) as caught:
        storage.read_artifact(artifact)
    message = str(caught.value)
    assert artifact.path in message
    assert storage.uri in message
    assert artifact.sha256[:12] in message
    assert f"{artifact.size_bytes} bytes" in message
    assert message.endswith(REPAIR)
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_a_record_that_says_another_size_is_not_believed(storage: Storage) -> None:
    sealed = storage.write("a", b"data")
    with pytest.raises(DamagedFileError, match=r"4 bytes hash to .* its record says 5 bytes"):
        storage.read_artifact(Artifact("a", sealed.sha256, 5))


def test_a_record_carries_its_schema_version_and_reads_back(storage: Storage, tmp_path: Path) -> None:
    record = {"b": [1, None, 0.1 + 0.2], "a": {"x": "σ"}}
    storage.write_record("run.json", record)
    assert storage.read_record("run.json") == record
    assert json.loads((tmp_path / "run/run.json").read_bytes())["schema_version"] == SCHEMA_VERSION


def test_the_same_record_gives_the_same_bytes_in_any_order_of_keys(storage: Storage) -> None:
    assert storage.write_record("a", {"x": 1, "y": 2}).sha256 == storage.write_record("b", {"y": 2, "x": 1}).sha256


def test_a_record_whose_version_alone_was_changed_is_damaged_and_of_no_other_version(storage: Storage) -> None:
    storage.write_record("r.json", {"task": 0})
    body = json.loads(storage.read("r.json"))
    storage.write("r.json", json.dumps({**body, "schema_version": 7}).encode())
    with pytest.raises(DamagedFileError, match="another hash"):
        storage.read_record("r.json")


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0])
def test_another_schema_version_is_refused_with_both_numbers(storage: Storage, version: int) -> None:
    storage.write("tasks/r.json", json.dumps({"task": 0, "schema_version": version}).encode())
    with pytest.raises(StorageError, match=rf"tasks/r\.json.*schema version {version}.*reads {SCHEMA_VERSION}"):
        storage.read_record("tasks/r.json")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b'{"schema_version": 1, "ta', b"\xff\xfe\x00", b"[]", b"null", b'"text"', b"1"),
        *(b'{"task": 0, "schema_wersion": 1}', b'{"task": 0, "schema_version": "1"}'),
    ],
    ids=["empty", "truncated", "not UTF-8", "a list", "null", "a string", "a number", "no version", "no number"],
)
def test_a_damaged_record_is_named(storage: Storage, data: bytes) -> None:
    storage.write("tasks/r.json", data)
    with pytest.raises(DamagedFileError, match=r"tasks/r\.json") as caught:
        storage.read_record("tasks/r.json")
    assert str(caught.value).endswith(REPAIR)


def test_a_damaged_run_record_is_not_said_to_be_made_again(storage: Storage) -> None:
    """No stage makes it."""
    storage.write("run.json", b"{")
    with pytest.raises(DamagedFileError, match="from a copy"):
        storage.read_record("run.json")


def test_a_missing_record_is_named(storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"run\.json"):
        storage.read_record("run.json")


def test_list_gives_sorted_names_of_one_level_and_exists_means_a_file(storage: Storage) -> None:
    for path in ("tasks/00010/a", "tasks/00002/a", "tasks/00002/b", "run.json"):
        storage.write(path, b"")
    assert storage.list("tasks") == ["00002", "00010"]
    assert storage.list("tasks/00002") == ["a", "b"]
    assert storage.exists("tasks/00002/a")
    assert not storage.exists("tasks/00002")
    assert not storage.exists("tasks/00002/c")


def test_an_unknown_scheme_is_refused_in_one_sentence_that_names_it() -> None:
    with pytest.raises(StorageError, match="'nonsense://x'") as caught:
        Storage("nonsense://x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_path_at_or_below_a_regular_file_is_refused_when_it_is_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "notes.txt").write_text("not a folder")
    storage = Storage(str(tmp_path / "notes.txt" / below))
    with pytest.raises(StorageError) as caught:
        storage.write("run.json", b"{}")
    assert storage.uri in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not storage.exists("run.json")
    assert (tmp_path / "notes.txt").read_text() == "not a folder"


def test_a_relative_path_means_the_folder_that_was_current_when_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs/1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.write("a", b"x")
    assert files(tmp_path) == ["runs/1/a"]


def test_a_file_uri_and_the_path_are_the_same_directory(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    artifact = Storage(f"file://{tmp_path}/my%20run").write("tasks/00000/a", b"x")
    assert Storage(str(folder)).read_artifact(artifact) == b"x"
    assert files(tmp_path) == ["my run/tasks/00000/a"]


def test_an_object_store_holds_what_another_process_wrote() -> None:
    """An in-memory object store stands for S3 and GCS: no rename, no folders to make first."""
    pytest.importorskip("fsspec")
    uri = f"fsspec+memory://bucket-{uuid.uuid4().hex}/run"
    record = {"task": 3}
    artifact = Storage(uri).write("tasks/00003/expert", b"weights")
    Storage(uri).write_record("tasks/00003/manifest.json", record)
    again = Storage(uri)
    assert again.list("tasks") == ["00003"]
    assert again.list("nothing") == []
    assert again.exists("tasks/00003/manifest.json")
    assert again.read_record("tasks/00003/manifest.json") == record
    assert again.read_artifact(artifact) == b"weights"
    assert again.read_artifact(again.write("tasks/00003/expert", b"others")) == b"others"
    with pytest.raises(StorageError, match="tasks/00003/expert"):
        again.read_artifact(artifact)
    with pytest.raises(StorageError, match="nothing"):
        again.read("nothing")


def test_a_file_system_that_wants_its_folders_made_first_works_too() -> None:
    """Some file systems behind ``pyarrow.fs`` refuse to write into a folder that does not exist."""
    storage = Storage("mock:///run")
    artifact = storage.write("tasks/00003/expert", b"weights")
    assert storage.read_artifact(artifact) == b"weights"
    assert storage.list("tasks") == ["00003"]


OUTSIDE = [
    "../secret", "tasks/../../secret", "..", "/etc/passwd", "//host/share", "tasks//a", "tasks/", "./a", "tasks/.",
    "..\\secret", "tasks\\a", "C:/secret", "C:secret", "a\0b", "\ud800", "file:///etc/passwd", 7, None, ["a"],
]  # fmt: skip
ASKED: dict[str, Callable[[Storage, Any], object]] = {
    "write": lambda storage, path: storage.write(path, b"x"),
    "create": lambda storage, path: storage.create(path, b"x"),
    "read": Storage.read,
    "read_artifact": lambda storage, path: storage.read_artifact(Artifact(path, "0" * 64, 1)),
    "read_record": Storage.read_record,
    "write_record": lambda storage, path: storage.write_record(path, {}),
    "exists": Storage.exists,
    "size": Storage.size,
    "list": Storage.list,
    "delete": Storage.delete,
}


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("path", OUTSIDE, ids=repr)
def test_no_path_leads_out_of_the_run_directory(tmp_path: Path, path: object, ask: str) -> None:
    (tmp_path / "secret").write_text("{}")
    storage = Storage(str(tmp_path / "run"))
    storage.write("tasks/a", b"x")
    with pytest.raises(StorageError, match="may have been tampered with") as caught:
        ASKED[ask](storage, path)
    assert not isinstance(caught.value, DamagedFileError)  # what cannot be trusted is not repaired by itself
    assert files(tmp_path) == ["run/tasks/a", "secret"]
    assert (tmp_path / "secret").read_text() == "{}"


def test_the_same_holds_for_object_stores() -> None:
    storage = Storage("mock:///run")
    with pytest.raises(StorageError, match="may have been tampered with"):
        storage.write("../other-run/a", b"x")


@pytest.mark.parametrize("ask", ["read", "read_artifact", "read_record"])
def test_a_link_out_of_the_run_directory_is_not_followed(tmp_path: Path, ask: str) -> None:
    (tmp_path / "secret").write_text("{}")
    storage = Storage(str(tmp_path / "run"))
    storage.write("tasks/b", b"x")
    (tmp_path / "run/tasks/a").symlink_to(tmp_path / "secret")
    with pytest.raises(StorageError, match=r"symbolic link .*secret") as caught:
        ASKED[ask](storage, "tasks/a")
    assert not isinstance(caught.value, DamagedFileError)


@pytest.mark.parametrize("ask", ASKED)
def test_nothing_below_a_linked_folder_outside_is_touched(tmp_path: Path, ask: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a").write_text("{}")
    storage = Storage(str(tmp_path / "run"))
    storage.write("run.json", b"x")
    (tmp_path / "run/tasks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic link"):
        ASKED[ask](storage, "tasks" if ask == "list" else "tasks/a")
    assert files(tmp_path / "elsewhere") == ["a"]
    assert (tmp_path / "elsewhere/a").read_text() == "{}"
    assert storage.walk() == ["run.json"]


def test_links_inside_the_run_directory_and_to_it_are_fine(tmp_path: Path) -> None:
    Storage(str(tmp_path / "disk/run")).write("tasks/a", b"x")
    (tmp_path / "run").symlink_to(tmp_path / "disk/run")
    (tmp_path / "run/tasks/b").symlink_to("a")
    storage = Storage(str(tmp_path / "run"))
    assert storage.read("tasks/b") == b"x"
    storage.write("tasks/c", b"y")
    assert (tmp_path / "disk/run/tasks/c").read_bytes() == b"y"


def test_bytes_that_the_disk_did_not_keep_are_noticed(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("a", b"old")
    monkeypatch.setattr(os, "fsync", lambda handle: os.ftruncate(handle, 2))
    with pytest.raises(StorageError, match="keeps 2 bytes after 13 bytes"):
        storage.write("a", b"a new version")
    assert files(tmp_path) == ["run/a"]
    assert storage.read("a") == b"old"


def test_file_and_folders_are_flushed(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not take the name of a sealed file, nor its new folder's."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle)))
    storage.write("tasks/00000/a", b"data")
    assert stat.S_ISREG(flushed[0].st_mode)
    folders = [tmp_path / "run/tasks/00000", tmp_path / "run/tasks", tmp_path / "run", tmp_path]
    assert {folder.stat().st_ino for folder in folders} <= {info.st_ino for info in flushed[1:]}


def test_a_file_system_that_cannot_flush_folders_is_no_error(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", flush)
    assert storage.read_artifact(storage.write("tasks/a", b"data")) == b"data"


def test_an_object_store_that_kept_fewer_bytes_is_noticed() -> None:
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Torn(MemoryFileSystem):  # type: ignore[misc]
        """Loses the last byte of everything."""

        protocol = "torn"

        def info(self, path: str, **options: Any) -> dict[str, Any]:
            info = dict(super().info(path, **options))
            return {**info, "size": info["size"] and info["size"] - 1}

    fsspec.register_implementation("torn", Torn, clobber=True)
    with pytest.raises(StorageError, match=r"tasks/a.*reports 3 bytes after 4 bytes were written"):
        Storage(f"fsspec+torn://bucket-{uuid.uuid4().hex}/run").write("tasks/a", b"data")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_of_many_creators_one_wins(
    storage: Storage, tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:  # a bucket mounted as a folder

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    start = threading.Barrier(4)

    def create(number: int) -> list[bool]:
        won = []
        for turn in range(25):
            start.wait(30)
            won.append(storage.create(f"sessions/{turn}", str(number).encode()))
        return won

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(create, range(4)))
    for turn in range(25):
        (winner,) = [number for number in range(4) if outcomes[number][turn]]
        assert storage.read(f"sessions/{turn}") == str(winner).encode()
    assert len(files(tmp_path)) == 25


def test_a_lost_answer_of_nfs_is_no_lost_race(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server made the link; its answer was lost, and the repeated request finds the name taken."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert storage.create("a", b"x")


@pytest.mark.parametrize("uri", ["mock:///run", f"fsspec+memory://bucket-{uuid.uuid4().hex}/run"])
def test_create_walk_size_and_sweep_on_object_stores(uri: str) -> None:
    pytest.importorskip("fsspec")
    storage = Storage(uri)
    assert storage.walk() == []
    assert storage.create("sessions/1", b"me")
    assert not storage.create("sessions/1", b"you")
    assert storage.read("sessions/1") == b"me"
    storage.write("run.json", b"{}")
    assert storage.walk() == ["run.json", "sessions/1"]
    assert storage.size("sessions/1") == 2
    assert storage.sweep() == 0
    with pytest.raises(StorageError, match="sessions/2"):
        storage.size("sessions/2")


def test_sweep_removes_what_killed_writers_left_and_nothing_else(storage: Storage, tmp_path: Path) -> None:
    assert storage.sweep() == 0
    for path in ("run.json", "tasks/00000/a"):
        storage.write(path, b"x")
    (tmp_path / "run/.writing-1").write_bytes(b"half")
    (tmp_path / "run/tasks/00000/.writing-2").write_bytes(b"half")
    (tmp_path / "run/tasks/.nfs0001").write_bytes(b"")
    assert storage.sweep() == 2
    assert storage.walk() == files(tmp_path / "run") == ["run.json", "tasks/.nfs0001", "tasks/00000/a"]


def test_a_file_is_sealed_under_its_own_hash_for_all_who_may_read_the_run(storage: Storage, tmp_path: Path) -> None:
    """Whatever wrote it, and with whatever rights."""

    def fill(file: Path) -> None:
        file.unlink()
        file.write_bytes(b"weights")
        file.chmod(0o600)

    artifact = storage.write_file("tasks/expert", ".bin", fill)
    plain = storage.write("tasks/a", b"weights")
    assert (artifact.sha256, artifact.size_bytes) == (plain.sha256, plain.size_bytes)
    assert artifact.path == f"tasks/expert-{plain.sha256[:16]}.bin"
    assert storage.read_artifact(artifact) == b"weights"
    modes = {(tmp_path / "run" / path).stat().st_mode for path in (artifact.path, plain.path)}
    assert len(modes) == 1
    assert files(tmp_path) == ["run/tasks/a", f"run/{artifact.path}"]


def test_a_file_is_hashed_once_a_process_until_it_changes(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = storage.write("a", b"as it was sealed")
    hashed: list[object] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: hashed.append(given) or digest(*given))
    file = tmp_path / "run/a"
    assert storage.verified_file(artifact) == storage.verified_file(artifact) == file
    assert len(hashed) == 1
    file.write_bytes(b"As it was sealed")
    for _ in range(2):
        with pytest.raises(DamagedFileError, match="is damaged"):
            storage.verified_file(artifact)
    file.unlink()
    with pytest.raises(DamagedFileError, match="is missing"):
        storage.verified_file(artifact)
    storage.write("a", b"as it was sealed")
    assert storage.verified_file(artifact) == file
