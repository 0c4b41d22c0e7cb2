"""`reproducible`: what runs inside depends on the seed only, and the caller notices nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from distributed_eg.runtime.determinism import reproducible


def state() -> tuple[Any, ...]:
    """Everything that must be as before."""
    name, keys, *rest = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        (name, np.asarray(keys).tolist(), *rest),
        random.getstate(),
        torch.get_num_threads(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


def draw() -> tuple[list[float], list[float], list[float]]:
    """Some numbers from each generator."""
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


@pytest.fixture(autouse=True)
def _unusual_caller() -> Iterator[None]:
    """A caller whose settings are none of the defaults; all put back for the other tests."""
    threads = torch.get_num_threads()
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.set_num_threads(2)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    draw()
    np.random.standard_normal()  # leaves a cached second value in the state
    random.gauss(0, 1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags


@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**63 - 1])
def test_every_generator_starts_from_the_seed(seed: int) -> None:
    with reproducible(seed, 1):
        first = draw()
    draw()
    with reproducible(seed, 1):
        assert draw() == first
    with reproducible(seed ^ 1, 1):
        other = draw()
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_kernels_are_the_runs_inside(threads: int) -> None:
    with reproducible(0, threads):
        assert torch.get_num_threads() == threads
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
    assert torch.get_num_threads() == 2


def test_the_caller_notices_nothing() -> None:
    before = state()
    with reproducible(5, 1):
        draw()
        torch.manual_seed(1)
        torch.set_num_threads(4)
        torch.backends.cudnn.benchmark = True
    assert state() == before


@pytest.mark.parametrize("error", [ValueError("diverged"), KeyboardInterrupt()], ids=repr)
def test_the_caller_notices_nothing_after_an_error_either(error: BaseException) -> None:

    def stage() -> None:
        with reproducible(5, 1):
            draw()
            raise error

    before = state()
    with pytest.raises(type(error)) as caught:
        stage()
    assert caught.value is error
    assert state() == before


def test_a_refused_number_of_threads_changes_nothing() -> None:
    before = state()
    with pytest.raises(RuntimeError), reproducible(5, 0):
        raise AssertionError("torch takes no 0 threads")
    assert state() == before


def test_what_the_caller_draws_is_the_same_with_and_without_a_stage_between() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = draw(), draw()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    first = draw()
    with reproducible(9, 1):
        draw()
    assert (first, draw()) == expected


def test_blocks_nest() -> None:
    with reproducible(1, 1):
        draw()
        expected = draw()
    with reproducible(1, 1):
        draw()
        with reproducible(2, 3):
            draw()
        assert torch.get_num_threads() == 1
        assert draw() == expected
