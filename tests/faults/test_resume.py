"""A run is taken up by another driver: the same bytes, or a refusal that names every difference."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.evaluation.metrics import forgetting_metrics
from avalanche.training.plugins import EvaluationPlugin

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.errors import DamagedFileError, DivergedError, ResumeError, StorageError
from distributed_eg.store.records import seal
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Storage
from distributed_eg.store.verification import verify
from tests.faults.chaos import HARMS, Chaos, Fault
from tests.faults.conftest import train
from tests.helpers import SETTINGS, SHAPE, content, hashes, tiny_benchmark, tiny_net, tiny_strategy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three tasks that nothing disturbed."""
    storage = tmp_path_factory.mktemp("finished") / "run"
    train(storage)
    return storage


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("harm", HARMS)
def test_every_file_may_be_harmed(run: Path, finished: Path, harm: str) -> None:
    """One after the other: the stage that made it is run again, to the same bytes; but for run.json, which nobody can
    make again: it is refused by name, with what helps."""
    whole = content(finished)
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    assert len(files) > 20
    for file in files:
        HARMS[harm](file)
        name = file.relative_to(run).as_posix()
        if name == "run.json" and harm != "remove":
            with pytest.raises(DamagedFileError, match=r"run\.json.* from a copy of it"):
                train(run)
            shutil.copy(finished / name, file)
            continue
        train(run)
        assert content(run) == whole, name
        assert verify(Storage(str(run))).damages == (), name


def different_net() -> ExpertGate:
    return ExpertGate(SHAPE, arch=tiny_net(seed=7), autoencoder="linear")


class Tuned(ExpertGateStrategy):
    """A subclass with a setting of its own."""

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        self.alpha = 0.2


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ({"seed": 5}, ["method.seed: the run has 0, now 5"]),
        (
            {"train_epochs": 4, "temp": 3},
            ["method.temp: the run has None, now 3", "settings.train_epochs: .* 3, now 4"],
        ),
        ({"model": different_net}, [r"backbone\.root\.sha256: the run has '?[0-9a-f]{12}….*, now '?[0-9a-f]{12}…"]),
        ({"distillation_weight": 0.5}, [r"method\.distillation_weight: the run has 1\.0, now 0\.5"]),
        (
            {"cls": lambda: Tuned},
            ["settings.strategy.alpha: the run has nothing, now 0.2", r"strategy\.class: .*Tuned'"],
        ),
    ],
    ids=["seed", "two at once", "backbone", "weight", "subclass"],
)
def test_other_settings_are_refused_and_all_are_named(run: Path, overrides: dict[str, Any], lines: list[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file() and "sessions" not in path.parts}
    with pytest.raises(ResumeError) as caught:
        train(run, **{name: value() if callable(value) else value for name, value in overrides.items()})
    for line in lines:
        assert re.search(line, str(caught.value)), str(caught.value)
    assert {path: path.read_bytes() for path in before} == before


def test_other_data_are_refused_and_named(run: Path) -> None:
    """The second task's images are of another domain."""
    with pytest.raises(
        ResumeError, match=r"another task 1:\n  identity\.data\.samples: the run has [0-9a-f]{12}…, now"
    ):
        train(run, domains=(0, 2, 1))


def test_a_run_of_an_earlier_version_is_taken_up_by_what_its_records_know(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They tell data by all their content, and know no samples: the log says once that these are not compared."""

    def write(length: int) -> None:
        storage = Storage(str(run))
        for record in Registry.read(storage).arrivals.values():
            record.identity["data"].pop("samples", None)
            record.identity["data"] |= {"content": "0" * 64, "length": length}
            seal(storage, record)

    write(61)
    with pytest.raises(ResumeError, match=r"another task 0:\n  identity\.data\.length: the run has 61, now 60\n\S"):
        train(run)
    write(60)
    before = content(run)
    caplog.clear()
    longer = (0, 0, 1, 2)
    assert train(run, longer) == train(tmp_path / "fresh", longer)
    assert sum("begun by an earlier version" in record.message for record in caplog.records) == 1
    assert before.items() - content(run).items() <= {("stream.json", before["stream.json"])}  # one task more


def test_a_storage_with_a_run_is_not_taken_up_unasked(run: Path) -> None:
    cluster = ClusterConfig(engine="inline", storage=str(run))
    with tiny_strategy(cluster) as strategy, pytest.raises(StorageError, match="resume=True"):
        strategy.train(tiny_benchmark((0,)).train_stream)


def test_a_resume_that_fails_at_its_start_leaves_the_run_what_it_is(tmp_path: Path, chaos: Chaos) -> None:
    """The reference cannot be stored: run.json, which nobody can make again, stays."""
    first = tiny_strategy(ClusterConfig(engine="inline", storage=str(tmp_path / "first")))
    with first as strategy:
        strategy.train(tiny_benchmark((5,)).train_stream)
        strategy.save_reference(tmp_path / "reference.safetensors")
    storage, reference = tmp_path / "run", tmp_path / "reference.safetensors"
    expected = train(storage, reference=reference)
    before = content(storage) | {"run.json": (storage / "run.json").read_bytes()}
    chaos.plan(Fault("before seal statistics-*", "full"))
    with pytest.raises(StorageError, match="No space left"):
        train(storage, reference=reference)
    assert content(storage) | {"run.json": (storage / "run.json").read_bytes()} == before
    chaos.clear()
    assert train(storage, reference=reference) == expected


def test_data_of_a_first_task_that_taught_nothing_may_be_corrected(tmp_path: Path, chaos: Chaos) -> None:
    """It failed after it gave the statistics, which are not kept: the run is the one of the corrected data."""
    expected = train(tmp_path / "fresh", domains=(1, 0))
    chaos.plan(Fault("begin autoencoder of task 0", "memory", times=4))
    with pytest.raises(MemoryError):
        train(tmp_path / "run", domains=(2, 0))
    assert (tmp_path / "run" / "statistics.json").exists()
    chaos.clear()
    assert train(tmp_path / "run", domains=(1, 0)) == expected


def test_metrics_that_compare_tasks_know_those_that_an_earlier_driver_trained(tmp_path: Path) -> None:
    """Two tasks, an evaluation after each; the second driver trains the second one only."""
    cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"), resume=True)
    benchmark = tiny_benchmark((0, 1))

    def steps(num_steps: int) -> set[str]:
        evaluator = EvaluationPlugin(forgetting_metrics(experience=True), loggers=[])
        found: dict[str, Any] = {}
        with tiny_strategy(cluster, evaluator=evaluator, **SETTINGS) as strategy:
            for experience in benchmark.train_stream[:num_steps]:
                strategy.train(experience)
                found = strategy.eval(benchmark.test_stream)
        return set(found)

    steps(1)
    assert "ExperienceForgetting/eval_phase/test_stream/Task000/Exp000" in steps(2)


class _Explodes(torch.nn.Module):
    """A loss that is infinite at its fifth batch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, but for the fifth time."""
        self.count += 1
        return torch.nn.functional.cross_entropy(outputs, targets) * (math.inf if self.count == 6 else 1.0)


def test_a_task_that_diverges_is_not_committed_and_the_others_are(tmp_path: Path) -> None:
    """Epoch, batch and learning rate are told; the next try of the same run has the same to say."""
    cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"), resume=True)
    for _ in range(2):
        with tiny_strategy(cluster, criterion=_Explodes(), **SETTINGS) as strategy:
            with pytest.raises(DivergedError, match=r"task 0 .* is inf in epoch 1, batch 1, at learning rate 0\.05"):
                strategy.train(tiny_benchmark((0,)).train_stream)
            assert hashes(strategy) == []
        assert not (tmp_path / "run/tasks/00000/manifest.json").exists()
        assert not list((tmp_path / "run/tasks/00000").glob("expert-*"))
