"""What is read of a run that has had a life: versions of tasks, retired ones, a reference, several evaluations."""

from __future__ import annotations

from pathlib import Path

from distributed_eg import ClusterConfig
from distributed_eg.report.facts import read_run
from distributed_eg.report.page import page_of
from distributed_eg.store.lease import Lease
from tests.helpers import SETTINGS, tiny_benchmark, tiny_strategy
from tests.report.made_runs import make_run


def test_a_task_that_came_again_stands_where_it_came_from_first(tmp_path: Path) -> None:
    """Task 0 comes again, from its own expert; task 1 is retired; an evaluation before and one after."""
    benchmark = tiny_benchmark((0, 1, 0))
    reference = benchmark.train_stream[1].dataset
    with tiny_strategy(ClusterConfig(engine="inline", storage=str(tmp_path)), reference=reference, **SETTINGS) as s:
        s.train(benchmark.train_stream)
        s.eval(benchmark.test_stream)
        s.update(tiny_benchmark((3,)).train_stream[0])
        s.retire(1)
        s.eval(benchmark.test_stream)
        newest = s.registry.to_pylist()[0]["expert_sha256"]
        related = {(r["task"], r["candidate"]): r["relatedness"] for r in s.relatedness.to_pylist()}
    facts = read_run(str(tmp_path))
    first, second, third = facts.tasks
    assert (first.parent, first.num_versions, first.is_retired) == (None, 2, False)
    assert first.expert_sha256 == newest
    assert (second.is_retired, second.num_versions) == (True, 1)
    assert third.relatedness == related[2, third.parent]
    assert facts.relatedness == {(1, 0): related[1, 0], (2, 0): related[2, 0], (2, 1): related[2, 1]}
    assert [evaluation.tasks for evaluation in facts.evaluations] == [(0, 1, 2), (0, 2)]
    assert facts.newest == facts.evaluations[1]
    assert all(stage.started_s is not None for stage in facts.stages)
    text = page_of([facts], "")
    assert "(2 versions)" in text
    assert "(retired)" in text
    assert "All 2 evaluations" in text


def test_it_is_read_without_writing_and_while_another_drives_it(tmp_path: Path) -> None:
    storage = make_run(tmp_path / "run", 3)
    lease = Lease.acquire(storage)
    try:
        before = storage.walk()
        facts = read_run(storage.uri)
        assert storage.walk() == before
    finally:
        lease.release()
    assert [task.parent for task in facts.tasks] == [None, 0, 0]


def test_near_ties_are_those_within_a_thousandth(tmp_path: Path) -> None:
    ties = {task.task: task.ties for task in read_run(make_run(tmp_path / "run", 6).uri).tasks}
    assert ties[3] == (2,)
    assert ties[4] == ()
