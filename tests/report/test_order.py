"""Related tasks stand next to each other."""

from __future__ import annotations

from distributed_eg.report.order import clustered


def test_families_stand_together_whatever_their_order_of_arrival() -> None:
    related = {(t, c): 0.9 if t % 3 == c % 3 else -40.0 for t in range(9) for c in range(t)}
    families = [task % 3 for task in clustered(range(9), related)]
    assert len({*families[:3]}) == len({*families[3:6]}) == len({*families[6:]}) == 1


def test_one_task_and_tasks_of_which_nothing_is_known_are_all_there() -> None:
    assert clustered([4], {}) == [4]
    assert sorted(clustered([2, 5, 7], {})) == [2, 5, 7]
