"""What tests look at behind a strategy's face: the only place of the tests that reaches into one."""

from __future__ import annotations

from typing import Any

from avalanche.benchmarks.scenarios.generic_scenario import CLExperience

from distributed_eg import ExpertGateStrategy
from distributed_eg.runtime.engine import Engine
from distributed_eg.runtime.inline import InlineEngine
from distributed_eg.runtime.messages import TaskInput
from distributed_eg.runtime.run import Run
from distributed_eg.runtime.shipping import Shipped
from distributed_eg.runtime.worker.worker import TaskWorker
from distributed_eg.store.records import TaskManifest, TaskRecord
from distributed_eg.store.registry import Registry
from distributed_eg.strategy.tasks.experiences import parts_of, task_data
from distributed_eg.strategy.tasks.intake import Intake
from distributed_eg.strategy.training.packing import pack
from distributed_eg.strategy.training.trainer import StrategyTrainer


def run_of(strategy: ExpertGateStrategy) -> Run:
    """The run that the strategy opened."""
    run = strategy._driver.run
    assert run is not None
    return run


def registry_of(strategy: ExpertGateStrategy) -> Registry:
    """What its driver has seen."""
    return run_of(strategy).registry


def manifests_of(strategy: ExpertGateStrategy) -> dict[int, TaskManifest]:
    """The sealed manifests, by task."""
    return registry_of(strategy).manifests


def sample_counts_of(strategy: ExpertGateStrategy) -> list[int]:
    """How many samples each task's autoencoder was fitted to."""
    return [record.num_samples for record in registry_of(strategy).autoencoders.values()]


def engine_of(strategy: ExpertGateStrategy) -> Engine:
    """Where its requests run."""
    return run_of(strategy)._engine


def worker_of(strategy: ExpertGateStrategy) -> TaskWorker:
    """The inline engine's worker."""
    engine = engine_of(strategy)
    assert isinstance(engine, InlineEngine)
    assert engine._worker is not None
    return engine._worker


def trainer_of(strategy: ExpertGateStrategy, loader_args: dict[str, Any] | None = None) -> StrategyTrainer:
    """What trains experts as the strategy would."""
    packed = pack(strategy, {"_driver"}, strategy._driver.fresh_metrics)
    return StrategyTrainer(packed, loader_args or {})


def shipped_trainer_of(strategy: ExpertGateStrategy) -> Shipped:
    """The same, as the strategy's run ships it."""
    return run_of(strategy).shipper.ship(trainer_of(strategy), "the trainer")[0]


def intake_of(strategy: ExpertGateStrategy, experiences: Any) -> Any:
    """What reads a stream for the strategy's run, which is opened."""
    run = strategy._driver.open({})
    return Intake(
        strategy, run, strategy.method, strategy.on_repeat, {}, experiences, None, None, strategy._driver.told
    )


def task_input(
    strategy: ExpertGateStrategy,
    experience: CLExperience,
    task: int,
    *,
    key: str = "key",
    classes: tuple[int, ...] | None = None,
) -> TaskInput:
    """An experience as a task of the strategy's run."""
    (part,) = parts_of(experience)
    data, _held = run_of(strategy).shipper.ship(task_data(part, task, 0, 0.1), "the data")
    record = TaskRecord(task, task, classes or part.classes, (task,), None, {})
    return TaskInput(record, data, part.info, key)
