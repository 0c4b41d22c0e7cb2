"""What every test of the method runs under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One torch thread, as the stages have by default: another number gives other bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def random_state_untouched() -> Iterator[None]:
    """No function of the method draws from, or seeds, the caller's global generator."""
    saved = torch.get_rng_state()
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    yield
    after = torch.get_rng_state()
    torch.set_rng_state(saved)
    assert torch.equal(after, before), "the caller's torch random state was touched"
