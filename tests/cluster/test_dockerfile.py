"""``cluster/Dockerfile``: what its image is made from, and that its steps install what they are to install."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "cluster/Dockerfile"


@pytest.fixture
def steps() -> list[dict[str, Any]]:
    """Its instructions, in order."""
    parse = pytest.importorskip("dockerfile_parse", reason="dockerfile-parse is not installed")
    parser = parse.DockerfileParser(fileobj=DOCKERFILE.open("rb"))
    return [step for step in parser.structure if step["instruction"] != "COMMENT"]


def test_it_is_a_slim_python_run_by_nobody_special(steps: list[dict[str, Any]]) -> None:
    images = [step["value"] for step in steps if step["instruction"] == "FROM"]
    assert len(images) == 1
    assert re.fullmatch(r"python:3\.\d+-slim", images[0])
    users = [step["value"] for step in steps if step["instruction"] == "USER"]
    assert users == ["ray"]
    last_as_root = [step["instruction"] for step in steps].index("USER")
    assert not any("pip install" in step["value"] for step in steps[:last_as_root])


def test_it_holds_no_secret_and_asks_for_rays_token(steps: list[dict[str, Any]]) -> None:
    settings = " ".join(step["value"] for step in steps if step["instruction"] in ("ENV", "ARG"))
    assert "RAY_AUTH_MODE=token" in settings
    assert not re.search(r"RAY_AUTH_TOKEN|SECRET|PASSWORD|KEY", settings)


def test_what_it_copies_is_there_and_is_not_ignored(steps: list[dict[str, Any]]) -> None:
    ignored = (REPOSITORY / "cluster/Dockerfile.dockerignore").read_text().splitlines()
    sources = [word for step in steps if step["instruction"] == "COPY" for word in step["value"].split()[1:-1]]
    assert all((REPOSITORY / source).exists() and f"!{source}" in ignored for source in sources)


def test_its_command_is_the_packages(steps: list[dict[str, Any]]) -> None:
    assert json.loads(steps[-1]["value"]) == ["distributed-eg", "--help"]


@pytest.mark.long
def test_its_steps_install_a_command_that_runs(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    """Those of pip, in a folder instead of an image."""
    source = tmp_path / "home/ray/source"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "distributed_eg", source / "distributed_eg")
    env = {"PATH": f"{tmp_path}/opt/env/bin:{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    (index,) = [step["value"].split("=", 1)[1] for step in steps if step["instruction"] == "ARG"]
    for step in (step["value"] for step in steps if step["instruction"] == "RUN" and "pip" in step["value"]):
        here = re.sub(r"(?<![\w.])/(opt|home)/", rf"{tmp_path}/\1/", step)
        subprocess.run(["bash", "-euc", here], env={**env, "TORCH_INDEX": index}, check=True, timeout=1500)
    done = subprocess.run(
        ["distributed-eg", "--help"], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "run" in done.stdout
