"""``distributed-eg verify`` and ``gc``, as a person or a script calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distributed_eg import ClusterConfig
from distributed_eg.cli import main
from distributed_eg.store.lease import Lease
from distributed_eg.store.storage import Storage
from tests.helpers import tiny_benchmark, tiny_strategy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one task."""
    path = tmp_path_factory.mktemp("verify") / "run"
    with tiny_strategy(ClusterConfig(engine="inline", storage=str(path)), train_epochs=1) as strategy:
        strategy.train(tiny_benchmark((0,)).train_stream)
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    done = capsys.readouterr()
    return code, done.out, done.err


def harm(run: Path) -> str:
    (expert,) = (run / "tasks/00000").glob("expert-*.safetensors")
    expert.write_bytes(expert.read_bytes()[:-1])
    return expert.relative_to(run).as_posix()


def test_a_whole_run_gets_one_line_and_code_0(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "verify", run)
    assert code == 0
    (line,) = out.splitlines()
    assert line.startswith("Checked ")
    assert " bytes " in line


def test_damage_is_listed_with_its_repair_and_code_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = harm(run)
    code, out, err = command(capsys, "verify", run)
    assert code == 1
    first, last = out.splitlines()
    assert first.startswith(f"{path}: ")
    assert "resume=True" in first
    assert "1 damaged or missing" in last
    assert "Traceback" not in err


@pytest.mark.parametrize("damaged", [False, True])
def test_verify_as_json(run: Path, damaged: bool, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [harm(run)] if damaged else []
    code, out, _ = command(capsys, "verify", run, "--json")
    assert code == int(damaged)
    answer = json.loads(out)
    assert list(answer) == ["num_files", "num_bytes", "damages", "unchecked"]
    assert [damage["path"] for damage in answer["damages"]] == paths


def test_a_wrong_table_is_named_and_made_anew(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = run / "tables/registry.parquet"
    before = table.read_bytes()
    table.write_bytes(before[:-1])
    code, out, _ = command(capsys, "verify", run)
    assert code == 1
    assert out.startswith("tables/registry.parquet: ")
    assert "no part of the run" in out
    assert "--rebuild-tables" in out
    code, out, _ = command(capsys, "verify", run, "--rebuild-tables")
    assert code == 0
    assert table.read_bytes() == before
    assert out.splitlines()[1] == "1 other file, which nothing rests on, not checked: sessions/00001.json"


@pytest.mark.parametrize("name", ["verify", "gc"])
def test_no_run_there_is_said_with_code_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, name, tmp_path / "nowhere")
    assert code == 2
    assert out == ""
    assert err.startswith("distributed-eg: There is no run at ")
    assert str(tmp_path / "nowhere") in err
    assert not (tmp_path / "nowhere").exists()


def test_a_run_without_its_first_record_is_damaged_and_not_absent(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").unlink()
    code, out, _ = command(capsys, "verify", run)
    assert code == 1
    assert out.startswith("run.json: ")


def test_gc_lists_then_removes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "tasks/00000/expert-0123456789abcdef.safetensors").write_bytes(bytes(1234))
    code, out, _ = command(capsys, "gc", run, "--dry-run")
    assert code == 0
    assert out.splitlines() == [
        "tasks/00000/expert-0123456789abcdef.safetensors: 1,234 bytes",
        "Would remove 1 file, 1,234 bytes.",
    ]
    code, out, _ = command(capsys, "gc", run, "--json")
    assert code == 0
    assert json.loads(out) == {
        "dry_run": False,
        "num_bytes": 1234,
        "files": {"tasks/00000/expert-0123456789abcdef.safetensors": 1234},
    }
    code, out, _ = command(capsys, "gc", run)
    assert out == "Removed 0 files, 0 bytes.\n"
    assert command(capsys, "verify", run)[0] == 0


def test_gc_names_the_driver_that_works_on_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lease = Lease.acquire(Storage(str(run)))
    code, out, err = command(capsys, "gc", run)
    lease.release()
    assert code == 1
    assert out == ""
    assert "is in use by process" in err
