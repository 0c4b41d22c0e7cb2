"""``distributed-eg simulate``: the order of work under an adversary, by the million schedules."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, TextIO

import tyro

from distributed_eg.errors import InputError

if TYPE_CHECKING:
    from distributed_eg.schedule.simulation.runs import Finding, Totals

_PROGRESS_EVERY = 100_000


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """Run random schedules of the order of work, without any training, and check what must hold in each, whatever
    happens: workers, nodes, drivers and the coordinator die, reports come late, twice or never, files get lost."""

    schedules: int = 1_000_000
    """How many, each by a seed of its own."""
    seed: int = 0
    """The first one's seed."""
    processes: int | None = None
    """Processes that share the work; one per CPU where not given."""
    replay: int | None = None
    """Tell only this seed's schedule, event by event."""
    json: bool = False
    """Print one JSON object as the last line of stdout; what people read goes to stderr."""


def simulate(options: Annotated[SimulateOptions, tyro.conf.OmitArgPrefixes]) -> None:
    """Run random schedules of the order of work under every fault; exit code 1 where one breaks an invariant."""
    processes = options.processes or os.cpu_count() or 1
    if options.schedules < 1 or processes < 1:
        raise InputError(f"--schedules {options.schedules} and --processes {processes} must be at least 1.")
    out = sys.stderr if options.json else sys.stdout
    started = time.perf_counter()
    if options.replay is None:
        from distributed_eg.schedule.simulation.runs import run_many

        def tell(totals: Totals) -> None:
            if totals.num_schedules % _PROGRESS_EVERY == 0:
                told = f"{totals.num_schedules:,} schedules, {time.perf_counter() - started:.0f} s"
                print(told, file=sys.stderr, flush=True)

        totals = run_many(options.seed, options.schedules, processes, on_progress=tell)
    else:
        totals = _replay(options.replay, out)
    seconds = time.perf_counter() - started
    _tell(totals, seconds, out)
    if options.json:
        answer = {field.name: getattr(totals, field.name) for field in fields(totals)}
        broken = None if totals.broken is None else asdict(totals.broken)
        print(json.dumps({**answer, "broken": broken, "seconds": seconds}))
    if totals.broken is not None:
        sys.exit(1)


def _replay(seed: int, out: TextIO) -> Totals:
    from distributed_eg.schedule.simulation import runs as schedules

    broken = schedules.replay(seed)
    if broken is not None:
        return schedules.Totals(broken=broken)
    report = schedules.simulate(seed)
    print(report.plan, *report.events, sep="\n", file=out)
    return report.totals


def _tell(totals: Totals, seconds: float, out: TextIO) -> None:
    print(
        f"{totals.num_schedules:,} schedules, {totals.num_events:,} events, {totals.num_attempts:,} attempts, "
        f"{totals.num_drivers - totals.num_schedules:,} drivers restarted; {totals.num_failed:,} tasks given up, "
        f"{totals.num_stopped:,} runs stopped by a failure; {seconds:.1f} s.",
        file=out,
    )
    for name, count in sorted(totals.faults.items()):
        print(f"  {count:>12,}  {name}", file=out)
    print(f"Broken invariants: {0 if totals.broken is None else _finding(totals.broken)}", file=out)


def _finding(broken: Finding) -> str:
    return (
        f"1, by seed {broken.seed}. The shortest schedule that breaks it, for "
        f"distributed_eg.schedule.simulation.runs.simulate(choices=…): {list(broken.choices)}\n{broken.message}"
    )
