"""SIGTERM as an exception within a block, and nothing changed after it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from distributed_eg.runtime.signals import keeping_sigterm, raise_if_told, terminable, uninterrupted


@pytest.fixture(autouse=True)
def default() -> Iterator[None]:
    """Python's own handlers, whatever the suite's Ray has set."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_raises_within_the_block_and_the_default_comes_back() -> None:
    with pytest.raises(SystemExit) as stop, terminable():
        terminate()
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_whatever_code_a_library_makes_of_it() -> None:
    """Ray's calls pass a SystemExit on as another one."""

    def as_ray_does() -> None:
        try:
            terminate()
        except SystemExit:
            raise SystemExit(1) from None

    with pytest.raises(SystemExit) as stop, terminable():
        as_ray_does()
    assert stop.value.code == 143


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_what_somebody_swallowed_is_raised_again(number: int, raised: type[BaseException]) -> None:
    """Until the block has ended; a later block begins anew."""

    def work() -> None:
        raise_if_told()
        with pytest.raises(raised):
            os.kill(os.getpid(), number)
        raise_if_told()

    with pytest.raises(raised), terminable():
        work()
    with terminable():
        raise_if_told()
    raise_if_told()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exit_of_the_programs_own_is_left_alone() -> None:
    with pytest.raises(SystemExit) as stop, terminable():
        raise SystemExit(7)
    assert stop.value.code == 7


def test_a_handler_of_the_programs_own_is_left_alone() -> None:
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    with terminable():
        terminate()
    assert told == [signal.SIGTERM]


def test_another_thread_changes_nothing() -> None:
    handlers: list[object] = []

    def work() -> None:
        with terminable(), uninterrupted():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert handlers == [signal.SIG_DFL]


def test_what_ray_sets_within_the_block_does_not_last() -> None:
    """Its handler ends the process by another code; after the block SIGTERM still is an orderly exit."""
    with terminable():
        ours = signal.getsignal(signal.SIGTERM)
        with keeping_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init does
        assert signal.getsignal(signal.SIGTERM) is ours
    with pytest.raises(SystemExit) as stop:
        terminate()
    assert stop.value.code == 143
    with pytest.raises(SystemExit), terminable():
        terminate()


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_what_arrives_while_something_closes_waits_until_it_has(number: int, kind: type[BaseException]) -> None:
    closed: list[bool] = []

    def close() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        closed.append(True)

    with pytest.raises(kind), terminable(), uninterrupted():
        close()
    assert closed == [True]


def test_what_arrives_while_ray_starts_ends_with_the_same_code() -> None:
    """Its own handler, which it sets first, would make 15 of it."""

    def as_ray_init_does() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        terminate()

    with pytest.raises(SystemExit) as stop, terminable(), keeping_sigterm():
        as_ray_init_does()
    assert stop.value.code == 143
