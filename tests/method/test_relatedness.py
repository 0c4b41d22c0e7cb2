"""Relatedness and the choice of a parent, with numbers worked out by hand."""

from __future__ import annotations

import math
import random

import pytest

from distributed_eg.errors import DivergedError
from distributed_eg.method.relatedness import TaskErrors, choose_transfer, relatedness
from distributed_eg.types import RelatednessUnit, TransferChoice

UNITS: list[RelatednessUnit] = ["own_error", "variance"]


@pytest.mark.parametrize(
    ("error", "own", "variance", "unit", "expected"),
    [
        (170.0, 170.0, 300.0, "own_error", 1.0),
        (213.0, 170.0, 300.0, "own_error", 1 - 43 / 170),
        (213.0, 170.0, 300.0, "variance", 1 - 43 / 300),
        (600.0, 100.0, 300.0, "own_error", -4.0),
        (600.0, 100.0, 250.0, "variance", -1.0),
        (90.0, 100.0, 300.0, "own_error", 1.1),
    ],
)
def test_formula(error: float, own: float, variance: float, unit: RelatednessUnit, expected: float) -> None:
    # A quotient of small numbers in float64.
    assert relatedness(error, own, variance, unit) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("unit", UNITS)
def test_relatedness_is_not_symmetric(unit: RelatednessUnit) -> None:
    """Task 1 explains task 2's images better than the other way round."""
    assert relatedness(12, 10, 40, unit) != relatedness(12, 8, 30, unit)


@pytest.mark.parametrize("unit", UNITS)
def test_a_task_without_any_variation(unit: RelatednessUnit) -> None:
    """All validation images alike: nothing to divide by, and no crash."""
    assert relatedness(0.0, 0.0, 0.0, unit) == 1.0
    assert relatedness(2.0, 0.0, 0.0, unit) == -math.inf
    assert choose_transfer(2, TaskErrors(0.0, 0.0, {0: 3.0, 1: 0.0}), unit, 0.85) == TransferChoice(1, "lwf")


def test_both_units_keep_the_order_and_the_parent() -> None:
    draw = random.Random(0)
    for _ in range(200):
        errors = {candidate: draw.uniform(1, 100) for candidate in range(6)}
        measured = TaskErrors(draw.uniform(1, 100), draw.uniform(1, 400), errors)
        by_error = sorted(errors, key=lambda candidate: errors[candidate])
        parents = set()
        for unit in UNITS:
            values = relatedness([*errors.values()], measured.own, measured.variance, unit)
            assert sorted(errors, key=lambda candidate: -values[candidate]) == by_error
            parents.add(choose_transfer(6, measured, unit, 0.85).parent)
        assert parents == {by_error[0]}


@pytest.mark.parametrize(
    ("error", "transfer"), [(114.9, "lwf"), (115.0, "finetune"), (115.1, "finetune"), (90.0, "lwf")]
)
def test_learning_without_forgetting_strictly_above_the_threshold(error: float, transfer: str) -> None:
    """Own error 100: an error of 115 is a relatedness of exactly 0.85."""
    assert 1 - (115.0 - 100.0) / 100.0 == 0.85
    choice = choose_transfer(1, TaskErrors(100.0, 500.0, {0: error}), "own_error", 0.85)
    assert choice == TransferChoice(0, transfer)  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("candidates", "parent"),
    [
        ({2: 5.0, 1: 5.0, 0: 6.0}, 1),
        ({1: 5.0, 0: 5.0, None: 5.0}, None),
        ({0: 5.0, None: 5.0}, None),
        ({0: 5.0, None: 5.5}, 0),
    ],
)
def test_ties_go_to_the_earlier_and_the_root_is_earliest(
    unit: RelatednessUnit, candidates: dict[int | None, float], parent: int | None
) -> None:
    """In whatever order the errors arrive."""
    for order in (candidates, dict(reversed(candidates.items()))):
        assert choose_transfer(3, TaskErrors(4.0, 9.0, order), unit, 0.85).parent == parent


def test_the_first_task_starts_from_the_root_without_a_choice() -> None:
    assert choose_transfer(0, TaskErrors(4.0, 9.0, {}), "own_error", 0.85) == TransferChoice(None, "fresh")


def test_the_root_as_candidate_can_be_the_parent_of_the_first_task() -> None:
    """With a reference dataset the root has an autoencoder, as ImageNet has in the paper."""
    choice = choose_transfer(0, TaskErrors(100.0, 300.0, {None: 107.6}), "own_error", 0.85)
    assert choice == TransferChoice(None, "lwf")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("own", "candidates", "culprit"),
    [
        (None, {0: 5.0}, "task 4"),
        (4.0, {0: 5.0, 2: None}, "task 2"),
        (4.0, {None: None, 0: 5.0}, "the root"),
        (None, {}, "task 4"),
    ],
)
def test_an_error_that_is_not_finite_is_refused_by_name(
    value: float, own: float | None, candidates: dict[int | None, float | None], culprit: str
) -> None:
    """A NaN compares as false: it would otherwise win or lose by chance."""
    measured = {c: value if error is None else error for c, error in candidates.items()}
    with pytest.raises(DivergedError, match=f"{culprit} has error {value}") as caught:
        choose_transfer(4, TaskErrors(value if own is None else own, 9.0, measured), "own_error", 0.85)
    assert "\n" not in str(caught.value)
