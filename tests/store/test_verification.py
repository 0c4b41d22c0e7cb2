"""`verify` names everything that is wrong with a run; `unnamed` and `collect` take nothing that a run needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distributed_eg import ClusterConfig, ExpertGate
from distributed_eg.errors import DamagedFileError, RunInUseError, StorageError
from distributed_eg.store import layout, records
from distributed_eg.store.lease import Lease
from distributed_eg.store.record_text import REPAIR, record_bytes
from distributed_eg.store.records import CheckpointRecord
from distributed_eg.store.storage import Storage
from distributed_eg.store.tables import REGISTRY_SCHEMA, RELATEDNESS_SCHEMA
from distributed_eg.store.verification import Damage, collect, rebuild_tables, unnamed, verify
from tests.helpers import DOMAINS, SETTINGS, SHAPE, tiny_benchmark, tiny_net, tiny_strategy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four tasks; task 2 learned without forgetting from task 0."""
    path = tmp_path_factory.mktemp("verifying") / "run"
    with tiny_strategy(ClusterConfig(engine="inline", storage=str(path)), **SETTINGS) as strategy:
        strategy.train(tiny_benchmark(DOMAINS).train_stream)
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be harmed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def damages(run: Path) -> tuple[Damage, ...]:
    return verify(Storage(str(run))).damages


def weights(run: Path, pattern: str) -> Path:
    (path,) = run.glob(f"{pattern}-*.safetensors")
    return path


def change(record: Path, **values: object) -> None:
    """Another value in a record, as somebody writes it who knows how records are sealed."""
    body = {**json.loads(record.read_text()), **values}
    record.write_bytes(
        record_bytes({name: value for name, value in body.items() if name not in ("schema_version", "sha256")})
    )


def answers(run: Path) -> torch.Tensor:
    """What the run's model says, with every expert loaded."""
    images = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    model = ExpertGate.load(str(run), arch=tiny_net(9))
    model.state_dict()
    answer = model(images)
    assert isinstance(answer, torch.Tensor)
    return answer


def test_a_whole_run_is_whole_and_everything_was_looked_at(run: Path) -> None:
    result = verify(Storage(str(run)))
    assert result.damages == ()
    looked_at = {path for path in run.rglob("*") if path.is_file()}
    assert result.unchecked == ()
    assert result.num_files == len(looked_at)
    assert result.num_bytes == sum(path.stat().st_size for path in looked_at)
    assert unnamed(Storage(str(run))) == []


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WEIGHTS = ["root", "statistics", "tasks/00000/autoencoder", "tasks/00001/expert", "tasks/00003/expert"]


@pytest.mark.parametrize("harm", [_flip, _truncate, Path.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("pattern", WEIGHTS)
def test_harmed_weights_are_named_with_their_repair(run: Path, pattern: str, harm: Callable[[Path], None]) -> None:
    path = weights(run, pattern)
    harm(path)
    (damage,) = damages(run)
    assert damage.path == path.relative_to(run).as_posix()
    assert REPAIR in damage.problem


@pytest.mark.parametrize("harm", [_flip, _truncate, Path.unlink], ids=lambda harm: harm.__name__)
def test_whatever_file_is_harmed_it_is_told(run: Path, harm: Callable[[Path], None]) -> None:
    checkpoint(run, 3)
    storage = Storage(str(run))
    for file in [path for path in sorted(run.rglob("*")) if path.is_file()]:
        name, data = file.relative_to(run).as_posix(), file.read_bytes()
        if harm is Path.unlink and name in ("sessions/00001.json", "stream.json", "tasks/00003/checkpoint.json"):
            continue  # nobody misses them, and nothing rests on them
        harm(file)
        told = {damage.path for damage in verify(storage).damages}
        # Without its manifest a task looks as if it were in training still, but for the tables and its children.
        assert name in told or (name.endswith("manifest.json") and "tables/registry.parquet" in told), name
        file.write_bytes(data)
    assert damages(run) == ()


def _flips(path: Path) -> list[bytes]:
    """The file with one bit turned, at places all over it."""
    data = path.read_bytes()
    places = range(3, len(data), 37)
    return [data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :] for place in places]


@pytest.mark.parametrize("name", ["registry", "relatedness"])
def test_a_flipped_bit_anywhere_in_a_table_is_told(run: Path, name: str) -> None:
    """But in the name of the program that wrote it, which is nothing that anybody reads."""
    path = run / f"tables/{name}.parquet"
    writer = str(pq.read_metadata(path).created_by).encode()
    place = path.read_bytes().rindex(writer)
    for data in _flips(path):
        changed = next(i for i, (a, b) in enumerate(zip(data, path.read_bytes(), strict=True)) if a != b)
        if place <= changed < place + len(writer):
            continue
        table = path.read_bytes()
        path.write_bytes(data)
        assert [damage.path for damage in damages(run)] == [f"tables/{name}.parquet"], changed
        path.write_bytes(table)


def _change_a_value(run: Path) -> None:
    path = run / "tables/relatedness.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["relatedness"] += 1e-9
    pq.write_table(pa.Table.from_pylist(rows, schema=RELATEDNESS_SCHEMA), path)


def _drop_a_row(run: Path) -> None:
    path = run / "tables/registry.parquet"
    pq.write_table(pq.read_table(path).slice(0, 3), path)


def _drop_a_column(run: Path) -> None:
    path = run / "tables/registry.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["worker"]), path)


def _from_another_run(run: Path) -> None:
    path = run / "tables/registry.parquet"
    rows = [{**row, "task": row["task"] + 7} for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=REGISTRY_SCHEMA), path)


TABLES = [_change_a_value, _drop_a_row, _drop_a_column, _from_another_run]


@pytest.mark.parametrize("harm", TABLES, ids=lambda harm: harm.__name__)
def test_a_table_that_is_not_what_the_records_say_is_told_and_made_anew(
    run: Path, harm: Callable[[Path], None]
) -> None:
    before = {path: path.read_bytes() for path in (run / "tables").iterdir()}
    harm(run)
    (damage,) = damages(run)
    assert damage.path.startswith("tables/")
    assert "no part of the run" in damage.problem
    rebuild_tables(Storage(str(run)))
    assert damages(run) == ()
    assert {path: path.read_bytes() for path in before} == before
    Lease.acquire(Storage(str(run))).release()  # it was given back


def test_the_same_table_by_another_version_of_pyarrow_is_as_good(run: Path) -> None:
    path = run / "tables/registry.parquet"
    pq.write_table(pq.read_table(path), path, compression="none")
    assert [damage.path for damage in damages(run)] == ["tables/registry.parquet"]  # this version would not write it so
    writer = pq.read_metadata(path).created_by.encode()
    path.write_bytes(path.read_bytes().replace(writer, writer[:-1] + b"9"))
    assert damages(run) == ()


def test_tables_lag_behind_only_where_the_last_driver_has_not_ended(run: Path) -> None:
    """It may be at work, or have been killed before it wrote them; a resumed training does."""
    for path in (run / "tables").iterdir():
        pq.write_table(pq.read_table(path).slice(0, 1), path)
    assert len(damages(run)) == 2
    session = run / "sessions/00001.json"
    whole = session.read_bytes()
    change(session, open=True)
    assert damages(run) == ()
    shutil.rmtree(run / "tables")
    assert damages(run) == ()
    session.write_bytes(whole)
    assert len(damages(run)) == 2


@pytest.mark.parametrize("name", ["tasks/00001/manifest.json", "statistics.json"])
def test_no_table_is_made_from_damaged_records(run: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in (run / "tables").iterdir()}
    _truncate(run / name)
    with pytest.raises(StorageError, match=f"cannot be made anew.*{name}"):
        rebuild_tables(Storage(str(run)))
    assert {path: path.read_bytes() for path in before} == before
    assert set(verify(Storage(str(run))).unchecked) >= {"tables/registry.parquet", "tables/relatedness.parquet"}


def test_no_table_is_made_while_a_driver_works(run: Path) -> None:
    lease = Lease.acquire(Storage(str(run)))
    with pytest.raises(RunInUseError, match="is in use by process"):
        rebuild_tables(Storage(str(run)))
    lease.release()


def test_what_was_not_looked_at_is_listed(run: Path) -> None:
    strangers = [put(run, name) for name in ("notes.txt", "tables/mine.csv", "tasks/00001/expert-00.safetensors")]
    Lease.acquire(Storage(str(run))).release()  # a second driver: what the first one left tells nothing any more
    result = verify(Storage(str(run)))
    assert result.damages == ()
    assert sorted(result.unchecked) == sorted([*strangers, "sessions/00001.json"])


RECORDS = ["statistics", *(f"tasks/00000/{name}" for name in ("task", "autoencoder", "relatedness", "manifest"))]


@pytest.mark.parametrize("harm", [_truncate, Path.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", RECORDS)
def test_harmed_records_are_named_with_their_repair(run: Path, name: str, harm: Callable[[Path], None]) -> None:
    """Task 2 started from task 0, so that even its missing manifest is missed."""
    harm(run / f"{name}.json")
    (damage,) = damages(run)
    assert damage.path == f"{name}.json"
    assert REPAIR in damage.problem


@pytest.mark.parametrize("harm", [_truncate, Path.unlink], ids=lambda harm: harm.__name__)
def test_a_harmed_run_record_is_named_and_nothing_is_promised(run: Path, harm: Callable[[Path], None]) -> None:
    harm(run / "run.json")
    (damage,) = damages(run)
    assert damage.path == "run.json"
    assert REPAIR not in damage.problem


def test_a_flipped_byte_of_a_relatedness_row_is_found(run: Path) -> None:
    record = json.loads((run / "tasks/00002/relatedness.json").read_text())
    record["own_error"] += 1e-9
    (run / "tasks/00002/relatedness.json").write_text(json.dumps(record))
    (damage,) = damages(run)
    assert damage.path == "tasks/00002/relatedness.json"
    assert "another hash" in damage.problem


def test_a_relatedness_row_that_its_manifest_does_not_know_is_told(run: Path) -> None:
    change(run / "tasks/00002/relatedness.json", own_error=1.0)
    (damage,) = damages(run)
    assert damage.path == "tasks/00002/relatedness.json"
    assert "tasks/00002/manifest.json" in damage.problem


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("tasks/00001/manifest.json", "parent", 2),
        ("tasks/00000/autoencoder.json", "num_samples", 53),
        ("statistics.json", "num_samples", 53),
        ("run.json", "threads", 7),
        ("tasks/00003/timings.json", "stages", []),
    ],
)
def test_a_changed_value_of_any_record_is_found(run: Path, path: str, name: str, value: object) -> None:
    body = json.loads((run / path).read_text())
    assert body[name] != value
    (run / path).write_text(json.dumps({**body, name: value}))
    assert path in {damage.path for damage in damages(run)}


def test_one_damage_does_not_hide_the_next(run: Path) -> None:
    harmed = [weights(run, "root"), weights(run, "tasks/00000/expert"), weights(run, "tasks/00002/expert")]
    _flip(harmed[0])
    harmed[1].unlink()
    _truncate(harmed[2])
    _truncate(run / "tasks/00001/manifest.json")
    _truncate(run / "tasks/00003/timings.json")
    expected = {path.relative_to(run).as_posix() for path in harmed}
    found = damages(run)
    assert {damage.path for damage in found} == expected | {"tasks/00001/manifest.json", "tasks/00003/timings.json"}
    assert len(found) == 5


def test_a_manifest_that_names_another_autoencoder_is_told(run: Path) -> None:
    other = json.loads((run / "tasks/00001/autoencoder.json").read_text())["artifact"]
    change(run / "tasks/00000/manifest.json", autoencoder=other)
    (damage,) = damages(run)
    assert damage.path == "tasks/00000/manifest.json"
    assert "tasks/00000/autoencoder.json" in damage.problem


def test_a_missing_candidate_is_missed(run: Path) -> None:
    """A task's whole folder, the last one but one: nothing but the other tasks' rows tells that it was there."""
    shutil.rmtree(run / "tasks/00001")
    assert "tasks/00001/autoencoder.json" in {damage.path for damage in damages(run)}


def _absolute(run: Path, secret: Path) -> str:
    return str(secret)


def _upwards(run: Path, secret: Path) -> str:
    return f"../{secret.name}"


def _linked(run: Path, secret: Path) -> str:
    (run / "tasks/00001/expert-0.safetensors").symlink_to(secret)
    return "tasks/00001/expert-0.safetensors"


@pytest.mark.parametrize("named", [_absolute, _upwards, _linked], ids=lambda named: named.__name__)
def test_a_tampered_manifest_leads_nowhere(run: Path, tmp_path: Path, named: Callable[[Path, Path], str]) -> None:
    """Refused by a load, told by verify, and nothing of its task is thought superfluous.

    The file outside has the hash that the manifest says: whoever read it would find nothing wrong.
    """
    secret = tmp_path / "secret"
    shutil.copy(weights(run, "tasks/00001/expert"), secret)
    manifest = run / "tasks/00001/manifest.json"
    expert = json.loads(manifest.read_text())["expert"]
    change(manifest, expert={**expert, "path": named(run, secret)})
    with pytest.raises(StorageError, match="tampered with") as caught:
        answers(run)
    assert not isinstance(caught.value, DamagedFileError)
    (damage,) = damages(run)
    assert damage.path == "tasks/00001/manifest.json"
    assert "tampered with" in damage.problem
    assert unnamed(Storage(str(run))) == []


@pytest.mark.parametrize("value", [7, None, ["a"], {"a": 1}, "\ud800", "a\0b"], ids=repr)
@pytest.mark.parametrize("field", ["path", "sha256", "size_bytes"])
def test_nonsense_in_a_manifest_is_told(run: Path, field: str, value: object) -> None:
    manifest = run / "tasks/00001/manifest.json"
    change(manifest, expert={**json.loads(manifest.read_text())["expert"], field: value}, parent="x")
    assert damages(run) != ()
    assert weights(run, "tasks/00001/expert").relative_to(run).as_posix() not in unnamed(Storage(str(run)))


def test_a_linked_tasks_folder_is_refused_as_a_whole(run: Path, tmp_path: Path) -> None:
    (run / "tasks").rename(tmp_path / "elsewhere")
    (run / "tasks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic link"):
        verify(Storage(str(run)))
    with pytest.raises(StorageError, match="symbolic link"):
        collect(Storage(str(run)))


def put(run: Path, path: str, data: bytes = b"12345") -> str:
    (run / path).parent.mkdir(parents=True, exist_ok=True)
    (run / path).write_bytes(data)
    return path


def checkpoint(run: Path, task: int) -> tuple[str, str]:
    """A checkpoint as an expert stage leaves it: its weights and its record."""
    artifact = Storage(str(run)).write(f"{layout.task_weights(task, 'checkpoint')}-0123456789abcdef.safetensors", b"w")
    record = CheckpointRecord(task, "k", 1, None, artifact)
    return artifact.path, records.seal(Storage(str(run)), record).path


def test_what_nothing_names_goes_and_all_else_stays(run: Path) -> None:
    before = answers(run)
    kept = sorted(path for path in run.rglob("*") if path.is_file() and path.parent.name != "sessions")
    left = [
        put(run, "tasks/00001/expert-0123456789abcdef.safetensors"),
        put(run, "tasks/00002/autoencoder-0123456789abcdef.safetensors"),
        put(run, "tasks/00009/autoencoder-0123456789abcdef.safetensors"),  # its stage never ended
        put(run, "root-0123456789abcdef.safetensors"),
        put(run, ".writing-1"),
        put(run, "tables/.writing-2"),
        put(run, "tasks/00000/.writing-3"),
        *checkpoint(run, 0),
    ]
    foreign = [put(run, path) for path in ("notes.txt", "plots/a.png", "tables/mine.csv", "tasks/.nfs01", ".DS_Store")]
    foreign += [put(run, "tasks/00001/.nfs02"), put(run, "model.safetensors")]
    storage = Storage(str(run))
    assert sorted(unnamed(storage)) == sorted(left)
    assert collect(storage, dry_run=True) == {path: (run / path).stat().st_size for path in unnamed(storage)}
    assert sorted(collect(storage)) == sorted(left)
    now = sorted(path for path in run.rglob("*") if path.is_file() and path.parent.name != "sessions")
    assert now == sorted([*kept, *(run / path for path in foreign)])
    assert damages(run) == ()
    assert torch.equal(answers(run), before)
    Lease.acquire(storage).release()  # it was given back


def test_a_record_goes_before_what_it_names(run: Path) -> None:
    """So that a kill in between leaves no record that names nothing."""
    tensors, record = checkpoint(run, 0)
    assert unnamed(Storage(str(run))) == [record, tensors]


def test_the_checkpoint_of_a_task_in_training_stays_and_is_verified(run: Path) -> None:
    (run / "tasks/00003/manifest.json").unlink()
    shutil.rmtree(run / "tables")  # written at the end
    tensors, _ = checkpoint(run, 3)
    expert = weights(run, "tasks/00003/expert").relative_to(run).as_posix()
    assert unnamed(Storage(str(run))) == [expert]
    assert damages(run) == ()
    _flip(run / tensors)
    assert [damage.path for damage in damages(run)] == [tensors]


@pytest.mark.parametrize("name", ["task", "autoencoder", "relatedness", "manifest", "timings"])
def test_nothing_of_a_task_with_an_unreadable_record_goes(run: Path, name: str) -> None:
    _truncate(run / f"tasks/00001/{name}.json")
    put(run, "tasks/00001/expert-0123456789abcdef.safetensors")
    left = put(run, "tasks/00002/expert-0123456789abcdef.safetensors")
    assert unnamed(Storage(str(run))) == [left]


def test_weights_whose_manifest_names_a_wrong_path_stay(run: Path) -> None:
    """One letter of the manifest turned: what it meant must not be taken for what nothing names."""
    manifest = run / "tasks/00001/manifest.json"
    manifest.write_text(manifest.read_text().replace("00001/expert-", "00001/expers-"))
    assert unnamed(Storage(str(run))) == []
    assert [damage.path for damage in damages(run)] == ["tasks/00001/manifest.json"]


def test_an_unreadable_statistics_record_keeps_the_files_of_the_run(run: Path) -> None:
    _truncate(run / "statistics.json")
    left = put(run, "tasks/00002/expert-0123456789abcdef.safetensors")
    assert unnamed(Storage(str(run))) == [left]


@pytest.mark.parametrize("dry_run", [False, True])
def test_nothing_goes_while_a_driver_works(run: Path, dry_run: bool) -> None:
    left = put(run, "tasks/00001/expert-0123456789abcdef.safetensors")
    lease = Lease.acquire(Storage(str(run)))
    with pytest.raises(RunInUseError, match="is in use by process"):
        collect(Storage(str(run)), dry_run=dry_run)
    assert (run / left).exists()
    lease.release()


def test_what_verify_found_a_resumed_training_repairs(run: Path) -> None:
    """As its messages promise, to the same bytes."""
    harmed = [weights(run, "tasks/00000/expert"), weights(run, "tasks/00001/autoencoder"), weights(run, "statistics")]
    before = [path.read_bytes() for path in harmed]
    for path in harmed:
        _flip(path)
    for name in ("tasks/00003/manifest", "tasks/00002/task"):
        _truncate(run / f"{name}.json")
    assert len(damages(run)) == 5
    with tiny_strategy(ClusterConfig(engine="inline", storage=str(run), resume=True), **SETTINGS) as strategy:
        strategy.train(tiny_benchmark(DOMAINS).train_stream)
    assert damages(run) == ()
    assert [path.read_bytes() for path in harmed] == before


def test_a_dry_run_writes_nothing(run: Path) -> None:
    put(run, ".writing-1")
    before = sorted(run.rglob("*"))
    assert collect(Storage(str(run)), dry_run=True) == {".writing-1": 5}
    assert sorted(run.rglob("*")) == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, "tasks/00001/report.docx")
    put(tmp_path, "run.json", b"{}")
    with pytest.raises(StorageError):
        collect(Storage(str(tmp_path)))
    assert (tmp_path / "tasks/00001/report.docx").exists()
    assert not (tmp_path / "sessions").exists()


def test_an_object_store_is_verified_and_cleaned_too(run: Path) -> None:
    pytest.importorskip("fsspec")
    storage = Storage(f"fsspec+memory://bucket-{run.parent.name}/run")
    for path in Storage(str(run)).walk():
        storage.write(path, (run / path).read_bytes())
    assert verify(storage) == verify(Storage(str(run)))
    storage.write("tasks/00001/expert-0123456789abcdef.safetensors", b"12345")
    assert collect(storage) == {"tasks/00001/expert-0123456789abcdef.safetensors": 5}
    assert verify(storage).damages == ()
