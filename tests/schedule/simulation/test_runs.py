"""The simulation: our loop and machine hold, every kind of harm is done, and what is broken on purpose is found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distributed_eg.cli.simulate import SimulateOptions
from distributed_eg.cli.simulate import simulate as command
from distributed_eg.errors import InputError
from distributed_eg.schedule.events import (
    Event,
    Stage,
    StageFailed,
    StageFinished,
    TaskArrived,
    WorkerJoined,
    WorkerLeaving,
    WorkerLost,
)
from distributed_eg.schedule.instructions import Instruction, ReportFailure, RunStage
from distributed_eg.schedule.loop import Loop, Ports
from distributed_eg.schedule.machine import Machine
from distributed_eg.schedule.simulation import runs as simulate_module
from distributed_eg.schedule.simulation.adversary import FAULTS
from distributed_eg.schedule.simulation.driver import SimulatedDriver
from distributed_eg.schedule.simulation.runs import Totals, run_many, shrink, simulate
from distributed_eg.schedule.simulation.storage import BrokenInvariant, Call, Plan, Result, SimulatedStorage

SEEDS = 3000


@pytest.fixture(scope="module")
def totals() -> Totals:
    """A short run, validated throughout where the seed says so."""
    return run_many(0, SEEDS)


# Our own loop and machine


def test_no_schedule_breaks_an_invariant(totals: Totals) -> None:
    assert totals.broken is None
    assert totals.num_schedules == SEEDS


def test_the_adversary_does_every_kind_of_harm(totals: Totals) -> None:
    damaged = {f"{what} damaged" for what in ("statistics", "autoencoder", "relate", "expert")}
    poisons = {f"poison: {cause}" for cause in ("raised", "storage", "worker lost")}
    reports = {"report delayed", "report to a later driver", "stale result", "stale failure"}
    kinds = {name for name, _ in FAULTS} | damaged | poisons | reports | {"resumed after its end", "appended"}
    assert totals.faults.keys() == kinds
    assert all(count > SEEDS // 50 for count in totals.faults.values()), totals.faults
    assert totals.num_failed > SEEDS // 10
    assert totals.num_stopped > SEEDS // 50
    assert totals.num_drivers > 1.3 * SEEDS


def test_the_plans_are_of_every_kind() -> None:
    reports = [simulate(seed, validates=False) for seed in range(500)]
    appended = [report.plan for report in reports if report.totals.faults["appended"]]
    assert any(plan.retired for plan in appended)
    assert any(plan.continues[plan.num_earlier] is not None for plan in appended), "goes on from an earlier call's"
    plans = [report.plan for report in reports if not report.totals.faults["appended"]]
    assert {len(plan.parents) - plan.num_earlier for plan in plans} == set(range(1, 7))
    assert {plan.num_earlier for plan in plans} == {0, 1, 2}
    assert {plan.tasks_per_worker for plan in plans} == {None, 1, 2, 3}
    assert {plan.stop_on_failure for plan in plans} == {plan.has_reference for plan in plans} == {False, True}
    assert any(task is not None for plan in plans for task in plan.continues)
    assert len({plan.poison[1:] for plan in plans if plan.poison}) == 12, "three causes at four stages"


def test_a_seed_replays_exactly_and_its_choices_say_the_same() -> None:
    for seed in range(100):
        report = simulate(seed)
        assert simulate(seed) == report
        assert simulate(choices=report.choices) == report


def test_no_choice_at_all_is_one_task_that_nothing_disturbs() -> None:
    report = simulate()
    assert [event.stage for event in report.events if isinstance(event, StageFinished)] == list(Stage)
    assert not report.totals.faults
    assert set(report.choices) == {0}
    assert (report.totals.num_drivers, report.totals.num_attempts, report.totals.num_failed) == (1, 4, 0)


def test_several_processes_count_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_module, "_CHUNK", 20)
    assert run_many(5, 60, processes=2) == run_many(5, 60)


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_module, "_CHUNK", 10)
    told: list[int] = []
    run_many(0, 25, on_progress=lambda totals: told.append(totals.num_schedules))
    assert told == [10, 20, 25]


# The storage


def test_what_a_stage_leaves_depends_on_all_that_it_read() -> None:
    chain = SimulatedStorage(Plan((None, 0, 1), (None, None, None))).expected
    star = SimulatedStorage(Plan((None, 0, 0), (None, None, None))).expected
    again = SimulatedStorage(Plan((None, 0, 1), (None, None, 1))).expected
    assert chain[1, Stage.EXPERT] == star[1, Stage.EXPERT]
    assert chain[2, Stage.EXPERT].content != star[2, Stage.EXPERT].content, "another parent"
    assert chain[2, Stage.AUTOENCODER] != again[2, Stage.AUTOENCODER], "goes on from task 1's"
    assert chain[2, Stage.RELATE].content != again[2, Stage.RELATE].content


def test_storage_takes_the_same_again_and_nothing_else() -> None:
    storage = SimulatedStorage(Plan((None,), (None,)))
    call = Call(RunStage(0, Stage.AUTOENCODER, 1, "w1"), storage.expected[0, Stage.AUTOENCODER])
    storage.seal(call)
    storage.seal(call)
    with pytest.raises(BrokenInvariant, match="a result is sealed once"):
        storage.seal(call._replace(result=Result(6)))


def test_storage_takes_other_results_than_the_expected_only_after_a_task_was_given_up() -> None:
    storage = SimulatedStorage(Plan((None,), (None,)))
    call = Call(RunStage(0, Stage.EXPERT, 1, "w1"), Result(6))
    with pytest.raises(BrokenInvariant, match="faults do not change results"):
        storage.seal(call)
    storage.has_failed = True
    storage.seal(call)


# What is broken on purpose


class ForgetsWaiting(Machine):
    """Only the first of the tasks that waited for earlier autoencoders goes on."""

    def _related_now(self) -> list[int]:
        return super()._related_now()[:1]


class RelatesTooEarly(Machine):
    """RELATE does not wait for earlier autoencoders."""

    def _first_without_autoencoder(self) -> float:
        return float("inf")


class TrainsTooEarly(Machine):
    """EXPERT does not wait for the parent's expert."""

    def _expert_ready(self, task: int) -> bool:
        return True


class ResetsBudgets(Machine):
    """Each failure is the first one."""

    def _fail(self, event: StageFailed) -> list[Instruction]:
        self._tasks[event.task].failures.clear()
        return super()._fail(event)


class GivesUpTooEarly(Machine):
    """Each failure counts for ten."""

    def _fail(self, event: StageFailed) -> list[Instruction]:
        self._tasks[event.task].failures += [event] * 9
        return super()._fail(event)


class TakesTheBusyForIdle(Machine):
    """A worker that says again that it is ready gets a second stage."""

    def handle(self, event: Event) -> list[Instruction]:
        if isinstance(event, WorkerJoined) and event.worker in self._nodes:
            self._idle[event.worker] = event.node
        return super().handle(event)


class ReportsNothing(Machine):
    """Tasks are given up in silence."""

    def handle(self, event: Event) -> list[Instruction]:
        return [told for told in super().handle(event) if not isinstance(told, ReportFailure)]


class ForgetsTheLeaving(Machine):
    """A worker that said it would go gets stages still."""

    def handle(self, event: Event) -> list[Instruction]:
        return [] if isinstance(event, WorkerLeaving) else super().handle(event)


class StopsForNothing(Machine):
    """Failures never stop the run."""

    def _fail(self, event: StageFailed) -> list[Instruction]:
        instructions = super()._fail(event)
        self.stopping = False
        return instructions


class RunsSealedStages(Machine):
    """What an earlier driver left of a task that it did not finish is not looked at."""

    def _add_task(self, event: TaskArrived) -> list[Instruction]:
        finished = len(event.done) == len(Stage)
        return super()._add_task(event if finished else TaskArrived(event.task, event.continues))


class ForgetsLostStatistics(Machine):
    """Statistics that a driver derived once are taken to be there."""

    def _add_task(self, event: TaskArrived) -> list[Instruction]:
        self._has_statistics |= Stage.FEATURES in event.done
        return super()._add_task(event)


class ForgetsItsParent(Machine):
    """The parent that an earlier driver recorded is not looked at."""

    def _add_task(self, event: TaskArrived) -> list[Instruction]:
        return super()._add_task(TaskArrived(event.task, event.continues, event.done))


class NumbersAnew(Machine):
    """Attempt numbers begin anew with each driver."""

    def __init__(self, *args: Any, first_attempt: int, **further: Any) -> None:
        super().__init__(*args, **further)


class RecordsStaleResults(Loop[Call]):
    """Whatever is reported is recorded, whoever reports it."""

    def finished(self, attempt: int, result: Call) -> None:
        if attempt not in self.runs:
            self._ports.record(result.run, result)
        super().finished(attempt, result)


class CountsAnyReport(Loop[Call]):
    """Any report of the stage that runs counts, also that of an earlier attempt."""

    def finished(self, attempt: int, result: Call) -> None:
        same = [run for run in self.runs.values() if (run.task, run.stage) == (result.run.task, result.run.stage)]
        super().finished(same[0].attempt if same else attempt, result)


class KeepsLostAttempts(Loop[Call]):
    """What a lost worker ran is taken to run on."""

    def tell(self, event: Event) -> None:
        runs = dict(self.runs)
        super().tell(event)
        if isinstance(event, WorkerLost):
            self.runs = runs | self.runs


class TellsBeforeItRecords(Loop[Call]):
    """The machine hears of a result that is not sealed yet."""

    def finished(self, attempt: int, result: Call) -> None:
        if attempt in self.runs:
            self.tell(StageFinished(result.run.task, result.run.stage, attempt, result.result.parent))
            self._ports.record(result.run, result)


class RecordsNothing(Loop[Call]):
    """The machine hears of results that are nowhere."""

    def finished(self, attempt: int, result: Call) -> None:
        if attempt in self.runs:
            self.tell(StageFinished(result.run.task, result.run.stage, attempt, result.result.parent))


class RecordsTwice(Loop[Call]):
    """Each result is recorded once more than it came in."""

    def finished(self, attempt: int, result: Call) -> None:
        if attempt in self.runs:
            self._ports.record(result.run, result)
        super().finished(attempt, result)


class DropsResults(Loop[Call]):
    """What a stage left is forgotten, if it is the last of its task."""

    def finished(self, attempt: int, result: Call) -> None:
        if result.run.stage is not Stage.EXPERT:
            super().finished(attempt, result)


class DropsFailures(Loop[Call]):
    """Nobody hears of failures."""

    def failed(self, attempt: int, *args: Any, **further: Any) -> None:
        self.runs.pop(attempt, None)


class CommitsTwice(Loop[Call]):
    """Each commit is told once more."""

    def __init__(self, machine: Machine, ports: Ports[Call]) -> None:
        super().__init__(machine, ports)
        commit = ports.commit
        ports.commit = lambda task: (commit(task), commit(task))[0]


class CommitsOutOfOrder(Loop[Call]):
    """A task is committed as soon as it is sealed, whatever arrived before it."""

    def _commit(self) -> None:
        for task in [task for task in self._order if self.machine.is_committed(task)]:
            self._order.remove(task)
            self._ports.commit(task)


class CommitsTooEarly(Loop[Call]):
    """A task is committed when its turn has come, before its expert is there."""

    def _commit(self) -> None:
        while self._order:
            self._ports.commit(self._order.popleft())


class CommitsTooLate(Loop[Call]):
    """The last task that can be committed waits for another."""

    def _commit(self) -> None:
        if len(self._order) > 1:
            super()._commit()


class WaitsForWhatFailed(Loop[Call]):
    """A task that was given up is waited for still."""

    def __init__(self, machine: Machine, ports: Ports[Call]) -> None:
        super().__init__(machine, ports)
        self._order = type("Keeping", (deque,), {"remove": lambda order, task: None})()


class GivesUpInSilence(Loop[Call]):
    """Nobody hears of the tasks that are given up."""

    def __init__(self, machine: Machine, ports: Ports[Call]) -> None:
        super().__init__(machine, ports)
        ports.give_up = lambda failure: None


class StagesThatDiffer(SimulatedDriver):
    """A stage that is run again gives something else."""

    def submit(self, run: RunStage) -> None:
        super().submit(run)
        call = self.running[run.worker]
        other = call.result._replace(content=call.result.content + (run.attempt > 9))
        self.running[run.worker] = call._replace(result=other)


def _driver(broken: type[Machine] | type[Loop[Call]] | type[SimulatedDriver]) -> type[SimulatedDriver]:
    if issubclass(broken, SimulatedDriver):
        return broken
    part = "machine_type" if issubclass(broken, Machine) else "loop_type"
    return type(broken.__name__, (SimulatedDriver,), {part: broken})


MISSING = "a stage starts when what it needs is there"
RECORDED_ONCE = "a result is recorded once, and only if its attempt runs"
IN_ORDER = "tasks are committed once, in order of arrival"


@pytest.mark.parametrize(
    ("broken", "invariant"),
    [
        (ForgetsWaiting, "nothing is raised: ScheduleError: a task is in no place"),
        (RelatesTooEarly, MISSING),
        (TrainsTooEarly, MISSING),
        (ResetsBudgets, "budgets are kept"),
        (GivesUpTooEarly, "a task is given up for a cause only"),
        (TakesTheBusyForIdle, "stages go to idle workers that stay"),
        (ReportsNothing, "no task is lost"),
        (ForgetsTheLeaving, "stages go to idle workers that stay"),
        (StopsForNothing, "a stopped run starts nothing"),
        (RunsSealedStages, "what is sealed is not run again"),
        (ForgetsLostStatistics, MISSING),
        (ForgetsItsParent, MISSING),
        (NumbersAnew, "attempt numbers never repeat"),
        (RecordsStaleResults, RECORDED_ONCE),
        (CountsAnyReport, RECORDED_ONCE),
        (KeepsLostAttempts, "the loop knows what runs"),
        (TellsBeforeItRecords, MISSING),
        (RecordsNothing, MISSING),
        (RecordsTwice, RECORDED_ONCE),
        (DropsResults, "the result of an attempt that runs is recorded"),
        (DropsFailures, "every run ends"),
        (CommitsTwice, IN_ORDER),
        (CommitsOutOfOrder, IN_ORDER),
        (CommitsTooEarly, "a task is committed after all of it is sealed"),
        (CommitsTooLate, "a task is committed as soon as it can be"),
        (WaitsForWhatFailed, "a task is committed as soon as it can be"),
        (GivesUpInSilence, "no task is lost"),
        (StagesThatDiffer, "faults do not change results"),
    ],
)
def test_what_is_broken_is_found_and_made_short(
    broken: type[Machine] | type[Loop[Call]] | type[SimulatedDriver], invariant: str
) -> None:
    driver = _driver(broken)
    totals = run_many(0, SEEDS, driver=driver)
    found = totals.broken
    assert found is not None, "not found"
    assert totals.num_schedules == found.seed, "the first that breaks one ends it"
    assert str(found).startswith(invariant)
    assert str(list(found.choices)) in str(found)
    with pytest.raises(BrokenInvariant, match=re.escape(invariant)):
        simulate(choices=found.choices, driver=driver)
    with pytest.raises(BrokenInvariant) as first:
        simulate(found.seed, driver=driver)
    assert f"seed {found.seed}, choices" in str(first.value)
    assert len(found.choices) <= min(60, len(first.value.choices))
    assert sum(map(bool, found.choices)) <= 14, "nearly all is tame"
    simulate(choices=found.choices)  # our own hold in that schedule


def test_without_validation_a_task_that_is_forgotten_shows_by_a_run_that_does_not_end() -> None:
    def run() -> None:
        for seed in range(SEEDS):
            simulate(seed, driver=_driver(ForgetsWaiting), validates=False)

    with pytest.raises(BrokenInvariant, match="every run ends"):
        run()


def test_shrinking_drops_zeroes_and_lowers_and_knows_when_to_stop() -> None:
    tried = 0

    def fails(choices: Sequence[int]) -> bool:
        nonlocal tried
        tried += 1
        return any(choice >= 7 for choice in choices) and len(choices) >= 3

    assert sorted(shrink([5, 9, 1, 30, 2, 2, 8], fails)) == [0, 0, 7]
    tried = 0
    assert fails(shrink(list(range(100)), fails, max_tries=3))
    assert tried <= 4


# The command


def test_the_command_says_what_it_ran(capsys: pytest.CaptureFixture[str]) -> None:
    command(SimulateOptions(schedules=30, processes=1, json=True))
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert (answer["num_schedules"], answer["broken"]) == (30, None)
    assert answer["faults"]["driver died"] > 0
    assert "30 schedules" in told.err
    assert "Broken invariants: 0" in told.err


def test_the_command_tells_one_seeds_story(capsys: pytest.CaptureFixture[str]) -> None:
    command(SimulateOptions(replay=3))
    told = capsys.readouterr().out
    assert told.startswith("Plan(")
    assert all(str(event) in told for event in simulate(3).events)


@pytest.mark.parametrize("options", [SimulateOptions(processes=1), SimulateOptions(replay=0)])
def test_the_command_tells_the_shortest_schedule_that_breaks_an_invariant(
    options: SimulateOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SimulatedDriver, "machine_type", RelatesTooEarly)
    with pytest.raises(SystemExit) as caught:
        command(options)
    assert caught.value.code == 1
    told = capsys.readouterr().out
    assert "Broken invariants: 1, by seed 0" in told
    assert MISSING in told


@pytest.mark.parametrize("options", [SimulateOptions(schedules=0), SimulateOptions(processes=-1)])
def test_the_command_refuses_what_it_cannot_run(options: SimulateOptions) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        command(options)


def test_the_command_shares_the_work_among_processes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distributed_eg", "simulate", "--schedules", "40", "--processes", "2", "--json"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_schedules"] == 40
