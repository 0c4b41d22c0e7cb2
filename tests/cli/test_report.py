"""``distributed-eg report``, as a person or a script calls it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from distributed_eg.cli import main
from tests.report.made_runs import make_run

OLD = Path(__file__).parents[1] / "store" / "old_runs"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", 4)
    return tmp_path / "run"


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    code = 0
    try:
        main(["report", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    done = capsys.readouterr()
    return code, done.out, done.err


def files(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_it_writes_one_page_and_only_reads_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    before = files(run)
    page = tmp_path / "pages" / "page.html"
    code, out, err = command(capsys, run, "-o", page)
    assert (code, err) == (0, "")
    assert "tells of 1 run." in out.replace("\n", " ")
    assert files(run) == before
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "Plotly" in text
    assert len(text) < 10e6


def test_a_run_of_an_earlier_version_gets_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    code, out, _ = command(capsys, OLD / "finished", "-o", tmp_path / "page.html")
    assert code == 0
    assert "No evaluation of this run is recorded" in out.replace("\n", " ")
    text = (tmp_path / "page.html").read_text()
    assert "it is not known when they began" in text
    assert "Not known: no held-out images" in text


def test_what_is_no_run_to_report_is_one_sentence_and_nothing_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    (tmp_path / "empty").mkdir()
    foreign, newer, begun, damaged = (tmp_path / name for name in ("foreign", "newer", "begun", "damaged"))
    foreign.mkdir()
    (foreign / "run.json").write_text('{"steps": 3}')
    shutil.copytree(run, newer)
    record = json.loads((newer / "run.json").read_text())
    (newer / "run.json").write_text(json.dumps({**record, "schema_version": 2, "sha256": "0" * 64}))
    begun.mkdir()
    shutil.copy(run / "run.json", begun)
    shutil.copytree(run, damaged)
    evaluation = damaged / "evaluations" / "00000.json"
    evaluation.write_bytes(evaluation.read_bytes().replace(b"0.9", b"0.8", 1))
    before = files(tmp_path)
    for folder, code, words in (
        (tmp_path / "nowhere", 2, "There is no run at"),
        (tmp_path / "empty", 2, "There is no run at"),
        (foreign, 1, "is damaged"),
        (newer, 1, "has schema version 2; this package reads 1"),
        (begun, 2, "holds no finished task yet"),
        (damaged, 1, "measure again"),
    ):
        got, out, err = command(capsys, folder, "-o", tmp_path / "page.html")
        assert (got, out) == (code, ""), err
        assert words in err
        assert err.count("\n") == 1
        assert "Traceback" not in err
    # One that cannot be read leaves no page of the others, either.
    assert command(capsys, run, tmp_path / "empty", "-o", tmp_path / "page.html")[0] == 2
    assert files(tmp_path) == before
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["-o", "page.html"], "No run is given"), (["RUN", "-o", "RUN/run.json"], "a page ends in .html")],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_read(
    arguments: list[str], words: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run)
    code, _, err = command(capsys, *(argument.replace("RUN", str(run)) for argument in arguments))
    assert code == 2
    assert words in err
    assert files(run) == before


def test_a_folder_is_no_page_and_a_page_that_cannot_be_written_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    (tmp_path / "folder.html").mkdir()
    code, _, err = command(capsys, run, "-o", tmp_path / "folder.html")
    assert code == 2
    assert "a folder" in err
    code, _, err = command(capsys, run, "-o", run / "run.json" / "page.html")
    assert code == 1
    assert "cannot be written" in err


def test_without_plotly_the_extra_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("plotly", "plotly.offline"):
        monkeypatch.setitem(sys.modules, module, None)
    code, _, err = command(capsys, run, "-o", tmp_path / "page.html")
    assert code == 2
    assert "pip install 'distributed-eg[report]'" in err
    assert not (tmp_path / "page.html").exists()
