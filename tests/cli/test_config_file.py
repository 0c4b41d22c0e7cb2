"""``--config`` and ``--print-config``: options in a file, which say what they say on the command line."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from distributed_eg.cli import main
from distributed_eg.cli.config_file import config_text, with_config
from distributed_eg.cli.run import RunOptions
from distributed_eg.errors import InputError


def options_of(tmp_path: Path, text: str) -> RunOptions:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return with_config(RunOptions(), str(file))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What ``run --print-config`` prints."""
    main(["run", *arguments, "--print-config"])
    return capsys.readouterr().out


def test_every_option_can_stand_in_the_file_and_comes_back_from_it(tmp_path: Path) -> None:
    text = config_text(RunOptions())
    assert options_of(tmp_path, text) == RunOptions()
    names = {name for group in asdict(RunOptions()).values() for name in group}
    assert {line.partition(":")[0] for line in text.splitlines()} == names - {"config", "print_config"}


def test_no_two_groups_have_an_option_of_one_name() -> None:
    names = [field.name for group in fields(RunOptions) for field in fields(getattr(RunOptions(), group.name))]
    assert len(names) == len(set(names))


def test_values_of_every_type(tmp_path: Path) -> None:
    options = options_of(
        tmp_path,
        "epochs: 5\nlr: 1e-3\nbatch-size: 8\ntasks: [2, 0]\nengine: inline\nnum_workers: auto\ngpus_per_worker: 1\n"
        "download: true\nstorage: runs/häuser\ncheckpoint_every_s: 0\nweights: null\n",
    )
    assert (options.training.epochs, options.training.lr, options.training.batch_size) == (5, 0.001, 8)
    assert (options.data.tasks, options.data.download, options.model.weights) == ((2, 0), True, None)
    assert (options.cluster.engine, options.cluster.num_workers, options.cluster.gpus_per_worker) == (
        "inline",
        "auto",
        1,
    )
    assert options.output.storage == "runs/häuser"
    assert options_of(tmp_path, config_text(options)) == options
    assert options_of(tmp_path, "num_workers: 3").cluster.num_workers == 3
    assert options_of(tmp_path, "# nothing\n") == RunOptions()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epocs: 3", "there is no option 'epocs'; the nearest is epochs."),
        ("xyzzy: 3", "there is no option 'xyzzy'; the keys are source, benchmark,"),
        ("config: other.yaml", "there is no option 'config'"),
        ("3: 4", "there is no option 3"),
        ("epochs: three", "epochs is 'three'; it must be a valid integer"),
        ("epochs: '3'", "epochs is '3'; it must be a valid integer"),
        ("epochs: true", "epochs is True; it must be a valid integer"),
        ("epochs: 3.0", "epochs is 3.0; it must be a valid integer"),
        ("epochs: 010", "epochs is '010'; it must be a valid integer"),
        ("seed: 1:30", "seed is '1:30'; it must be a valid integer"),
        ("epochs: !!int foo", "is no YAML"),
        ("epochs: !!bool maybe", "is no YAML"),
        ("storage: !!binary cnVu", "it must be written without a tag"),
        ("storage: " + 3000 * "[", "is no YAML"),
        ("epochs: null", "epochs is None; it must be a valid integer"),
        ("tasks: 3", "tasks is 3; it must be a valid"),
        ("tasks: [0, one]", "tasks is [0, 'one']; it must be a valid integer"),
        ("engine: inlien", "engine is 'inlien'; it must be 'ray' or 'inline'"),
        ("num-workers: many", "num-workers is 'many'; it must be a valid integer or 'auto'"),
        ("download: 'yes'", "download is 'yes'; it must be a valid boolean"),
        ("arch: [a]", "arch is ['a']; it must be a valid string"),
        ("epochs: 3\nepochs: 4", "'epochs' is there twice"),
        ("batch_size: 3\nbatch-size: 4", "'batch-size' is there twice"),
        ("- epochs", "holds no options"),
        ("epochs", "holds no options"),
        ("epochs: [", "is no YAML"),
        ("epochs: !!python/object:os.system x", "is no YAML"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_file_and_key(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        options_of(tmp_path, text)
    assert "run.yaml" in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("day", ["2026-01-01", "2026-02-30"])
def test_what_looks_like_a_day_is_text(day: str, tmp_path: Path) -> None:
    assert options_of(tmp_path, f"storage: {day}\n").output.storage == day


def test_flags_win_over_the_file_also_those_that_say_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 5\nseed: 4\ndownload: true\ntasks: [0, 1]\n")
    text = printed(capsys, f"--config={file}", "--epochs", "7", "--no-download", "--tasks", "2")
    assert "epochs: 7\n" in text
    assert "seed: 4\n" in text
    assert "download: false\n" in text
    assert "tasks:\n- 2\n" in text


def test_print_config_prints_what_config_takes_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = printed(capsys, "--epochs", "7", "--tasks", "2", "0", "--lr", "1e-05")
    (tmp_path / "again.yaml").write_text(text)
    assert printed(capsys, "--config", "again.yaml") == text
    assert [path.name for path in tmp_path.iterdir()] == ["again.yaml"]


def test_a_secret_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--storage", "s3://key:hunter2hunter2@bucket/run")
    assert "hunter2" not in text
    assert text.startswith("# storage: s3://***@bucket/run  # holds a secret: give it as --storage\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--config", "gone.yaml"], "The file of --config cannot be read"),
        (["run", "--config", ""], "--config is ''"),
        (["run", "--config", "."], "The file of --config cannot be read"),
        (["run", "--print-config", "--lr", "-1"], "--lr is -1.0"),
        (["rnu"], "There is no command 'rnu'; the nearest is run."),
        (["xyzzy"], "There is no command 'xyzzy'; there are run, eval"),
        (["run", "--config"], "--config"),
        (["run", "--epoch", "3"], "--epochs"),
    ],
)
def test_a_mistake_on_the_command_line_names_what_was_meant(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_the_help_has_groups_the_file_s_values_and_the_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("epochs: 41\n")
    with pytest.raises(SystemExit):
        main(["run", "--config", str(tmp_path / "run.yaml"), "--help"])
    text = capsys.readouterr().out
    places = [
        text.index(f" {group} options ") for group in ("data", "model", "method", "training", "cluster", "output")
    ]
    assert places == sorted(places)
    assert "(default: 41)" in text
    assert "None" not in text
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {code} " in text for code in (0, 1, 2, 130, 141, 143))
