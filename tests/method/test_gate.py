"""The gate: each sample by itself, and what the answers of the experts add up to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distributed_eg.method.autoencoder import Autoencoder
from distributed_eg.method.gate import ABSENT_LOG_PROBABILITY, Expert, Gate, Routing, combine_experts, make_gate
from distributed_eg.method.linear_autoencoder import LinearAutoencoder
from distributed_eg.method.sgd_autoencoder import SgdAutoencoder
from distributed_eg.method.standardize import Statistics
from tests.method.helpers import fitted_linear, float64, subspace_rows

WIDTH = 60
STATISTICS = Statistics(torch.linspace(-1, 1, WIDTH), torch.linspace(0.5, 2, WIDTH), 100)


def raw(z: Tensor) -> Tensor:
    """Features as a backbone would give them, whose standardized values are ``z``."""
    return torch.logit(z.double(), eps=1e-6).float() * STATISTICS.std + STATISTICS.mean


def task_features(domain: int, count: int, seed: int) -> Tensor:
    return raw(subspace_rows(count, WIDTH, domain=domain, seed=seed))


def linear_gate(
    tasks: Sequence[int] = (0, 1, 2), threshold: float | None = None, temp: float = 2.0, rank: int = 8
) -> Gate:
    """A gate over autoencoders of the domains that the tasks are called after."""
    fitted = {task: fitted_linear(subspace_rows(120, WIDTH, domain=task, seed=0), rank) for task in tasks}
    return make_gate(fitted, STATISTICS, temp, threshold)


def point(*coordinates: float) -> LinearAutoencoder:
    """An autoencoder of rank 0: its error is the squared distance to a point."""
    return LinearAutoencoder(
        torch.zeros(0, len(coordinates)), torch.zeros(0), torch.tensor(coordinates), torch.tensor(1)
    )


def test_each_sample_of_a_mixed_batch_is_routed_by_itself() -> None:
    """One sample of task 1 among many of task 2, as where the reference summed errors over the batch."""
    domains = [2, 2, 2, 0, 2, 2, 1, 2, 2, 2, 2, 2]
    batch = torch.cat([task_features(domain, 1, seed=10 + i) for i, domain in enumerate(domains)])
    routing = linear_gate().route(batch)
    assert routing.tasks.tolist() == domains
    assert routing.tasks.dtype == torch.int64
    assert routing.confidences.shape == routing.errors.shape == (12, 3)


@pytest.mark.parametrize("kind", ["linear", "sgd"])
def test_a_samples_row_does_not_depend_on_the_others(kind: str) -> None:
    gate = linear_gate() if kind == "linear" else _random_sgd_gate()
    batch = torch.cat([task_features(domain, 3, seed=5) for domain in (0, 1, 2)])
    together = gate.route(batch)
    order = [8, 0, 4, 2, 6, 1, 3, 7, 5]
    shuffled = gate.route(batch[order])
    assert torch.equal(shuffled.tasks, together.tasks[order])
    for i in range(9):
        alone = gate.route(batch[i : i + 1])
        assert torch.equal(alone.tasks[0], together.tasks[i])
        # A product with another number of rows rounds differently in float32: squares up to 30, no more than that.
        torch.testing.assert_close(alone.errors[0], together.errors[i], rtol=1e-5, atol=5e-5)
        torch.testing.assert_close(alone.confidences[0], together.confidences[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shuffled.errors[i], together.errors[order[i]], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("temp", [0.5, 2.0, 10.0])
def test_confidences_are_the_softmax_of_errors_over_temperature(temp: float) -> None:
    """Everything from raw features to confidences, in float64."""
    gate = linear_gate(temp=temp)
    batch = torch.cat([task_features(domain, 2, seed=5) for domain in (0, 1, 2)])
    routing = gate.route(batch)
    z = 1 / (1 + np.exp(-(float64(batch) - float64(STATISTICS.mean)) / float64(STATISTICS.std)))
    errors = np.zeros((6, 3))
    for column, autoencoder in enumerate(gate.autoencoders):
        assert isinstance(autoencoder, LinearAutoencoder)
        centred = z - float64(autoencoder.mean)
        components = float64(autoencoder.components)
        errors[:, column] = ((centred - centred @ components.T @ components) ** 2).sum(1)
    # Differences of float32 squares up to 20; the softmax turns errors of 1e-4 into 1e-4 / temp.
    np.testing.assert_allclose(float64(routing.errors), errors, rtol=1e-5, atol=1e-4)
    powers = np.exp(-(errors - errors.min(1, keepdims=True)) / temp)
    np.testing.assert_allclose(float64(routing.confidences), powers / powers.sum(1, keepdims=True), atol=5e-4)
    np.testing.assert_allclose(float64(routing.confidences).sum(1), 1, atol=1e-6)


def test_large_errors_still_route_to_the_least() -> None:
    """At 40,000 features softmax(−er / 2) is 0 or 1 in float32, and several columns round to the same."""
    gate = make_gate({0: point(900.0), 1: point(300.0), 2: point(200.0), 3: point(201.0)}, _identity(), 2.0, None)
    routing = gate.route(torch.zeros(3, 1))
    assert routing.tasks.tolist() == [2, 2, 2]
    assert bool(torch.isfinite(routing.confidences).all())


def test_tasks_come_back_under_their_own_numbers() -> None:
    """Gaps, and an order of training that is not ascending."""
    fitted = {task: fitted_linear(subspace_rows(120, WIDTH, domain=task, seed=0), 8) for task in (7, 0, 3)}
    gate = make_gate(fitted, STATISTICS, 2.0, None)
    assert gate.tasks == (0, 3, 7)
    batch = torch.cat([task_features(domain, 2, seed=5) for domain in (3, 7, 0)])
    assert gate.route(batch).tasks.tolist() == [3, 3, 7, 7, 0, 0]


def test_a_single_task_gets_every_sample() -> None:
    routing = linear_gate(tasks=(4,)).route(task_features(1, 3, seed=0))
    assert routing.tasks.tolist() == [4, 4, 4]
    assert routing.confidences.tolist() == [[1.0]] * 3


def test_an_empty_batch_is_routed_nowhere() -> None:
    routing = linear_gate().route(torch.zeros(0, WIDTH))
    assert routing.tasks.shape == (0,)
    assert routing.confidences.shape == (0, 3)
    assert linear_gate().answering(routing) == {}


def test_routing_changes_no_feature() -> None:
    batch = task_features(1, 4, seed=0)
    before = batch.clone()
    gate = linear_gate()
    first, second = gate.route(batch), gate.route(batch)
    assert torch.equal(batch, before)
    assert torch.equal(first.errors, second.errors)


def routed(confidences: list[list[float]], tasks: Sequence[int] = (0, 1, 2)) -> Routing:
    table = torch.tensor(confidences)
    return Routing(torch.tensor(tasks)[table.argmax(1)], table, -2 * table.log(), torch.zeros(len(table)))


def test_without_a_threshold_the_chosen_expert_answers_alone() -> None:
    gate = linear_gate(tasks=(0, 4, 9))
    weights = gate.answering(routed([[0.5, 0.4, 0.1], [0.3, 0.6, 0.1]], tasks=(0, 4, 9)))
    assert {task: weight.tolist() for task, weight in weights.items()} == {0: [1.0, 0.0], 4: [0.0, 1.0]}


def test_with_a_threshold_every_confident_expert_answers_by_its_confidence() -> None:
    """Second sample: nobody reaches 0.45, and the most confident one answers. Third: exactly on the threshold."""
    gate = linear_gate(threshold=0.45)
    weights = gate.answering(routed([[0.5, 0.45, 0.05], [0.4, 0.3, 0.3], [0.0, 0.55, 0.45]]))
    table = torch.stack([weights[task] for task in (0, 1, 2)], dim=1)
    expected = [[0.5 / 0.95, 0.45 / 0.95, 0.0], [1.0, 0.0, 0.0], [0.0, 0.55, 0.45]]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=1e-6, atol=0)


def test_an_expert_that_answers_for_no_sample_is_left_out() -> None:
    """It need not even be loaded."""
    gate = linear_gate(threshold=0.3)
    assert set(gate.answering(routed([[0.6, 0.39, 0.01], [0.9, 0.05, 0.05]]))) == {0, 1}


class Fixed(nn.Module):
    """An expert that answers with given logits, by the first pixel of the image, and notes what it was asked."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.asked: list[list[int]] = []

    def forward(self, images: Tensor) -> Tensor:
        numbers = images[:, 0, 0, 0].long()
        self.asked.append(numbers.tolist())
        return self.logits[numbers]


def numbered_images(count: int) -> Tensor:
    return torch.arange(float(count))[:, None, None, None].expand(count, 3, 4, 4).clone()


def loader(experts: dict[int, Expert]) -> tuple[Callable[[int], Expert], list[int]]:
    loaded: list[int] = []

    def expert_of(task: int) -> Expert:
        loaded.append(task)
        return experts[task]

    return expert_of, loaded


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


LOGITS = {0: [[1.0, -2.0], [0.0, 3.0], [2.0, 2.5]], 5: [[0.3, 0.1, -4.0], [-1.0, 2.0, 0.0], [5.0, 1.0, 0.0]]}


def test_each_expert_answers_for_its_own_samples_at_its_own_classes() -> None:
    first, second = Fixed(LOGITS[0]), Fixed(LOGITS[5])
    expert_of, loaded = loader({0: Expert(first, (1, 6)), 5: Expert(second, (0, 3, 8))})
    weights = {0: torch.tensor([1.0, 0.0, 1.0]), 5: torch.tensor([0.0, 1.0, 0.0])}
    output = combine_experts(numbered_images(3), weights, expert_of, width=10)
    assert first.asked == [[0, 2]]
    assert second.asked == [[1]]
    assert sorted(loaded) == [0, 5]
    expected = np.full((3, 10), math.log(1e-7))
    for sample, task, classes in ((0, 0, [1, 6]), (1, 5, [0, 3, 8]), (2, 0, [1, 6])):
        expected[sample, classes] = np.log(softmax(LOGITS[task][sample]))
    # float32 logarithms of float32 probabilities.
    np.testing.assert_allclose(float64(output), expected, rtol=1e-5, atol=1e-6)


def test_several_experts_weight_class_probabilities() -> None:
    """Sample 0: 0.7 of one and 0.3 of the other, which share class 3."""
    expert_of, _ = loader({0: Expert(Fixed(LOGITS[0]), (1, 3)), 5: Expert(Fixed(LOGITS[5]), (0, 3, 4))})
    weights = {0: torch.tensor([0.7, 1.0]), 5: torch.tensor([0.3, 0.0])}
    output = combine_experts(numbered_images(2), weights, expert_of, width=5).exp()
    one, other = softmax(LOGITS[0][0]), softmax(LOGITS[5][0])
    expected = [0.3 * other[0], 0.7 * one[0], 0.0, 0.7 * one[1] + 0.3 * other[1], 0.3 * other[2]]
    # 1e-7 stands for zero.
    np.testing.assert_allclose(float64(output[0]), expected, rtol=1e-5, atol=2e-7)
    alone = softmax(LOGITS[0][1])
    np.testing.assert_allclose(float64(output[1]), [0, alone[0], 0, alone[1], 0], rtol=1e-5, atol=2e-7)


def test_the_gate_and_its_experts_together() -> None:
    """With a threshold of 0.1 the weights that the gate gives are those of its confidences."""
    points = make_gate({0: point(0.2), 1: point(0.8)}, _identity(), 0.5, 0.1)
    features = torch.logit(torch.tensor([[0.2], [0.45]]).double()).float()
    weights = points.answering(points.route(features))
    expert_of, _ = loader({0: Expert(Fixed(LOGITS[0]), (0, 1)), 1: Expert(Fixed(LOGITS[5]), (2, 3, 4))})
    output = combine_experts(numbered_images(2), weights, expert_of, width=5).exp()
    for sample, z in enumerate((0.2, 0.45)):
        powers = [math.exp(-((z - centre) ** 2) / 0.5) for centre in (0.2, 0.8)]
        first, second = (power / sum(powers) for power in powers)
        expected = [first * p for p in softmax(LOGITS[0][sample])] + [second * p for p in softmax(LOGITS[5][sample])]
        np.testing.assert_allclose(float64(output[sample]), expected, rtol=1e-4)


@pytest.mark.parametrize("confident", [1.0, 40.0, 4000.0])
def test_log_probabilities_are_finite_and_add_up_to_one(confident: float) -> None:
    """An expert so sure that its other classes' probabilities are 0 in float32; a width of 1000."""
    expert = Expert(Fixed([[confident, 0.0, -confident]]), (2, 500, 999))
    expert_of, _ = loader({0: expert})
    output = combine_experts(numbered_images(1), {0: torch.ones(1)}, expert_of, width=1000)
    assert output.shape == (1, 1000)
    assert output.dtype == torch.float32
    assert bool(torch.isfinite(output).all())
    assert float(output.max()) <= 0
    # Each of the 997 absent classes adds the 1e-7 that it is floored at: 1e-4, and float32 rounding.
    assert float(output.double().exp().sum()) == pytest.approx(1, abs=1.1e-4)
    assert float(output.min()) == pytest.approx(math.log(1e-7), rel=1e-6)


def test_floor_is_the_logarithm_of_a_ten_millionth() -> None:
    assert pytest.approx(math.log(1e-7), rel=1e-12) == ABSENT_LOG_PROBABILITY


def test_half_precision_answers_are_combined_in_float32() -> None:
    network = Fixed(LOGITS[0])
    network.logits = network.logits.half()
    expert_of, _ = loader({0: Expert(network, (0, 1))})
    output = combine_experts(numbered_images(3), {0: torch.ones(3)}, expert_of, width=2)
    assert output.dtype == torch.float32
    np.testing.assert_allclose(float64(output.exp()).sum(1), 1, atol=1e-6)


def _identity() -> Statistics:
    return Statistics(torch.zeros(1), torch.ones(1), 10)


def _random_sgd_gate() -> Gate:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) * 0.3

    fitted: dict[int, Autoencoder] = {
        task: SgdAutoencoder(draw(9, WIDTH), draw(9), draw(WIDTH, 9), draw(WIDTH)) for task in range(3)
    }
    return make_gate(fitted, STATISTICS, 2.0, None)
