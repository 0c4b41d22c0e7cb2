"""Who owns this process's Ray, over any order of coming, working, going and shutting down; here Ray is only played."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
import ray

from distributed_eg.config import ClusterConfig
from distributed_eg.errors import InputError
from distributed_eg.runtime.ray_backend import session as module
from distributed_eg.runtime.ray_backend.cluster import attach_or_start
from distributed_eg.runtime.ray_backend.session import Session


@dataclass
class PlayedRay:
    """The connection of a process: made by us or by the user, ended by either."""

    name: str = ""
    by_user: bool = False
    names: itertools.count[int] = field(default_factory=itertools.count)

    def connect(self, *, by_user: bool) -> None:
        self.name, self.by_user = f"connection-{next(self.names)}", by_user

    def attach_or_start(self, config: ClusterConfig, cpus: float) -> bool:
        if self.name:
            return False
        self.connect(by_user=False)
        return True

    def shutdown(self) -> None:
        assert not self.by_user, "a Ray that the user started was shut down by us"
        self.name = ""


@dataclass(eq=False)
class PlayedEngine:
    """As the engine: it holds workers from its start on, until it is closed."""

    session: Session
    workers: int = 0
    working: bool = False
    yields: int = 0

    def is_at_rest(self) -> bool:
        return not self.working

    def num_workers(self) -> int:
        return self.workers

    def give_way(self) -> None:
        assert not self.working
        self.workers, self.yields = 0, self.yields + 1

    def close(self) -> None:
        self.give_way()
        self.session.leave(self)

    def call(self, num_workers: int = 1) -> None:
        """Begin what a strategy is called for."""
        if not self.session.holds(self):
            self.workers = 0
            self.session.enter(self, ClusterConfig(), 1)
        self.session.works(self)
        self.working = True
        self.workers = num_workers


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedRay:
    ray = PlayedRay()
    monkeypatch.setattr(module, "attach_or_start", ray.attach_or_start)
    monkeypatch.setattr(module, "_connection", lambda: ray.name)
    monkeypatch.setattr(module.ray, "shutdown", ray.shutdown)
    return ray


STEPS = ("call", "call", "end", "end", "close", "room", "user init", "user shutdown")


@pytest.mark.parametrize("seed", range(100))
def test_ray_lives_while_somebody_uses_it_and_no_longer(played: PlayedRay, seed: int) -> None:
    draw = random.Random(seed)
    session = Session()
    engines = [PlayedEngine(session) for _ in range(4)]
    for what in draw.choices(STEPS, k=40):
        engine = draw.choice(engines)
        if what == "call":
            engine.call()
            assert session.holds(engine)
        elif what == "end":
            engine.working = False
        elif what == "close" and not engine.working:
            engine.close()
            assert not session.holds(engine)
        elif what == "room" and session.holds(engine):
            busy = [other for other in engines if other.working and other is not engine]
            engine.working = True
            session.make_room(engine, 99)
            assert all(other.workers for other in busy)
            assert session.holds(engine)
            assert not any(session.holds(other) and other.workers for other in engines if not other.working)
        elif what == "user init" and not played.name:
            played.connect(by_user=True)
        elif what == "user shutdown":
            played.name, played.by_user = "", False
        used = any(session.holds(engine) for engine in engines)
        if played.name and not played.by_user:
            assert used, "a Ray that was started here outlived its last user"
    for engine in engines:
        engine.working = False
        engine.close()
    assert played.name == "" or played.by_user


def test_who_worked_longest_ago_makes_room_first_and_no_more_than_needed(played: PlayedRay) -> None:
    session = Session()
    engines = [PlayedEngine(session) for _ in range(4)]
    first, needy = engines[0], engines[3]
    for engine in engines:
        engine.call(2)
        engine.working = engine is needy
    first.call(2)
    first.working = False  # it was used again since
    session.make_room(needy, 0)
    assert [engine.yields for engine in engines] == [0, 0, 0, 0]
    session.make_room(needy, 3)
    assert [engine.yields for engine in engines] == [0, 1, 1, 0]
    assert not session.others_work(needy)
    first.working = True
    assert session.others_work(needy)
    session.make_room(needy, 9)
    assert first.workers == 2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_an_attached_process_trains_on_no_other_cluster_than_was_named() -> None:
    assert not attach_or_start(ClusterConfig(address=ray.get_runtime_context().gcs_address), 1.0)
    with pytest.raises(InputError, match=r"'192\.0\.2\.1:6379', but this process is attached to the Ray cluster at"):
        attach_or_start(ClusterConfig(address="192.0.2.1:6379"), 1.0)
