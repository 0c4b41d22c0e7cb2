"""The shared score behind a strategy: the same routing from every engine and after every turn of a run's life."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.errors import ResumeError
from distributed_eg.method.calibration import HeldOut, calibrate
from distributed_eg.method.gate import Routing
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import load_tensors
from distributed_eg.types import AutoencoderKind
from tests.helpers import SETTINGS, SHAPE, content, hashes, tiny_benchmark, tiny_net, tiny_strategy
from tests.inside import registry_of

DOMAINS = (0, 1, 0, 2)
BENCHMARK = tiny_benchmark(DOMAINS)
IMAGES = torch.cat([torch.stack([e.dataset[i][0] for i in range(6)]) for e in BENCHMARK.test_stream])


def strategy_over(storage: Path | None, kind: AutoencoderKind = "linear", **settings: Any) -> ExpertGateStrategy:
    engine, resume = settings.pop("engine", "inline"), settings.pop("resume", False)
    workers = settings.pop("num_workers", "auto")
    score = settings.pop("gate_score", "shared")
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder=kind, gate_score=score)
    place = None if storage is None else str(storage)
    cluster = ClusterConfig(engine=engine, storage=place, resume=resume, num_workers=workers)
    return tiny_strategy(cluster, model=model, **SETTINGS, **settings)


def assert_equal(one: Routing, other: Routing) -> None:
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right)


@pytest.fixture(scope="module", params=["linear", "sgd"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Routing]:
    storage = tmp_path_factory.mktemp("shared") / "run"
    with strategy_over(storage, request.param) as strategy:
        strategy.train(BENCHMARK.train_stream)
        return storage, request.param, strategy.model.gate(IMAGES)


def accuracy(routing: Routing) -> float:
    """Tasks 0 and 2 show the same pattern."""
    right = torch.tensor(DOMAINS)[routing.tasks] == torch.tensor(DOMAINS).repeat_interleave(6)
    return float(right.double().mean())


def test_it_routes_by_the_shared_score(finished: tuple[Path, str, Routing]) -> None:
    storage, kind, routing = finished
    assert accuracy(routing) == 1.0
    assert torch.equal(routing.tasks, routing.errors.argmin(1))
    with strategy_over(None, kind, gate_score="residual") as strategy:  # type: ignore[arg-type]
        strategy.train(BENCHMARK.train_stream)
        assert not torch.equal(strategy.model.gate(IMAGES).errors, routing.errors)
        mine = sorted(file.name for file in storage.rglob("autoencoder-*"))
        theirs = sorted(file.name for file in Path(strategy.run_dir or "").rglob("autoencoder-*"))
        # What is trained does not depend on what routes.
        assert mine == theirs
        assert not list(Path(strategy.run_dir or "").rglob("summary-*"))


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_workers_leave_the_same_bytes_and_route_alike(finished: Any, tmp_path: Path, num_workers: int) -> None:
    storage, kind, routing = finished
    with strategy_over(tmp_path / "run", kind, engine="ray", num_workers=num_workers) as strategy:
        strategy.train(BENCHMARK.train_stream)
        assert_equal(strategy.model.gate(IMAGES), routing)
        on_workers = strategy.eval(BENCHMARK.test_stream)
    assert content(tmp_path / "run") == content(storage)
    with strategy_over(storage, kind, resume=True) as inline:
        told = inline.eval(BENCHMARK.test_stream)
    names = [name for name in told if name.startswith(("Gate_Acc", "EndToEnd"))]
    assert [on_workers[name] for name in names] == [told[name] for name in names]


def test_one_task_after_the_other_gives_the_same_gate(finished: Any, tmp_path: Path) -> None:
    storage, kind, routing = finished
    for experience in BENCHMARK.train_stream:
        resume = "append" if (tmp_path / "run").exists() else False
        with strategy_over(tmp_path / "run", kind, resume=resume) as strategy:
            strategy.train(experience)
            last = strategy.model.gate(IMAGES)
    assert_equal(last, routing)
    assert hashes(strategy) == [(a, e) for a, e in hashes(strategy_over(storage, kind, resume=True))]


def test_loaded_copied_and_moved_it_is_the_same_gate(finished: Any) -> None:
    storage, kind, routing = finished
    loaded = ExpertGate.load(storage, arch=tiny_net())
    assert loaded.gate_score == "shared"
    assert_equal(loaded.gate(IMAGES), routing)
    buffer = io.BytesIO()
    torch.save(loaded.state_dict(), buffer)
    buffer.seek(0)
    other = ExpertGate(SHAPE, arch=tiny_net(3), autoencoder=kind)
    other.load_state_dict(torch.load(buffer))
    assert other.gate_score == "shared"
    assert_equal(other.gate(IMAGES), routing)
    assert_equal(loaded.to("cpu").gate(IMAGES), routing)


def test_without_a_task_and_with_it_again(finished: Any, tmp_path: Path) -> None:
    """A gate without task 1 is the one of a run that never had it; with it again, the one of before."""
    _, kind, routing = finished
    with strategy_over(tmp_path / "all", kind) as strategy:
        strategy.train(BENCHMARK.train_stream)
        strategy.retire(1)
        without: Tensor = strategy.model.gate(IMAGES).errors
        reloaded = ExpertGate.load(tmp_path / "all", arch=tiny_net()).gate(IMAGES).errors
        assert without.shape == (len(IMAGES), 3)
        assert torch.equal(without, reloaded)
        assert not torch.equal(without, routing.errors[:, [0, 2, 3]])  # the metric is another one without it
        strategy.restore(1)
        assert_equal(strategy.model.gate(IMAGES), routing)


def test_a_task_that_comes_again_is_told_from_all_its_images(tmp_path: Path) -> None:
    with strategy_over(tmp_path / "run") as strategy:
        strategy.train(BENCHMARK.train_stream)
        strategy.update(tiny_benchmark(DOMAINS, train=40).train_stream[1])
        gate = strategy._driver._reader._gate  # type: ignore[union-attr]
        assert gate is not None
        assert int(gate[1].summaries[1].counts.sum()) == 90  # nine tenths of 60 and 40
        assert accuracy(strategy.model.gate(IMAGES)) == 1.0


def test_a_run_goes_on_with_its_own_score_only(finished: Any) -> None:
    storage, kind, _ = finished
    with pytest.raises(ResumeError, match="gate_score"):
        strategy_over(storage, kind, resume=True, gate_score="residual").eval(BENCHMARK.test_stream)


@pytest.mark.parametrize("name", ["summary", "held-out"])
def test_a_damaged_summary_is_made_again(finished: Any, tmp_path: Path, name: str) -> None:
    _, kind, routing = finished
    with strategy_over(tmp_path / "run", kind) as strategy:
        strategy.train(BENCHMARK.train_stream)
    whole = content(tmp_path / "run")
    (file,) = (tmp_path / "run" / "tasks" / "00001").glob(f"{name}-*")
    file.write_bytes(file.read_bytes()[:-3] + b"xyz")
    with strategy_over(tmp_path / "run", kind, resume=True) as strategy:
        strategy.train(BENCHMARK.train_stream)
        assert_equal(strategy.model.gate(IMAGES), routing)
    assert content(tmp_path / "run") == whole


@pytest.mark.parametrize("score", ["residual", "shared"])
def test_confidences_are_of_the_fitted_temperature_and_what_is_given_wins(score: str) -> None:
    with strategy_over(None, gate_score=score) as strategy:
        strategy.train(BENCHMARK.train_stream)
        model = strategy.model
        assert model.calibration is not None
        routing, temp = model.gate(IMAGES), model.calibration.temp
        assert torch.equal(routing.confidences, torch.softmax(-routing.errors / temp, dim=1))
        assert model.calibration.error is not None
        assert sum(count for count, _, _ in model.calibration.bins) == 18  # six of each task but the first
    with strategy_over(None, gate_score=score, temp=3.0) as strategy:
        strategy.train(BENCHMARK.train_stream)
        model = strategy.model
        assert torch.equal(model.gate(IMAGES).confidences, torch.softmax(-routing.errors / 3.0, dim=1))


def test_the_temperature_is_fitted_to_what_the_newest_version_of_each_task_held_out() -> None:
    """By all of them, by none that was replaced, and by errors of the score that routes."""
    tables: dict[str, list[HeldOut]] = {}
    for score in ("residual", "shared"):
        with strategy_over(None, gate_score=score) as strategy:
            strategy.train(BENCHMARK.train_stream)
            strategy.update(tiny_benchmark(DOMAINS, train=90).train_stream[1])
            registry, storage = registry_of(strategy), Storage(strategy.run_dir or "")
            newest = [manifest.task for _, manifest in sorted(registry.newest.items())]
            assert newest[1] == 4
            sealed = [registry.relatedness[task].held_out for task in newest]
            tables[score] = [HeldOut(**load_tensors(storage, artifact)) for artifact in sealed if artifact is not None]
            assert strategy.model.calibration == calibrate(tables[score], None)
    assert len(tables["shared"]) == 4
    assert not torch.equal(tables["shared"][3].losses, tables["residual"][3].losses)
