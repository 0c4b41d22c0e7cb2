"""``distributed-eg simulate``: the order of work under an adversary, by the million schedules."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, fields
from typing import Annotated

import tyro

from distributed_eg.cli.options import optional
from distributed_eg.errors import InputError
from distributed_eg.schedule.simulation import runs

_PROGRESS_EVERY = 100_000


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """Run random schedules of the order of work, without any training, and check what must hold in each, whatever
    happens: workers, nodes, drivers and the coordinator die, reports come late, twice or never, files get lost."""

    schedules: int = 1_000_000
    """How many, each by a seed of its own."""
    seed: int = 0
    """The first one's seed."""
    processes: Annotated[int | None, optional("N")] = None
    """Processes that share the work; one per CPU where not given."""
    replay: Annotated[int | None, optional("SEED")] = None
    """Tell only this seed's schedule, event by event."""
    json: bool = False
    """Print one JSON object as the last line of stdout; what people read goes to stderr."""


def simulate(options: Annotated[SimulateOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> None:
    """Run random schedules of the order of work under every fault; exit code 1 where one breaks an invariant."""
    processes = (os.cpu_count() or 1) if options.processes is None else options.processes
    if options.schedules < 1 or processes < 1:
        raise InputError(f"--schedules {options.schedules} and --processes {processes} must be at least 1.")
    out = sys.stderr if options.json else sys.stdout
    started = time.perf_counter()

    def tell_progress(totals: runs.Totals) -> None:
        if totals.num_schedules % _PROGRESS_EVERY == 0:
            told = f"{totals.num_schedules:,} schedules, {time.perf_counter() - started:.0f} s"
            print(told, file=sys.stderr, flush=True)

    if options.replay is None:
        totals = runs.run_many(options.seed, options.schedules, processes, on_progress=tell_progress)
    elif broken := runs.replay(options.replay):
        totals = runs.Totals(broken=broken)
    else:
        report = runs.simulate(options.replay)
        print(report.plan, *report.events, sep="\n", file=out)
        totals = report.totals
    seconds = time.perf_counter() - started
    broken, finding = totals.broken, "0"
    if broken is not None:
        finding = (
            f"1, by seed {broken.seed}. The shortest schedule that breaks it, for "
            f"distributed_eg.schedule.simulation.runs.simulate(choices=…): {list(broken.choices)}\n{broken}"
        )
    print(
        f"{totals.num_schedules:,} schedules, {totals.num_events:,} events, {totals.num_attempts:,} attempts, "
        f"{totals.num_drivers - totals.num_schedules:,} drivers restarted; {totals.num_failed:,} tasks given up, "
        f"{totals.num_stopped:,} runs stopped by a failure; {seconds:.1f} s.",
        *(f"  {count:>12,}  {name}" for name, count in sorted(totals.faults.items())),
        f"Broken invariants: {finding}",
        sep="\n",
        file=out,
    )
    if options.json:
        answer = {field.name: getattr(totals, field.name) for field in fields(totals)}
        if broken is not None:
            answer["broken"] = {"seed": broken.seed, "message": str(broken), "choices": broken.choices}
        print(json.dumps({**answer, "seconds": seconds}))
    if broken is not None:
        sys.exit(1)
