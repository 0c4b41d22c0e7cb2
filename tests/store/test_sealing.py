"""`Storage`: what is under its final name is whole; what is damaged, missing or foreign is said with its name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distributed_eg.errors import StorageError
from distributed_eg.store.layout import SCHEMA_VERSION
from distributed_eg.store.sealing import Artifact, Storage


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
    with pytest.raises(StorageError) as caught:
        storage.read_artifact(artifact)
    assert artifact.path in str(caught.value)
    assert storage.uri in str(caught.value)


def test_a_record_carries_its_schema_version_and_reads_back(storage: Storage, tmp_path: Path) -> None:
    record = {"b": [1, None, 0.1 + 0.2], "a": {"x": "σ"}}
    storage.write_record("run.json", record)
    assert storage.read_record("run.json") == record
    assert json.loads((tmp_path / "run/run.json").read_bytes())["schema_version"] == SCHEMA_VERSION


def test_the_same_record_gives_the_same_bytes_in_any_order_of_keys(storage: Storage) -> None:
    assert storage.write_record("a", {"x": 1, "y": 2}).sha256 == storage.write_record("b", {"y": 2, "x": 1}).sha256


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, "1", None])
def test_another_schema_version_is_refused_with_both_numbers(storage: Storage, version: object) -> None:
    body = {"task": 0} if version is None else {"task": 0, "schema_version": version}
    storage.write("tasks/r.json", json.dumps(body).encode())
    with pytest.raises(StorageError, match=rf"tasks/r\.json.*schema version {version}.*reads {SCHEMA_VERSION}"):
        storage.read_record("tasks/r.json")


@pytest.mark.parametrize(
    "data",
    [b"", b'{"schema_version": 1, "ta', b"\xff\xfe\x00", b"[]", b"null", b'"text"', b"1"],
    ids=["empty", "truncated", "not UTF-8", "a list", "null", "a string", "a number"],
)
def test_a_damaged_record_is_named(storage: Storage, data: bytes) -> None:
    storage.write("tasks/r.json", data)
    with pytest.raises(StorageError, match=r"tasks/r\.json"):
        storage.read_record("tasks/r.json")


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
