"""Prints how far a schedule is from the best there can be: stages that take their time on a clock that jumps.

    python tests/performance/schedule_overhead.py --tasks 200 --workers 2 8 32 --expert-s 5
    python tests/performance/schedule_overhead.py --tasks 10000 --workers 32    # what the machine costs a stage

One line of JSON for each kind of transfer and number of workers: the time that it took divided by the longer of the
critical path and the work a worker, and the microseconds that loop and machine took for a stage. The kinds: tasks
without parents, all from the first one, from any earlier one at random, each from the one before.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distributed_eg.schedule.events import Stage, TaskArrived, WorkerJoined
from distributed_eg.schedule.instructions import ReportFailure, RunStage
from distributed_eg.schedule.loop import Loop, Ports
from distributed_eg.schedule.machine import Machine

Parents = list[int | None]
TASKS_AHEAD = 4
"""As ``Run.train`` pulls them."""


def tree(num_tasks: int) -> Parents:
    """Each task from an earlier one at random."""
    draw = random.Random(0)
    return [draw.randrange(task) if task else None for task in range(num_tasks)]


KINDS: dict[str, Callable[[int], Parents]] = {
    "none": lambda num_tasks: [None] * num_tasks,
    "star": lambda num_tasks: [0 if task else None for task in range(num_tasks)],
    "tree": tree,
    "chain": lambda num_tasks: [task - 1 if task else None for task in range(num_tasks)],
}


def least_s(parents: Parents, num_workers: int, stage_s: float, expert_s: float) -> float:
    """No schedule is shorter: the longest way through all that must come one after the other, and the work a worker."""
    ended: list[float] = []
    for parent in parents:
        before = 3 * stage_s if parent is None else max(3 * stage_s, ended[parent])
        ended.append(before + expert_s)
    return max(*ended, (3 * stage_s + expert_s) * len(parents) / num_workers)


@dataclass
class OnAClock(Ports[None]):
    """Ports over workers that exist on a clock only."""

    parents: Parents
    stage_s: float
    expert_s: float
    now_s: float = 0.0
    running: list[tuple[float, int]] = field(default_factory=list)
    stages: dict[int, RunStage] = field(default_factory=dict)
    num_pulled: int = 0

    def pull(self) -> TaskArrived | None:
        """The next task."""
        task = self.num_pulled
        self.num_pulled += 1
        return TaskArrived(task, None, frozenset(), None) if task < len(self.parents) else None

    def submit(self, run: RunStage) -> None:
        """It ends its time from now."""
        takes_s = self.expert_s if run.stage is Stage.EXPERT else self.stage_s
        heapq.heappush(self.running, (self.now_s + takes_s, run.attempt))
        self.stages[run.attempt] = run

    def record(self, run: RunStage, result: None) -> int | None:
        """After RELATE the parent."""
        return self.parents[run.task] if run.stage is Stage.RELATE else None

    def commit(self, task: int) -> None:
        """Nothing."""

    def give_up(self, failure: ReportFailure) -> None:
        """Nothing fails here."""
        raise AssertionError(failure)


def on_a_clock(parents: Parents, num_workers: int, stage_s: float, expert_s: float) -> tuple[float, float]:
    """Seconds on the clock, and real microseconds a stage."""
    ports = OnAClock(parents, stage_s, expert_s)
    machine = Machine(tasks_per_worker=TASKS_AHEAD)
    loop = Loop(machine, ports)
    started = time.perf_counter()
    for number in range(num_workers):
        loop.tell(WorkerJoined(f"w{number}", "node"))
    while not machine.done:
        ports.now_s, attempt = heapq.heappop(ports.running)
        loop.finished(attempt, None)
    return ports.now_s, (time.perf_counter() - started) / (4 * len(parents)) * 1e6


def main() -> None:
    """Each kind on each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--stage-s", type=float, default=0.5)
    parser.add_argument("--expert-s", type=float, default=0.5)
    options = parser.parse_args()
    lengths = (options.stage_s, options.expert_s)
    for num_workers in options.workers:
        for kind in options.kinds:
            parents = KINDS[kind](options.tasks)
            took_s, cost_us = on_a_clock(parents, num_workers, *lengths)
            ratio = took_s / least_s(parents, num_workers, *lengths)
            told = {"kind": kind, "workers": num_workers, "tasks": options.tasks, "overhead": round(ratio, 3)}
            print(json.dumps({**told, "makespan_s": round(took_s, 2), "stage_us": round(cost_us, 1)}), flush=True)


if __name__ == "__main__":
    main()
