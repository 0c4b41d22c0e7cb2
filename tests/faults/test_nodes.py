"""Nodes that leave, are drained or join, and room that is missing: only running stages are lost, and nobody guesses."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

Story = dict[str, Any]


@pytest.fixture(scope="module")
def stories(nodes_script: tuple[subprocess.Popen[str], Path]) -> dict[str, Story]:
    """What happened on a cluster of several nodes; in a process of its own, for this one may hold the suite's Ray."""
    process, printed = nodes_script
    code, text = process.wait(timeout=280), printed.read_text()
    assert code == 0, text[-3000:]
    told = [json.loads(line) for line in text.splitlines() if line.startswith('{"story"')]
    return {story["story"]: story for story in told}


@pytest.fixture(scope="module")
def expected(undisturbed: dict[str, Any]) -> dict[str, Any]:
    """What every story must end with, as it is read from JSON."""
    return json.loads(json.dumps(undisturbed))


def told(stories: dict[str, Story], name: str) -> Story:
    """A story that was played to its end."""
    story = stories[name]
    assert "failed" not in story, story["failed"]
    return story


def started(story: Story) -> dict[tuple[int, str], list[str]]:
    """The workers that each stage of each task was started on."""
    workers: dict[tuple[int, str], list[str]] = {}
    for state, task, stage, worker in story["progress"]:
        if state == "started":
            workers.setdefault((task, stage), []).append(worker)
    return workers


def test_a_lost_node_costs_only_the_stage_that_ran_there(stories: dict[str, Story], expected: dict[str, Any]) -> None:
    """All processes of a node are killed while an expert is in its second epoch there. It goes on elsewhere from its
    checkpoint, without its first epoch, and nothing else runs again."""
    story = told(stories, "lost")
    (gone,) = [worker for worker, node in story["before"].items() if node == story["node"]]
    (stays,) = story["before"].keys() - {gone}
    again = {stage: workers for stage, workers in started(story).items() if len(workers) > 1}
    assert again == {(1, "expert"): [gone, stays]}
    assert story["first_epochs"] == 1
    (line,) = [line for line in story["said"] if " is lost " in line]
    assert re.match(rf"{gone} is lost \((node|worker) lost\), another takes its place: ", line)
    assert story["workers"] == {stays: story["before"][stays]}
    assert story["outcome"] == expected


def test_a_drained_node_finishes_its_stage_and_gets_nothing_new(
    stories: dict[str, Story], expected: dict[str, Any]
) -> None:
    """Its expert ends there, although other stages are ready and nobody else is free; then its worker goes, and the one
    that takes its place is not put there, though it is the only node with room."""
    story = told(stories, "drained")
    (leaves,) = [worker for worker, node in story["before"].items() if node == story["node"]]
    (stays,) = story["before"].keys() - {leaves}
    assert all(len(workers) == 1 for workers in started(story).values())
    after = story["progress"][story["seen_before"] :]
    assert [seen for seen in after if seen[3] == leaves] == [["finished", 1, "expert", leaves]]
    assert any(state == "started" for state, *_ in after)
    said = [line for line in story["said"] if not line.startswith("Still waiting")]
    assert said == [f"The node of {leaves} is being drained: it finishes its stage and gets no other."]
    assert story["placed_after"] == story["placed_before"] != []
    assert story["workers"] == {stays: story["before"][stays]}
    assert story["outcome"] == expected


def test_a_node_that_joins_is_used(stories: dict[str, Story], expected: dict[str, Any]) -> None:
    """With num_workers="auto" a second worker comes up on it while the first one is busy, and both work."""
    story = told(stories, "joins")
    assert len(story["before"]) == 1
    assert len(story["workers"]) == len(set(story["workers"].values())) == 2
    assert story["before"].items() < story["workers"].items()
    assert {worker for workers in started(story).values() for worker in workers} == set(story["workers"])
    assert all(len(workers) == 1 for workers in started(story).values())
    assert story["outcome"] == expected


def test_a_demand_that_no_node_can_meet_is_refused_at_once(stories: dict[str, Story]) -> None:
    """The message says what was asked for and what each node has; the storage can be used again, as the next story
    does."""
    story = told(stories, "infeasible")
    assert story["train_s"] < 5
    assert "A worker asks for 64 CPU and 0 GPU, which no node has (" in story["error"]
    offers = re.findall(r"[\d.]+: (\d+) CPU, 0 GPU", story["error"])
    assert sorted(offers) == ["0", "1"]  # the head and the one node
    assert "lower cpus_per_worker" in story["error"]


def test_room_that_is_taken_is_waited_for_and_the_reason_is_told(
    stories: dict[str, Story], expected: dict[str, Any]
) -> None:
    """Somebody else holds the only CPU. The run says so while it waits, and goes on when it is free."""
    story = told(stories, "busy")
    assert re.match(r"Still waiting for a worker after \d+ s: each asks for 1 CPU and 0 GPU, and ", story["said"][0])
    assert story["outcome"] == expected


def test_who_does_not_want_to_wait_any_longer_is_told_why(stories: dict[str, Story]) -> None:
    """startup_timeout_s is over; the run can be resumed, as the patient driver does."""
    impatient = told(stories, "busy")["impatient"]
    assert re.match(r"No worker came up within \d+ s: each asks for 1 CPU and 0 GPU, and ", impatient["error"])
    assert "raise startup_timeout_s; the run can be resumed" in impatient["error"]
    assert 1 < impatient["train_s"] < 60


def test_nothing_of_ours_is_left(stories: dict[str, Story]) -> None:
    """No actor, no scratch folder, no file that was being written, after all of these."""
    story = told(stories, "left")
    assert (story["named"], story["alive"], story["scratch"], story["temporary"]) == ([], [], [], [])
