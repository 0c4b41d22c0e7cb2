"""Summaries add up to what all rows at once would give, and the shared score is discriminant analysis over them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_eg.errors import InputError
from distributed_eg.method import shared_score
from distributed_eg.method.shared_score import SharedStack, kept_rows
from distributed_eg.method.summary import RANK, TaskSummary, fit_summary
from tests.method.helpers import Rows

WIDTH = 40


def drawn(task: int, count: int, num_classes: int = 2, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Rows of classes around means of their own, all with the same stretched covariance, and the classes."""
    common = torch.Generator().manual_seed(99)
    spread = torch.linspace(0.02, 0.3, width)[torch.randperm(width, generator=common)]
    generator = torch.Generator().manual_seed(task)
    means = 0.5 + 0.08 * torch.randn(num_classes, width, generator=generator)
    of_rows = torch.arange(count) % num_classes
    rows = means[of_rows] + spread * torch.randn(count, width, generator=generator)
    return rows, of_rows + 10 * task


def summed(rows: Tensor, classes: Tensor, start: TaskSummary | None = None) -> TaskSummary:
    return fit_summary(Rows(rows).blocks, classes, start=start)


def scatter_of(rows: Tensor, classes: Tensor) -> np.ndarray:
    """The sum of outer products around class means, in float64."""
    values, members = rows.double().numpy(), classes.numpy()
    centred = np.concatenate([values[members == c] - values[members == c].mean(0) for c in np.unique(members)])
    return np.asarray(centred.T @ centred)


@pytest.mark.parametrize("count", [2, 30, 513, 1500])
def test_a_summary_is_means_and_scatter_of_all_rows(count: int) -> None:
    rows, classes = drawn(0, count)
    summary = summed(rows, classes)
    assert summary.classes.tolist() == [0, 1]
    assert summary.counts.tolist() == [math.ceil(count / 2), count // 2]
    for place, mean in enumerate(summary.means):
        # float32 rows of which float64 sums are made.
        torch.testing.assert_close(mean, rows[classes == place].double().mean(0).float(), rtol=1e-6, atol=1e-7)
    whole = scatter_of(rows, classes)
    # Fewer directions than are kept: nothing is lost but float32 rounding, relative to the largest entry.
    found = (summary.scatter.double().T @ summary.scatter.double()).numpy()
    np.testing.assert_allclose(found, whole, atol=2e-5 * max(whole.max(), 1e-3))
    assert float(summary.energy) == pytest.approx(np.trace(whole), rel=1e-5, abs=1e-6)


def test_all_that_it_keeps_is_where_the_summaries_are() -> None:
    """A loaded model may bring them on a card; torch's default device stands for another one here."""
    summaries = [summed(*drawn(task, 40)) for task in range(2)]
    with torch.device("meta"):
        stack = SharedStack(summaries)
    assert torch.equal(stack.errors(summaries[0].means), SharedStack(summaries).errors(summaries[0].means))


def test_only_so_many_directions_are_kept_the_longest_first() -> None:
    rows, classes = drawn(0, 700, width=150)
    summary = summed(rows, classes)
    assert summary.scatter.shape == (RANK, 150)
    lengths = summary.scatter.norm(dim=1)
    assert bool((lengths[:-1] >= lengths[1:]).all())
    values = np.linalg.eigvalsh(scatter_of(rows, classes))[::-1][:RANK]
    # Blocks are compressed to twice the rank on the way: the last of the kept ones lose a little.
    np.testing.assert_allclose(lengths.square().numpy(), values, rtol=0.03)


def test_a_task_that_comes_again_goes_on_from_its_summary_alone() -> None:
    """Two halves, of which the second has a class that the first has not, are as good as all rows at once."""
    rows, classes = drawn(0, 90, num_classes=3)
    first = (classes < 2) & (torch.arange(90) < 60)
    merged = summed(rows[~first], classes[~first], start=summed(rows[first], classes[first]))
    whole = summed(rows, classes)
    assert merged.classes.tolist() == whole.classes.tolist()
    assert merged.counts.tolist() == whole.counts.tolist()
    torch.testing.assert_close(merged.means, whole.means, rtol=1e-5, atol=1e-6)
    scatter = [summary.scatter.double().T @ summary.scatter.double() for summary in (merged, whole)]
    torch.testing.assert_close(*scatter, rtol=1e-4, atol=1e-4)
    assert float(merged.energy) == pytest.approx(float(whole.energy), rel=1e-5)


def test_a_summary_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least one sample"):
        summed(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def by_hand(data: list[tuple[Tensor, Tensor]], asked: Tensor) -> np.ndarray:
    """The score from all rows, in float64, through the covariance itself."""
    whole = sum(scatter_of(*of_task) for of_task in data)
    parts = [(rows[classes == c].double().numpy()) for rows, classes in data for c in classes.unique()]
    counts, means = np.array([len(part) for part in parts]), np.stack([part.mean(0) for part in parts])
    freedom, centre = counts.sum() - len(counts), means.mean(0)
    covariance = (whole + np.eye(WIDTH) * 0.5 * np.trace(whole) / WIDTH) / freedom
    inverse = np.linalg.inv(covariance)
    dimensions = np.trace(inverse @ whole / freedom)
    offsets = means - centre
    lengths = np.einsum("ci,ij,cj->c", offsets, inverse, offsets)
    apart = np.maximum(lengths - dimensions / counts, 0).mean()
    drawn_to = counts / (counts + dimensions / apart)
    means = centre + drawn_to[:, None] * offsets
    away = asked.double().numpy()[:, None] - means
    distances = np.einsum("nci,ij,ncj->nc", away, inverse, away)
    likelihoods = -(distances - drawn_to**2 * dimensions / counts) / 2
    sizes = [len(classes.unique()) for _, classes in data]
    tasks = np.split(likelihoods, np.cumsum(sizes)[:-1], axis=1)
    return np.stack([-2 * (np.logaddexp.reduce(of, axis=1) - np.log(of.shape[1])) for of in tasks], axis=1)


@pytest.mark.parametrize("counts", [(60, 60, 60), (8, 90, 30), (14, 14, 14)])
def test_it_is_the_distance_under_the_pooled_covariance(counts: tuple[int, ...]) -> None:
    """Up to a term a sample; through more directions than features, and through fewer."""
    data = [drawn(task, count, num_classes=2 + task % 2) for task, count in enumerate(counts)]
    asked, _ = drawn(1, 25)
    found = SharedStack([summed(*of_task) for of_task in data]).errors(asked).double().numpy()
    wanted = by_hand(data, asked)
    difference = found - wanted
    # float32 weights and sums over 40 features of distances of a few hundreds.
    np.testing.assert_allclose(difference - difference[:, :1], 0, atol=5e-3)


def test_it_routes_better_than_the_nearest_mean_and_small_tasks_do_not_lose() -> None:
    counts = (400, 24, 400, 24, 400)
    stack = SharedStack([summed(*drawn(task, count)) for task, count in enumerate(counts)])
    accuracy = []
    for task in range(5):
        asked, _ = drawn(task, 424)
        accuracy.append(float((stack.errors(asked[-200:]).argmin(1) == task).double().mean()))
    assert min(accuracy) > 0.9, accuracy


def test_the_order_of_rows_of_the_gate_is_that_of_the_summaries() -> None:
    summaries = [summed(*drawn(task, 50)) for task in range(3)]
    asked, _ = drawn(2, 9)
    errors = SharedStack(summaries).errors(asked)
    # Sums in another order: float32 rounding of a few hundreds.
    torch.testing.assert_close(SharedStack(summaries[::-1]).errors(asked).flip(1), errors, rtol=0, atol=5e-3)


def test_tasks_without_any_variation_still_part() -> None:
    summaries = [summed(torch.full((4, 3), value), torch.zeros(4, dtype=torch.int64)) for value in (0.2, 0.8)]
    errors = SharedStack(summaries).errors(torch.tensor([[0.25, 0.25, 0.25], [0.7, 0.7, 0.7]]))
    assert bool(errors.isfinite().all())
    assert errors.argmin(1).tolist() == [0, 1]


def test_one_image_a_task_and_one_task_alone_answer() -> None:
    for counts in ((1, 1, 1), (1,), (1, 300)):
        summaries = [summed(*drawn(task, count)) for task, count in enumerate(counts)]
        assert bool(SharedStack(summaries).errors(drawn(0, 5)[0]).isfinite().all())


def test_the_directions_of_many_tasks_stay_below_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_rows(1000, 11520) * 1000 * 11520 * 4 <= shared_score.MOST_BYTES
    assert kept_rows(10**6, 11520) == 1
    summaries = [summed(*drawn(task, 60)) for task in range(4)]
    most = 4 * 4 * WIDTH * 5
    whole, cut = SharedStack(summaries, most), SharedStack([summary.cut(5) for summary in summaries], most)
    asked, _ = drawn(0, 7)
    assert torch.equal(whole.errors(asked), cut.errors(asked))
