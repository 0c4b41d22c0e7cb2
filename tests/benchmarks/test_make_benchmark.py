"""`make_benchmark`: the names, and the errors that every benchmark shares."""

import subprocess
import sys

import pytest

from distributed_eg.benchmarks import BENCHMARKS, make_benchmark
from distributed_eg.errors import InputError


def test_unknown_name_lists_the_names():
    with pytest.raises(InputError) as caught:
        make_benchmark("imagenet")
    assert all(name in str(caught.value) for name in (*BENCHMARKS, "imagenet"))


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


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "embedded"])
def test_missing_data_says_which_options_help(name, tmp_path):
    for data in (None, tmp_path):
        with pytest.raises(InputError, match="--data DIR, and --download"):
            make_benchmark(name, data=data)
    assert not list(tmp_path.iterdir())


def test_listing_the_names_does_not_import_avalanche_or_torch():
    code = "import sys, distributed_eg.benchmarks; sys.exit(bool({'avalanche', 'torch'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
