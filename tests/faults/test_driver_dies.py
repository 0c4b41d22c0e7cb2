"""The driver dies by SIGKILL, before and after everything that it seals; whoever resumes ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed_eg.store.storage import TEMPORARY, Storage
from distributed_eg.store.verification import unnamed, verify
from tests.faults import drivers
from tests.faults.chaos import Chaos, Fault
from tests.faults.conftest import train
from tests.helpers import content
from tests.strategy.test_life import begun, life, live


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run leaves."""
    storage = tmp_path_factory.mktemp("whole") / "run"
    train(storage)
    return content(storage)


LONG = pytest.mark.long


@pytest.mark.parametrize("when", [pytest.param("before", marks=LONG), "inside", pytest.param("after", marks=LONG)])
def test_killed_at_every_seal_and_resumed(tmp_path: Path, chaos: Chaos, whole: dict[str, bytes], when: str) -> None:
    """The driver is killed at the first thing that it seals; the next one at its second; and so on, over one run
    directory, until one comes to the end. What one sealed is never made again in another way."""
    storage = tmp_path / "run"
    num_killed = 0
    while True:
        chaos.plan(Fault(f"{when} seal *", "kill", nth=1 + num_killed % 12))
        if (code := drivers.run(train, storage, chaos=chaos.folder)) == 0:
            break
        assert code == -9
        num_killed += 1
        assert num_killed < 90
        assert [d for d in verify(Storage(str(storage))).damages if not d.path.startswith("run.json")] == []
    assert num_killed >= 10
    chaos.clear()
    train(storage)
    assert content(storage) == whole
    assert verify(Storage(str(storage))).damages == ()
    assert unnamed(Storage(str(storage))) == []
    assert not list(storage.rglob(f"*{TEMPORARY}*"))


@pytest.mark.parametrize("when", ["inside", pytest.param("after", marks=LONG)])
def test_killed_in_an_append_a_retire_an_update(tmp_path: Path, chaos: Chaos, when: str) -> None:
    """As above, with each call of a run's life; each process knows of the run what its directory holds."""
    begun(tmp_path / "whole")
    begun(tmp_path / "run")
    num_killed = 0
    for number, call in enumerate(life(tmp_path / "whole")):
        chaos.clear()
        call()
        # Once stream.json is there the call has ended, and to give it again would be another one.
        pattern = f"{when} seal [!s]*" if when == "after" else f"{when} seal *"
        for nth in range(1, 40):
            chaos.plan(Fault(pattern, "kill", nth=nth))
            if (code := drivers.run(live, tmp_path / "run", number, chaos=chaos.folder)) == 0:
                break
            assert code == -9
            num_killed += 1
            assert verify(Storage(str(tmp_path / "run"))).damages == ()
        assert content(tmp_path / "run") == content(tmp_path / "whole"), number
    assert num_killed >= 15
    assert unnamed(Storage(str(tmp_path / "run"))) == []
    assert not list((tmp_path / "run").rglob(f"*{TEMPORARY}*"))
