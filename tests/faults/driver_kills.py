"""Kills the driver of a small run at random moments and resumes it: all bytes must be the same each time.

    python tests/faults/driver_kills.py --kills 20 --seed 0 [--engine inline|ray] [--tasks 6] [--append] [--json]

Moments are drawn evenly from the time that an undisturbed run takes, which is measured first, from its start to its
end; a run that ends before its moment comes is no kill, and another moment is drawn. Each kill has a run directory of
its own. With ``--append`` the tasks come one by one, with an update, a retirement and its undoing between them. With
``--engine ray`` the driver starts Ray itself, so that the kill takes Ray along. The exit code is 1 if anything is
wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.update(RAY_AUTH_TOKEN=secrets.token_hex(24), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from tests.faults import leftovers
from tests.faults.leftovers import Census

LINGER_S = 40.0
"""Ray's agents look for their raylet every few seconds: so long may they stay after a kill."""
_RUN_S = 180.0


@dataclass
class Kill:
    """One kill, and what the run became that went on."""

    moment_s: float
    committed: int
    """Tasks that were sealed by then."""
    equal: bool = False
    processes: int = 0
    """Of the killed driver at the kill, it included, and of the one that went on, those that its end left."""
    ended_of_ours: int = 0
    """Processes of ours that were still there ``LINGER_S`` later, and had to be ended."""
    ended_of_ray: int = 0
    left: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class Driver:
    """Drivers on one run directory, each a session of its own, so that nothing that they start is overlooked."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.run, self.scratch = folder / "run", folder / "scratch"
        self.scratch.mkdir(parents=True)
        self.output, self._outcome = folder / "output", folder / "outcome.json"
        self.census = Census()
        self._command = [sys.executable, str(Path(__file__).with_name("small_driver.py"))]
        self._command += ["--engine", options.engine, "--tasks", str(options.tasks)]
        self._command += ["--append"] if options.append else []
        for name, path in {"storage": self.run, "scratch": self.scratch, "outcome": self._outcome}.items():
            self._command += [f"--{name}", str(path)]
        self._command += ["--log", str(folder / "log")]

    def start(self) -> subprocess.Popen[bytes]:
        """Begin, or go on with what the run holds."""
        with self.output.open("ab") as output:
            return subprocess.Popen(self._command, stdout=output, stderr=output, start_new_session=True)

    def kill_after(self, moment_s: float) -> bool:
        """Start, and SIGKILL at the moment: whether it was still there then.

        Raises:
            RuntimeError: it failed before that.
        """
        process = self.start()
        try:
            code = process.wait(moment_s)
        except subprocess.TimeoutExpired:
            return True
        finally:
            self._end(process)
        if code:
            raise RuntimeError(f"A driver ended with exit code {code}: {self.output.read_text()}")
        return False

    def finish(self) -> int | None:
        """Start, and wait for its end: the exit code; None where it did not end in time."""
        process = self.start()
        try:
            return process.wait(_RUN_S)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._end(process)

    def outcome(self) -> str:
        """What came out; empty where it did not end well."""
        return self._outcome.read_text() if self._outcome.exists() else ""

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL where it has not ended; remember all processes of its session, before and after."""
        self._take_in(process)
        process.kill()
        process.wait()
        self._take_in(process)

    def _take_in(self, process: subprocess.Popen[bytes]) -> None:
        """Those whose parents are gone are in the session, too."""
        self.census.take(p for p in psutil.process_iter() if _session(p) == process.pid)


def measure(folder: Path, options: argparse.Namespace) -> tuple[float, str, dict[str, str]]:
    """An undisturbed run: how long it took, what came out, and the hashes of what it sealed."""
    driver = Driver(folder, options)
    started = time.monotonic()
    code = driver.finish()
    seconds = time.monotonic() - started
    if code != 0:
        raise RuntimeError(f"The undisturbed run ended with exit code {code}: {driver.output.read_text()}")
    driver.census.wait(LINGER_S)
    return seconds, driver.outcome(), leftovers.sealed(driver.run)


def kill_and_resume(
    folder: Path, moment_s: float, options: argparse.Namespace, undisturbed: tuple[str, dict[str, str]]
) -> Kill | None:
    """One kill; None where the run had ended before."""
    driver = Driver(folder, options)
    if not driver.kill_after(moment_s):
        driver.census.wait(LINGER_S)
        return None
    kill = Kill(round(moment_s, 2), leftovers.committed(driver.run))
    code = driver.finish()
    kill.processes = len(driver.census)
    kill.ended_of_ours, kill.ended_of_ray = driver.census.wait(LINGER_S)
    if code != 0:
        kill.wrong.append(
            f"resumed, it ended with exit code {code} (None: not at all): …{driver.output.read_text()[-2000:]}"
        )
        return kill
    outcome, sealed = undisturbed
    differing = leftovers.differing(leftovers.sealed(driver.run), sealed)
    kill.equal = driver.outcome() == outcome and not differing
    kill.left = leftovers.files_left(driver.run, driver.scratch)
    kill.wrong += [f"other bytes: {path}" for path in differing[:5]]
    kill.wrong += ["other tables"] if driver.outcome() != outcome else []
    kill.wrong += [f"left behind: {count} {what}" for what, count in kill.left.items() if count]
    kill.wrong += [f"left behind: {kill.ended_of_ours} processes of ours"] if kill.ended_of_ours else []
    return kill


def kill_again_and_again(folder: Path, options: argparse.Namespace) -> tuple[float, list[Kill]]:
    """All kills, and how long an undisturbed run takes."""
    seconds, *undisturbed = measure(folder / "undisturbed", options)
    draw = random.Random(options.seed)
    kills: list[Kill] = []
    for number in range(3 * options.kills):
        kill = kill_and_resume(folder / f"kill-{number}", draw.uniform(0, seconds), options, tuple(undisturbed))
        if kill is not None:
            kills.append(kill)
            print(f"kill {len(kills)}: {told(kill)}", file=sys.stderr if options.json else sys.stdout, flush=True)
        if len(kills) == options.kills:
            break
    return seconds, kills


def told(kill: Kill) -> str:
    """One kill in words."""
    left = ", ".join(f"{count} {what}" for what, count in kill.left.items())
    lines = [
        f"after {kill.moment_s:.1f} s, {kill.committed} tasks committed; resumed {'equal' if kill.equal else 'OTHER'}; "
        f"of {kill.processes} processes {kill.ended_of_ours} of ours and {kill.ended_of_ray} of Ray's were ended by "
        f"hand; left: {left}",
        *(f"  WRONG: {what}" for what in kill.wrong),
    ]
    return "\n".join(lines)


def in_total(seconds: float, kills: list[Kill]) -> str:
    """All kills in words."""
    return (
        f"{len(kills)} kills within {seconds:.1f} s, {sum(kill.equal for kill in kills)} of {len(kills)} resumed runs "
        f"equal; tasks committed at the kill: {', '.join(str(kill.committed) for kill in kills)}; of "
        f"{sum(kill.processes for kill in kills)} processes {sum(kill.ended_of_ours for kill in kills)} of ours and "
        f"{sum(kill.ended_of_ray for kill in kills)} of Ray's were ended by hand; left behind: "
        f"{sum(sum(kill.left.values()) for kill in kills)} files, folders and leases"
    )


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except OSError:  # it has ended
        return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=6)
    parser.add_argument("--engine", choices=["inline", "ray"], default="inline")
    parser.add_argument("--append", action="store_true", help="a run's life: appends, an update, a retirement")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser.parse_args()


def main() -> int:
    """Kill, resume, print figures: the exit code."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="dk") as folder:
        os.environ["RAY_TMPDIR"] = folder  # short: sockets lie below it
        seconds, kills = kill_again_and_again(Path(folder), options)
    wrong = len(kills) < options.kills or any(kill.wrong for kill in kills)
    if options.json:
        print(json.dumps({"ok": not wrong, "undisturbed_s": seconds, "kills": [asdict(kill) for kill in kills]}))
    else:
        print(in_total(seconds, kills))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
