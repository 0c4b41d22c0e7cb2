"""A run's life from the command line: added to, evaluated, listed, and asked what image files show."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distributed_eg import make_benchmark
from distributed_eg.benchmarks.benchmark import part_of
from distributed_eg.cli import main
from distributed_eg.cli.eval import _require_known
from distributed_eg.cli.predict import _files_in
from distributed_eg.errors import InputError
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Storage
from tests.helpers import content

pytest.importorskip("skimage", reason="the extra demo is not installed")

BENCHMARK = ["--train-per-task", "24", "--test-per-task", "12"]
SMALL = [*BENCHMARK, "--engine", "inline", "--random-weights", "--image-size", "32", "--epochs", "1"]


def answer_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a command prints as its last line with --json."""
    main([*arguments, "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks 0 and 1, and then 3, added by a command of its own."""
    storage = tmp_path_factory.mktemp("life") / "run"
    main(["run", *SMALL, "--storage", str(storage), "--tasks", "0", "1"])
    main(["run", *SMALL, "--storage", str(storage), "--append", "--tasks", "3"])
    return storage


@pytest.fixture(scope="module")
def images(run: Path) -> Path:
    """The test images as files."""
    folder = run.parent / "images"
    where = ["--tasks", "0", "1", "3", "--engine", "inline", "--save-images", str(folder)]
    main(["eval", str(run), *BENCHMARK, *where])
    return folder


def test_one_command_or_two_end_with_the_same_bytes(run: Path, tmp_path: Path) -> None:
    main(["run", *SMALL, "--storage", str(tmp_path / "run"), "--tasks", "0", "1", "3"])
    assert content(tmp_path / "run") == content(run)


def test_predicting_the_files_gives_eval_s_figures(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer_of(capsys, "eval", str(run), *BENCHMARK, "--tasks", "0", "1", "3", "--engine", "inline")
    main(["predict", str(run), str(images)])
    table = [line.split("│") for line in capsys.readouterr().out.partition("folders")[2].splitlines() if "│" in line]
    shown = [[float(cell) for cell in cells[1:-1] if cell.strip() not in ("", "mean")] for cells in table]
    expected = [
        [t["task"], 12, round(t["gate_accuracy"], 3), round(t["end_to_end_accuracy"], 3)] for t in told["tasks"]
    ]
    assert shown == [*expected, [round(told["gate_accuracy"], 3), round(told["end_to_end_accuracy"], 3)]]
    main(["predict", str(run), str(images), "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [Path(row["file"]).parent.name == row["class_name"] for row in rows]
    # A mean of the tasks' means, which are of equally many images.
    assert sum(right) / len(right) == pytest.approx(told["end_to_end_accuracy"], rel=1e-12)


def test_the_same_rows_in_every_form_and_from_every_kind_of_list(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(str(file) for file in (images / "rocket").iterdir())
    asked = [[str(images / "rocket")], files, ["-"]]
    for form in ("--json", "--csv"):
        texts = set()
        for names in asked:
            monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{file}\n" for file in files) + "\n"))
            main(["predict", str(run), *names, form])
            texts.add(capsys.readouterr().out)
        (text,) = texts
        read = csv.DictReader(io.StringIO(text)) if form == "--csv" else map(json.loads, text.splitlines())
        assert [row["file"] for row in read] == files
    main(["predict", str(run), *files, "--csv", "--batch-size", "1"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["file"] for row in rows] == files


def test_what_cannot_be_read_is_listed_and_the_others_answered(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(next((images / "rocket").iterdir()))
    (tmp_path / "cut.png").write_bytes(Path(good).read_bytes()[:90])
    (tmp_path / "notes.txt").write_text("no image by its name")
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(run), str(tmp_path), good, str(tmp_path / "gone.png"), "--json"])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["cut.png", Path(good).name, "gone.png"]
    assert ["error" in row for row in rows] == [True, False, True]
    assert "2 of 3 images could not be read" in err
    assert "1 files in these folders are no images by their names" in err


def test_tasks_lists_what_a_run_has_learnt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = answer_of(capsys, "tasks", str(run))
    shown = [(line["task"], line["label"], line["versions"], line["is_retired"]) for line in answer["tasks"]]
    assert shown == [(0, 0, 1, False), (1, 1, 1, False), (2, 3, 1, False)]
    assert list(answer["tasks"][2]["classes"].values()) == ["china", "coffee", "coins"]
    sizes = [sum(f.stat().st_size for f in run.glob(f"tasks/{task:05}/*.safetensors")) for task in range(3)]
    assert [line["num_bytes"] for line in answer["tasks"]] == sizes
    main(["tasks", str(run)])
    assert "digit 0, digit 1, digit 4" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence that a command ends with, exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    err = capsys.readouterr().err
    assert caught.value.code == 2, err
    return err


def test_what_is_asked_wrong_is_said_and_changes_nothing(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(run)
    append = ("run", *SMALL, "--storage", str(run), "--append")
    file = str(next((images / "rocket").iterdir()))
    assert "labels [1] already" in refused(capsys, *append, "--tasks", "1")
    assert "class ids [3, 4, 5] already" in refused(capsys, *append, "--tasks", "1", "--first-label", "50")
    assert "has the tasks 0 to 7" in refused(capsys, *append, "--tasks", "8")
    assert "needs --storage" in refused(capsys, "run", *SMALL, "--append")
    assert "begun with" in refused(capsys, *append, "--tasks", "4", "--latent-dim", "20")
    assert "begun with" in refused(capsys, *append, "--tasks", "4", "--image-size", "40")
    assert "begun with" in refused(capsys, *append, "--tasks", "4", "--arch", "squeezenet1_1")
    assert "no tasks with the labels [2]" in refused(
        capsys, "eval", str(run), *BENCHMARK, "--tasks", "0", "2", "--engine", "inline"
    )
    here = ("eval", str(run), *BENCHMARK, "--tasks", "0", "1", "3", "--engine", "inline")
    assert "has the classes 0 chelsea, 1 flower, 2 rocket in the run, and 1 chelsea, 2 flower, 3 rocket in" in refused(
        capsys, *here, "--first-class", "1"
    )
    assert "cannot be made" in refused(capsys, *here, "--save-images", file)
    assert "are read with --resize only" in refused(capsys, "predict", str(run), file, "--mean", "0", "0", "0")
    resized = ("predict", str(run), file, "--resize", "32", "32")
    assert "--mean is (nan," in refused(capsys, *resized, "--mean", "nan", "0", "0")
    assert "a value for every channel" in refused(capsys, *resized, "--std", "0.2")
    assert "--std is (0.0, 1.0, 1.0)" in refused(capsys, *resized, "--std", "0", "1", "1")
    assert "exclude each other" in refused(capsys, "predict", str(run), file, "--json", "--csv")
    assert "reads no num_workers" in refused(capsys, "predict", str(run), file, "--num-workers", "2")
    assert "no images" in refused(capsys, "predict", str(run), str(tmp_path))
    assert "There is no run" in refused(capsys, "tasks", str(tmp_path))
    assert content(run) == before


@pytest.mark.parametrize("command", [["predict", "RUN", "a.png"], ["eval", "RUN", "--engine", "inline"]])
def test_no_run_is_one_sentence(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "run") if word == "RUN" else word for word in command])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("distributed-eg: There is no run at ")
    assert not (tmp_path / "run").exists()


def test_other_names_under_the_same_ids_are_other_classes(run: Path) -> None:
    benchmark = replace(
        part_of(make_benchmark("embedded", image_size=32, train_per_task=48, test_per_task=12), [0], 0, 0),
        class_names={0: "chelsea", 1: "rocket", 2: "flower"},
    )
    with pytest.raises(
        InputError, match="0 chelsea, 1 flower, 2 rocket in the run, and 0 chelsea, 1 rocket, 2 flower in"
    ):
        _require_known(benchmark, Registry.read(Storage(str(run))))


def test_a_damaged_run_has_no_tasks_to_tell_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("not json")
    with pytest.raises(SystemExit) as caught:
        main(["tasks", str(tmp_path)])
    assert caught.value.code == 1
    assert "run.json" in capsys.readouterr().err


def test_a_folder_is_searched_for_what_training_would_take(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", "b.PDF", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.png").touch()
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    names, others = _files_in([str(tmp_path)])
    assert ([Path(name).name for name in names], others) == (["a.png", "gone.png"], 2)


def test_another_sequence_follows_under_labels_and_class_ids_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = ["--tasks", "4", "1", "--first-label", "100", "--first-class", "50"]
    storage = str(tmp_path / "run")
    told = answer_of(capsys, "run", *SMALL, "--storage", storage, *moved)
    assert [(task["label"], task["name"]) for task in told["tasks"]] == [(104, "digits-5-6-7"), (101, "digits-0-1-4")]
    lines = answer_of(capsys, "tasks", storage)["tasks"]
    assert lines[1]["classes"] == {"53": "digit 0", "54": "digit 1", "55": "digit 4"}
    again = answer_of(capsys, "eval", storage, *BENCHMARK, *moved, "--engine", "inline")
    assert again["end_to_end_accuracy"] == told["end_to_end_accuracy"]
