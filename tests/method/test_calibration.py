"""The temperature that is fitted makes confidences believable, and what it is fitted to is a small table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_eg.method.calibration import TEMPERATURES, calibrate, hold_out, quantiles_of
from distributed_eg.store.records import AutoencoderRecord
from distributed_eg.store.storage import Artifact


def errors_at(temp: float, count: int, tasks: int, seed: int) -> Tensor:
    """Errors whose own task, in column 0, is right as often as softmax(−errors / temp) says."""
    generator = torch.Generator().manual_seed(seed)
    errors = 3 * temp * torch.rand(count, tasks, generator=generator, dtype=torch.float64)
    own = torch.multinomial(torch.softmax(-errors / temp, dim=1), 1, generator=generator)
    first = errors[:, :1].clone()
    errors[:, :1] = errors.gather(1, own)
    return errors.scatter(1, torch.where(own == 0, 0, own), torch.where(own == 0, errors[:, :1], first))


@pytest.mark.parametrize("temp", [0.5, 2.0, 45.0, 3000.0])
def test_the_temperature_is_found_that_the_errors_were_drawn_at(temp: float) -> None:
    tables = [hold_out(errors[:, 0], errors[:, 1:]) for errors in [errors_at(temp, 4000, 5, 1)]]
    found = calibrate(tables, None)
    assert found.temp == pytest.approx(temp, rel=0.2)
    assert found.error is not None
    assert found.error < 0.02
    assert sum(count for count, _, _ in found.bins) == 4000


def test_images_that_are_all_right_do_not_ask_for_certainty() -> None:
    """Six that the gate finds by far say as much at any temperature up to where they become unsure."""
    table = hold_out(torch.zeros(6), torch.full((6, 1), 40.0))
    found = calibrate([table], None)
    assert found.temp == 2**3
    loss = float(table.losses[TEMPERATURES.index(found.temp)])
    assert 0.02 < loss <= 0.05
    many = hold_out(torch.zeros(600), torch.full((600, 1), 40.0))
    assert calibrate([many], None).temp < found.temp, "more images say more"


def test_tables_add_up_to_one_of_all_images() -> None:
    errors = errors_at(8.0, 300, 4, 2)
    parts = [hold_out(part[:, 0], part[:, 1:]) for part in errors.split(70)]
    whole = hold_out(errors[:, 0], errors[:, 1:])
    torch.testing.assert_close(torch.stack([part.losses for part in parts]).sum(0), whole.losses)
    torch.testing.assert_close(torch.stack([part.bins for part in parts]).sum(0), whole.bins, rtol=1e-5, atol=1e-4)


def test_a_first_task_says_nothing_and_without_anything_the_papers_temperature_is_taken() -> None:
    first = hold_out(torch.ones(9), torch.zeros(9, 0))
    assert calibrate([first], None).temp == 2.0
    assert calibrate([], None).temp == 2.0
    assert calibrate([first], None).error is None


def test_what_a_user_gives_wins() -> None:
    errors = errors_at(45.0, 500, 3, 3)
    table = hold_out(errors[:, 0], errors[:, 1:])
    given = calibrate([table], 2.0)
    assert given.temp == 2.0
    assert given.error is not None
    assert given.error > 0.05  # and is told how far it is off
    assert calibrate([table], 3.7).error is None


def test_limits_are_quantiles_of_the_own_errors() -> None:
    own = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double() * 100
    record = AutoencoderRecord(0, 0, "linear", Artifact("a", "b", 1), 9, quantiles=quantiles_of(own))
    for quantile in (0.0, 0.25, 0.99, 0.9975, 1.0):
        # Between levels it is a straight line.
        assert record.limit(quantile) == pytest.approx(np.quantile(own.numpy(), quantile), abs=0.1)


def test_a_table_is_small_whatever_the_number_of_tasks_and_images() -> None:
    errors = errors_at(8.0, 2000, 300, 4)
    table = hold_out(errors[:, 0], errors[:, 1:])
    assert sum(tensor.nbytes for tensor in table.tensors().values()) < 16_000
    assert len(table.losses) == len(TEMPERATURES)
