"""Random schedules by the million: run one, shrink one that breaks an invariant, run many on several processes."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from distributed_eg.schedule.events import Event
from distributed_eg.schedule.simulation.adversary import Adversary, Chooser
from distributed_eg.schedule.simulation.driver import SimulatedDriver
from distributed_eg.schedule.simulation.storage import BrokenInvariant, Plan

_CHUNK = 2000
_VALIDATE_EVERY = 16
_NUM_TOLD = 20


@dataclass(slots=True)
class Totals:
    """What many schedules came to."""

    num_schedules: int = 0
    num_events: int = 0
    num_attempts: int = 0
    num_drivers: int = 0
    num_failed: int = 0
    """Tasks that the last driver of a schedule gave up."""
    num_stopped: int = 0
    """Schedules whose last driver stopped before its stream's end."""
    faults: Counter[str] = field(default_factory=Counter)
    broken: BrokenInvariant | None = None
    """The first that was broken, by the shortest schedule that breaks it."""

    def merge(self, other: Totals) -> None:
        """Add what other schedules came to."""
        for name in ("num_schedules", "num_events", "num_attempts", "num_drivers", "num_failed", "num_stopped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults.update(other.faults)
        self.broken = other.broken


@dataclass(frozen=True, slots=True)
class Report:
    """One schedule that held every invariant; ``events`` are what its machines were told."""

    choices: tuple[int, ...]
    plan: Plan
    events: tuple[Event, ...]
    totals: Totals


def simulate(
    seed: int | None = None,
    choices: Sequence[int] | None = None,
    *,
    driver: type[SimulatedDriver] = SimulatedDriver,
    validates: bool = True,
) -> Report:
    """Run one schedule: by ``choices`` as far as they go, then by ``seed``, and undisturbed where neither says more.

    ``driver`` brings the loop and the machine that are tested; ``validates`` has them checked after every event.

    Raises:
        BrokenInvariant: something does not hold; told with the seed, the choices and the last events.
    """
    choose = Chooser(seed, choices or ())
    history: list[Event] = []
    try:
        adversary = Adversary(choose, driver, history, validates=validates)
        adversary.run()
    except Exception as error:  # whatever a schedule makes the machine raise is a finding, and is told as one
        invariant, told = "nothing is raised", f"{type(error).__name__}: {error}"
        if isinstance(error, BrokenInvariant):
            invariant, told = error.invariant, error.told
        events = "".join(f"\n  {event}" for event in history[-_NUM_TOLD:])
        by = f"choices {choose.taken}" if seed is None else f"seed {seed}, choices {choose.taken}"
        raise BrokenInvariant(invariant, f"{told}; {by}, last events:{events}", choose.taken, seed) from error
    totals = Totals(
        num_schedules=1,
        num_events=len(history),
        num_attempts=adversary.storage.last_attempt,
        num_drivers=adversary.num_drivers,
        num_failed=len(adversary.driver.failed),
        num_stopped=int(adversary.driver.stopping),
        faults=adversary.faults,
    )
    return Report(tuple(choose.taken), adversary.plan, tuple(history), totals)


def shrink(choices: Sequence[int], fails: Callable[[Sequence[int]], bool], max_tries: int = 5000) -> list[int]:
    """Make a failing schedule shorter and tamer until nothing does, or ``max_tries`` are used up."""
    best = list(choices)
    candidates = _tamer(best)
    for _ in range(max_tries):
        candidate = next(candidates, None)
        if candidate is None:
            break
        if fails(candidate):
            best, candidates = candidate, _tamer(candidate)
    return best


def _tamer(choices: list[int]) -> Iterator[list[int]]:
    """Without a chunk, or with zeros for it, the largest chunks first; then with one choice that is lower."""
    size = len(choices)
    while size := size // 2:
        for start in range(0, len(choices), size):
            before, chunk, after = choices[:start], choices[start : start + size], choices[start + size :]
            yield before + after
            if any(chunk):
                yield [*before, *[0] * len(chunk), *after]
    for position, choice in enumerate(choices):
        for lower in sorted({0, choice // 2, choice - 1} - {choice, -1}):
            yield [*choices[:position], lower, *choices[position + 1 :]]


def replay(seed: int, *, driver: type[SimulatedDriver] = SimulatedDriver) -> BrokenInvariant | None:
    """Run a seed's schedule again; where it breaks an invariant, the shortest schedule that breaks the same one."""

    def broken_by(seed: int | None, choices: Sequence[int]) -> BrokenInvariant | None:
        try:
            simulate(seed, choices, driver=driver)
        except BrokenInvariant as broken:
            return broken
        return None

    first = broken_by(seed, ())
    if first is None:
        return None

    def fails(choices: Sequence[int]) -> bool:
        again = broken_by(None, choices)
        return again is not None and again.invariant == first.invariant

    shortest = broken_by(None, shrink(first.choices, fails)) or first
    shortest.seed = seed
    return shortest


def run_many(
    first_seed: int,
    count: int,
    processes: int = 1,
    *,
    driver: type[SimulatedDriver] = SimulatedDriver,
    on_progress: Callable[[Totals], None] | None = None,
) -> Totals:
    """Run the schedules of ``count`` seeds; the first that breaks an invariant ends it, made short in ``broken``.

    One process is this one. ``on_progress`` is told of the totals so far, now and then.
    """
    last = first_seed + count
    chunks = [range(start, min(start + _CHUNK, last)) for start in range(first_seed, last, _CHUNK)]
    run_chunk = partial(_run_chunk, driver=driver)
    if processes == 1:
        return _gather(map(run_chunk, chunks), on_progress)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return _gather(pool.map(run_chunk, chunks), on_progress)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _gather(parts: Iterable[Totals], on_progress: Callable[[Totals], None] | None) -> Totals:
    totals = Totals()
    for part in parts:
        totals.merge(part)
        if totals.broken is not None:
            break
        if on_progress is not None:
            on_progress(totals)
    return totals


def _run_chunk(seeds: range, driver: type[SimulatedDriver]) -> Totals:
    totals = Totals()
    for seed in seeds:
        try:
            totals.merge(simulate(seed, driver=driver, validates=seed % _VALIDATE_EVERY == 0).totals)
        except BrokenInvariant:
            totals.broken = replay(seed, driver=driver)
            break
    return totals
