"""What a run must not leave behind: processes, and files in its run directory and scratch folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from distributed_eg.store import layout
from distributed_eg.store.storage import TEMPORARY, Storage
from distributed_eg.store.verification import unnamed, verify
from tests.faults.chaos import wait_for

WORKER = "ray::TaskWorkerActor"
COORDINATOR = "ray::Coordinator"
OURS = (WORKER, COORDINATOR)
"""How the titles of our actors' processes begin."""
_PASSING = ("sessions/", "tables/", "evaluations/")


class Census:
    """Processes that were seen below some process, so that those whose parent has died are not forgotten."""

    def __init__(self) -> None:
        self._titles: dict[psutil.Process, str] = {}

    def __len__(self) -> int:
        return len(self._titles)

    def look(self, root: psutil.Process) -> None:
        """Take in all that is below ``root`` now."""
        self.take(below(root))

    def take(self, processes: Iterable[psutil.Process]) -> None:
        """Take in some processes; a title that has changed replaces the one before."""
        for process in processes:
            self._titles[process] = title(process) or self._titles.get(process, "")

    def alive(self) -> list[psutil.Process]:
        """Those that have not ended."""
        return [process for process in self._titles if is_alive(process)]

    def ours_alive(self) -> list[psutil.Process]:
        """Those of them that are our workers and coordinators, or drivers of ours."""
        return [process for process in self.alive() if is_ours(self._titles[process])]

    def wait(self, deadline_s: float) -> tuple[int, int]:
        """Wait until all have ended; end what has not. How many of ours, and of Ray's, had to be ended."""
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not self.alive(), deadline_s, "the end of all processes")
        left, ours = self.alive(), len(self.ours_alive())
        end(left)
        return ours, len(left) - ours


def is_ours(what: str) -> bool:
    """Whether a process of this title is one of our actors or drivers."""
    return what.startswith(OURS) or "small_driver.py" in what


def below(process: psutil.Process) -> list[psutil.Process]:
    """All descendants of a process; none where it has ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """The command line of a process, which Ray's workers write over; empty where it has ended."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def is_alive(process: psutil.Process) -> bool:
    """Whether a process has not ended; one whose parent has not asked yet how it ended has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to each."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def sealed(run: Path) -> dict[str, str]:
    """sha256 of all files of a run directory that must not depend on faults: not of exports, times and sessions."""
    files = {file.relative_to(run).as_posix(): file for file in sorted(run.rglob("*")) if file.is_file()}
    return {
        path: hashlib.sha256(file.read_bytes()).hexdigest()
        for path, file in files.items()
        if not path.startswith(_PASSING) and not path.endswith(("timings.json", "run.json"))
    }


def differing(run: dict[str, str], undisturbed: dict[str, str]) -> list[str]:
    """Paths whose bytes differ, or that only one of two run directories has."""
    return sorted(path for path in run.keys() | undisturbed.keys() if run.get(path) != undisturbed.get(path))


def committed(run: Path) -> int:
    """How many tasks of a run directory are sealed."""
    return len(list(run.glob(f"{layout.TASKS}/*/manifest.json")))


def files_left(run: Path, scratch: Path) -> dict[str, int]:
    """What a run that was closed must not leave in its run directory and scratch folder, counted by kind."""
    sessions = [json.loads(file.read_text()) for file in sorted((run / layout.SESSIONS).glob("*.json"))]
    storage = Storage(str(run))
    return {
        "leases open": sum(session["open"] for session in sessions[-1:]),
        "unfinished files": len(list(run.rglob(f"{TEMPORARY}*"))),
        "unnamed files": len(unnamed(storage)),
        "damaged files": len(verify(storage).damages),
        "scratch folders": len(list(scratch.glob("distributed-eg-*"))),
    }


def read_log(log: Path) -> list[dict[str, Any]]:
    """What ``small_driver`` noted so far."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
