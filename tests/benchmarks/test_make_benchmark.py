"""`make_benchmark`: the names, and the errors that every benchmark shares."""

import subprocess
import sys

import pytest
from torchvision import datasets

from distributed_eg.benchmarks import BENCHMARKS, make_benchmark
from distributed_eg.benchmarks.catalog import PAPER
from distributed_eg.errors import InputError
from tests.benchmarks.stand_ins import ColourImages


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("split-mnits", "the nearest are split-mnist, "),
        ("rotated-6:split-flowers", "no benchmark 'split-flowers' (in 'rotated-6:split-flowers'); the nearest"),
        ("split-mnist+split-cifr10", "no benchmark 'split-cifr10' (in 'split-mnist+split-cifr10'); the nearest"),
        ("medmnist:pathmnits", "medmnist:pathmnist"),
        ("imagenet", "no benchmark 'imagenet'"),
        ("split-mnist+", "no benchmark ''"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest_ones(name, near):
    with pytest.raises(InputError) as caught:
        make_benchmark(name)
    assert near in str(caught.value)
    assert "`distributed-eg benchmarks` lists them" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rotated:embedded", {}, "comes as it is"),
        ("rotated-0:split-mnist", {}, "give 1 or more"),
        ("pairs:split-mnist", {"classes_per_task": 3, "data": "."}, "two a task"),
        ("embedded", {"classes_per_task": 2}, "tasks of its own"),
        ("split-mnist", {"classes_per_task": 1}, "at least 2"),
        ("split-mnist+embedded", {"train_per_task": [10, 10]}, "a chain: give one for all tasks"),
        ("folder:nowhere", {}, "needs the folder nowhere"),
    ],
)
def test_what_cannot_be_combined_is_refused(name, options, message, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "MNIST", ColourImages)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        make_benchmark(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size=0 is too small"),
        ({"train_per_task": [10, 10]}, "train_per_task has 2 numbers for 8 tasks"),
        ({"test_per_task": 1}, "test_per_task=1 is too small"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_benchmark("embedded", **options)


@pytest.mark.parametrize(
    "name", [name for name in BENCHMARKS if name not in ("embedded", "split-stanford-cars", *PAPER)]
)
def test_missing_data_says_which_options_help(name, tmp_path):
    for data in (None, tmp_path):
        with pytest.raises(InputError, match="--data DIR, and --download"):
            make_benchmark(name, data=data)
    assert not list(tmp_path.iterdir())


def test_listing_the_names_does_not_import_avalanche_or_torch():
    code = "import sys, distributed_eg.benchmarks; sys.exit(bool({'avalanche', 'torch'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
