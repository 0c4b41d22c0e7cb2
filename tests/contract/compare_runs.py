"""The same runs with two checkouts of this repository, this one and another: what differs, by sha256.

    python tests/contract/compare_runs.py OTHER-CHECKOUT [--only NAME …] [--data DIR] [--verbose] [--json]

Compared are every autoencoder and expert, the registry (without ``train_s`` and ``worker``), the relatedness table and
the metrics. The runs are those of ``compared_runs.py`` beside this file. Each is made by a process of its own with
PYTHONPATH=<checkout>, in a temporary folder, with one thread, first with the other checkout, then with this one; what
both of them start from, such as a run that was interrupted, is made with the other.
Exit code: 0 all are equal, 1 something differs or failed, 2 what was asked for cannot be used.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from compared_runs import RUNS, Made

THIS = Path(__file__).resolve().parents[2]
RAY_ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_AUTH_MODE": "token"}
SCRIPT = Path(__file__).resolve().with_name("compared_runs.py")
TIMEOUT_S = 600


def made_by(checkout: Path, name: str, part: str, folder: Path, left: Path, data: Path) -> Made:
    """Make a run, or its preparation, with a checkout, in a process of its own."""
    folder.mkdir()
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    # Nothing is written into a checkout.
    env |= {
        **RAY_ENV,
        "RAY_AUTH_TOKEN": secrets.token_hex(24),
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SCRIPT), name, part, str(folder), str(left), str(data)]
    started_s = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        error = f"exit code {done.returncode}: {done.stderr[-2000:]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        error = f"it has not ended after {TIMEOUT_S} s"
    seconds = time.monotonic() - started_s
    if error or part == "prepare":
        return Made(seconds=seconds, error=error)
    return Made(**{**json.loads((folder / "made.json").read_text()), "seconds": seconds})


def compare(name: str, other: Path, data: Path, folder: Path) -> tuple[Made, Made]:
    """A run by the other checkout and by this one."""
    prepared = folder / "prepared"
    if RUNS[name][1] is not None:
        made = made_by(other, name, "prepare", prepared, prepared, data)
        if made.error:
            return Made(error=f"prepared for both: {made.error}"), Made()
    both = []
    for side, checkout in (("other", other), ("this", THIS)):
        left = folder / f"{side}-left"
        if prepared.exists():
            shutil.copytree(prepared, left)
        both.append(made_by(checkout, name, "run", folder / side, left, data))
    return both[0], both[1]


def differing(theirs: Made, ours: Made) -> list[str]:
    """What differs, or is there on one side only."""
    return [what for what in {**theirs.hashes, **ours.hashes} if theirs.hashes.get(what) != ours.hashes.get(what)]


def show(name: str, theirs: Made, ours: Made, *, verbose: bool) -> None:
    """A run's lines of the table: what differs (all that there is, if verbose), then the sum."""
    for side, made in (("other", theirs), ("this", ours)):
        if made.error:
            print(f"{name:<16} {side} failed: {made.error}")
    different = differing(theirs, ours)
    for what in {**theirs.hashes, **ours.hashes}:
        if verbose or what in different:
            both = (made.hashes.get(what, "nothing")[: 64 if verbose else 12] for made in (theirs, ours))
            print(f"{name:<16} {what:<26} {'differs' if what in different else 'equal':<8} {'  '.join(both)}")
    failed = theirs.error or ours.error
    state = "failed" if failed else f"{len(different)} differ" if different else "all equal"
    times = f"{theirs.seconds:.1f} s, {ours.seconds:.1f} s"
    print(f"{name:<16} {f'{len(ours.hashes)} compared':<26} {state:<8} {times}  {ours.note}", flush=True)


def main() -> int:
    """Compare what was asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER-CHECKOUT")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--data", type=Path, default=THIS.parent / "shared" / "data", help="of torchvision's MNIST")
    parser.add_argument("--verbose", action="store_true", help="both hashes of everything")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    other = options.other.resolve()
    if not (other / "distributed_eg" / "__init__.py").is_file():
        parser.error(f"{options.other} is no checkout: it has no distributed_eg/__init__.py")
    results, is_equal = {}, True
    for name in options.only:
        if name == "split-mnist-sgd" and not (options.data / "MNIST").is_dir():
            print(f"{name:<16} skipped: there is no MNIST in {options.data}; --data names another folder")
            continue
        with tempfile.TemporaryDirectory(prefix="compare-", ignore_cleanup_errors=True) as folder:
            theirs, ours = compare(name, other, options.data.resolve(), Path(folder))
        show(name, theirs, ours, verbose=options.verbose)
        is_equal &= not (theirs.error or ours.error or differing(theirs, ours))
        results[name] = {"other": asdict(theirs), "this": asdict(ours), "differing": differing(theirs, ours)}
    if options.json:
        print(json.dumps({"equal": is_equal, "runs": results}))
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
