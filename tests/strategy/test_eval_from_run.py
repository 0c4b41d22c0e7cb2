"""A run that another process trained is evaluated before anything is trained here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.config import Resume
from distributed_eg.errors import DamagedFileError, ResumeError, StorageError
from tests.helpers import DOMAINS, SETTINGS, hashes, outcome, tiny_benchmark, tiny_net, tiny_strategy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run, and what its own process measured."""
    storage, benchmark = tmp_path_factory.mktemp("finished") / "run", tiny_benchmark(DOMAINS)
    with tiny_strategy(ClusterConfig(engine="inline", storage=str(storage)), **SETTINGS) as strategy:
        strategy.train(benchmark.train_stream)
        return storage, outcome(strategy, strategy.eval(benchmark.test_stream))


def opened(storage: Path, resume: Resume, engine: Any = "inline", **settings: Any) -> ExpertGateStrategy:
    """A strategy over what the storage holds."""
    cluster = ClusterConfig(engine=engine, storage=str(storage), resume=resume)
    return tiny_strategy(cluster, **{**SETTINGS, **settings})


def finite(measured: dict[str, Any]) -> dict[str, Any]:
    """Without the positions of steps, which count what this process did."""
    return measured | {"metrics": {name: value for name, value in measured["metrics"].items() if "eval_phase" in name}}


@pytest.mark.parametrize("resume", [True, "append"])
@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_it_answers_as_in_the_process_that_trained_it(finished: Any, resume: Resume, engine: str) -> None:
    storage, measured = finished
    benchmark = tiny_benchmark(DOMAINS)
    with opened(storage, resume, engine) as strategy:
        assert finite(outcome(strategy, strategy.eval(benchmark.test_stream))) == finite(measured)
        images = torch.stack([benchmark.test_stream[2].dataset[i][0] for i in range(8)])
        assert torch.equal(strategy.model(images), ExpertGate.load(storage, arch=tiny_net())(images))


@pytest.mark.parametrize("resume", [True, "append"])
def test_its_tables_are_there_before_it_is_opened(finished: Any, tmp_path: Path, resume: Resume) -> None:
    storage, measured = finished
    with opened(storage, resume) as strategy:
        registry, relatedness = strategy.registry.drop_columns(["train_s", "worker"]), strategy.relatedness
    assert registry.to_pylist() == measured["registry"]
    assert relatedness.to_pylist() == measured["relatedness"]
    with opened(tmp_path / "none", resume) as strategy:
        assert len(strategy.registry) == len(strategy.relatedness) == 0


def test_other_ways_of_training_do_not_matter(finished: Any) -> None:
    storage, measured = finished
    with opened(storage, True, train_epochs=7, train_mb_size=3, plugins=[]) as strategy:
        assert finite(outcome(strategy, strategy.eval(tiny_benchmark(DOMAINS).test_stream))) == finite(measured)


def test_training_goes_on_after_it(finished: Any, tmp_path: Path) -> None:
    storage, measured = Path(shutil.copytree(finished[0], tmp_path / "run")), finished[1]
    benchmark = tiny_benchmark(DOMAINS)
    for resume, given in ((True, benchmark.train_stream), ("append", tiny_benchmark((0, 1, 0, 2, 5)).train_stream[4])):
        with opened(storage, resume) as strategy:
            strategy.eval(benchmark.test_stream)
            strategy.train(given)
            assert hashes(strategy)[:4] == [
                (row["autoencoder_sha256"], row["expert_sha256"]) for row in measured["registry"]
            ]
            assert len(hashes(strategy)) == (4 if resume is True else 5)


def test_a_loaded_model_drives_it(finished: Any) -> None:
    storage, measured = finished
    with opened(storage, "append", model=ExpertGate.load(storage, arch=tiny_net())) as strategy:
        metrics = strategy.eval(tiny_benchmark(DOMAINS).test_stream)
    assert {name: metrics[name] for name in measured["metrics"] if "eval_phase" in name} == {
        name: value for name, value in measured["metrics"].items() if "eval_phase" in name
    }


@pytest.mark.parametrize("resume", [True, "append"])
def test_where_there_is_no_run_it_says_so(tmp_path: Path, resume: Resume) -> None:
    with opened(tmp_path / "none", resume) as strategy, pytest.raises(StorageError, match=r"no run at .* train first"):
        strategy.eval(tiny_benchmark().test_stream)
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_without_a_finished_task_says_so(tmp_path: Path) -> None:
    class Failing(ExpertGateStrategy):
        def training_epoch(self, **kwargs: Any) -> None:
            raise OSError("no such luck")

    with opened(tmp_path / "run", "append", cls=Failing) as strategy, pytest.raises(Exception, match="no such luck"):
        strategy.train(tiny_benchmark((0,)).train_stream)
    for resume in (True, "append"):
        with opened(tmp_path / "run", resume) as strategy, pytest.raises(StorageError, match="no finished task"):
            strategy.eval(tiny_benchmark().test_stream)


def test_what_cannot_answer_is_refused(finished: Any, tmp_path: Path) -> None:
    storage = Path(shutil.copytree(finished[0], tmp_path / "run"))
    with opened(storage, True, temp=3.0) as strategy, pytest.raises(ResumeError, match=r"method\.temp"):
        strategy.eval(tiny_benchmark().test_stream)
    manifest = storage / "tasks/00001/manifest.json"
    manifest.write_text("{")
    with opened(storage, True) as strategy, pytest.raises(DamagedFileError, match="00001/manifest"):
        strategy.eval(tiny_benchmark().test_stream)
