"""Checkpoints inside the expert stage: interrupted and run again, it ends with the same bytes and the same log."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle
import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metrics import Mean, accuracy_metrics, loss_metrics
from avalanche.training.plugins import (
    EarlyStoppingPlugin,
    EvaluationPlugin,
    GEMPlugin,
    LRSchedulerPlugin,
    SynapticIntelligencePlugin,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import TensorDataset

from distributed_eg import ExpertGate, ExpertGateStrategy
from distributed_eg.errors import HookError, StorageError
from distributed_eg.method.expert import derive_expert
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.runtime.messages import ExpertJob
from distributed_eg.store.checkpoints import Checkpoint, CheckpointSlot, encode
from distributed_eg.store.storage import Storage
from distributed_eg.strategy.tasks.experiences import parts_of, task_data
from distributed_eg.strategy.tasks.worker_experience import info_of
from distributed_eg.strategy.training import checkpoint
from tests.helpers import SHAPE, task_images, tiny_benchmark, tiny_net, tiny_strategy
from tests.inside import trainer_of
from tests.method.helpers import digest

EPOCHS = 4
TASK = 2
NEVER = 1e6
"""Seconds between checkpoints: none is written."""


class Forgets:
    """What has no memory says so: empty methods."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


class Interrupter(Forgets, SupervisedPlugin):
    """Lists the epochs that were begun, and raises in the middle of one (counted from 0), once."""

    begun: ClassVar[list[int]] = []
    stop: ClassVar[int | None] = None

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.begun.append(strategy.clock.train_exp_epochs)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_epochs == self.stop:
            Interrupter.stop = None
            raise RuntimeError("interrupted")


class Stage:
    """Trains one expert as often as a test wants, as a worker does: from the root, by fine-tuning or by LwF."""

    def __init__(self, storage: Storage, *, transfer: str = "finetune", **settings: Any) -> None:
        self.transfer = transfer
        self.slot = CheckpointSlot(storage, TASK, "k")
        self.experience = settings.pop("experience", None) or tiny_benchmark((0, 1, 0), train=40).train_stream[TASK]
        loader_args = settings.pop("loader_args", {})
        plugins = [*settings.pop("plugins", []), Interrupter()]
        strategy = tiny_strategy(plugins=plugins, **{"train_epochs": EPOCHS, **settings})
        self.method, self.root, self.head = strategy.method, strategy.model.expert, strategy.model.head
        self.trainer = trainer_of(strategy, loader_args)

    def trained(self, every_s: float = 0) -> tuple[Any, ...]:
        """Train to the end: what must be the same (weights, mean distillation, log)."""
        Interrupter.begun.clear()
        part = parts_of(self.experience)[0]
        derive = partial(derive_expert, self.root, self.head, len(part.classes), 0)
        job = ExpertJob(
            task=TASK,
            label=TASK,
            classes=part.classes,
            network=derive(),
            derive=derive,
            head=self.head,
            teacher=copy.deepcopy(self.root) if self.transfer == "lwf" else None,
            data=cloudpickle.loads(cloudpickle.dumps(task_data(part, TASK, 0, 0.1))),
            experience=info_of(self.experience),
            method=self.method,
            device=torch.device("cpu"),
            checkpoints=self.slot,
            checkpoint_every_s=every_s,
        )
        with reproducible(7, 1):
            trained = self.trainer.train(job)
        return digest(trained.network.state_dict()), trained.distillation, trained.log

    def interrupt(self, epoch: int) -> None:
        """Train until the middle of that epoch."""
        Interrupter.stop = epoch
        with pytest.raises(HookError, match="interrupted"):
            self.trained()
        assert Interrupter.begun[-1] == epoch


@pytest.fixture
def stages(tmp_path: Path) -> Callable[..., Stage]:
    """Makes stages in one run directory; they see the warnings that come once a process."""
    checkpoint._warn_once.cache_clear()
    return functools.partial(Stage, Storage(str(tmp_path)))


def require_resumed(stage: Stage, *stops: int) -> tuple[Any, ...]:
    """Disturbed and undisturbed it ends alike, and no epoch that a checkpoint holds is run again."""
    expected, epochs = stage.trained(NEVER), list(Interrupter.begun)
    assert stage.slot.load() is None
    for stop in stops:
        stage.interrupt(stop)
    assert stage.trained() == expected
    assert Interrupter.begun == epochs[stops[-1] :]
    return expected


def require_restarted(stage: Stage, caplog: Any) -> str:
    """It begins anew and ends alike all the same; gives the warning that came, once for all three times."""
    expected = stage.trained(NEVER)
    stage.interrupt(2)
    assert stage.trained() == expected
    assert Interrupter.begun == list(range(EPOCHS))
    assert stage.slot.load() is None
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert message.startswith("Experts that are tried again start from their beginning, not from a checkpoint: ")
    return message


def optimized(make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Any]:
    """Model and optimizer."""
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    return {"model": model, "optimizer": make(model.expert)}


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def grouped(net: Any) -> torch.optim.Optimizer:
    groups = [{"params": net.features.parameters(), "lr": 0.01}, {"params": net.head.parameters()}]
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=1e-3)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": sgd,
    "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.01, amsgrad=True),
    "NAdam": lambda net: torch.optim.NAdam(net.parameters(), lr=0.01),
    "ASGD": lambda net: torch.optim.ASGD(net.parameters(), lr=0.01),
    "Rprop": lambda net: torch.optim.Rprop(net.parameters(), lr=0.01),
    "Adagrad": lambda net: torch.optim.Adagrad(net.parameters(), lr=0.01),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_optimizers(stages: Any, kind: str) -> None:
    require_resumed(stages(**optimized(OPTIMIZERS[kind])), 2)


def test_learning_without_forgetting_interrupted_several_times(stages: Any) -> None:
    _, distillation, _ = require_resumed(stages(**optimized(grouped), transfer="lwf"), 1, 2, 3)
    assert distillation is not None


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRSchedulerPlugin]] = {
    "step": lambda optimizer: LRSchedulerPlugin(StepLR(optimizer, 2, 0.5)),
    "milestones": lambda optimizer: LRSchedulerPlugin(MultiStepLR(optimizer, [1, 3], 0.3)),
    "lambda": lambda optimizer: LRSchedulerPlugin(LambdaLR(optimizer, lambda epoch: 0.7**epoch)),
    "one cycle": lambda optimizer: LRSchedulerPlugin(
        OneCycleLR(optimizer, 0.1, total_steps=40), step_granularity="iteration"
    ),
    "plateau": lambda optimizer: LRSchedulerPlugin(
        ReduceLROnPlateau(optimizer, patience=0, threshold=0.5), metric="train_loss"
    ),
}


@pytest.mark.parametrize("kind", list(SCHEDULERS))
def test_schedulers(stages: Any, kind: str) -> None:
    made = optimized(sgd)
    require_resumed(stages(**made, plugins=[SCHEDULERS[kind](made["optimizer"])]), 3)


def metrics(**levels: bool) -> EvaluationPlugin:
    """Accuracy and loss."""
    return EvaluationPlugin(accuracy_metrics(**levels), loss_metrics(**levels), loggers=[])


def test_validation_loss_and_evaluations(stages: Any) -> None:
    made = optimized(sgd)
    plugin = LRSchedulerPlugin(ReduceLROnPlateau(made["optimizer"], patience=0), metric="val_loss")
    evaluator = metrics(minibatch=True, epoch=True, experience=True, stream=True)
    _, _, log = require_resumed(stages(**made, plugins=[plugin], eval_every=1, evaluator=evaluator), 1, 3)
    assert sum(record.callback == "after_eval" for record in log) == EPOCHS + 1


@pytest.mark.parametrize(("patience", "stops", "epochs"), [(2, (1,), 2), (10, (2, 6), 8)])
def test_early_stopping(stages: Any, patience: int, stops: tuple[int, ...], epochs: int) -> None:
    """It asks the evaluator for values of epochs before the interruption, and puts the best weights back."""
    plugin = EarlyStoppingPlugin(patience, "valid_stream", metric_name="Loss_Stream", mode="min")
    made = optimized(lambda net: torch.optim.SGD(net.parameters(), lr=0.005))
    stage = stages(**made, plugins=[plugin], eval_every=1, evaluator=metrics(stream=True), train_epochs=8)
    _, _, log = require_resumed(stage, *stops)
    assert sum(record.callback == "after_training_epoch" for record in log) == epochs


@pytest.mark.filterwarnings("ignore:.* of earlier tasks, but each expert learns one task:UserWarning")
def test_another_plugin_of_avalanches(stages: Any) -> None:
    require_resumed(stages(plugins=[GEMPlugin(8, 0.5)]), 2)


class Averager(SupervisedPlugin):
    """Adds noise that depends on a list; cannot be asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        self.seen.append(float(strategy.loss))
        for parameter in strategy.model.parameters():
            parameter.grad += 0.01 * float(np.mean(self.seen)) * torch.randn_like(parameter) * np.random.rand()


class Tells:
    """The remedy."""

    seen: Any

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class TellingAverager(Tells, Averager):
    """Resumable."""


class BatchCount(PluginMetric[int]):
    """Counts over epochs; cannot be asked for it."""

    seen = 0

    def result(self) -> int:
        return self.seen

    def reset(self) -> None:
        """Never."""

    def after_training_iteration(self, strategy: Any) -> MetricValue:
        self.seen += 1
        return MetricValue(self, "batches", self.seen, strategy.clock.train_iterations)


class TellingBatchCount(Tells, BatchCount):
    """Resumable."""


class Growing(nn.Module):
    """A loss that grows by two buffers, of which its state dict leaves one out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("other", torch.ones(()), persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.factor *= 1.01
        self.other += 0.01
        return nn.functional.cross_entropy(outputs, targets) * self.factor * self.other


def test_plugins_metrics_and_criteria_that_tell_their_state(stages: Any) -> None:
    evaluator = EvaluationPlugin(TellingBatchCount(), loggers=[])
    _, _, log = require_resumed(stages(plugins=[TellingAverager()], evaluator=evaluator, criterion=Growing()), 1, 3)
    counts = [value.value for record in log for value in record.values]
    assert counts == list(range(1, len(counts) + 1))


class Counting(ExpertGateStrategy):
    """A loop and attributes of its own; freezes layers half-way, and lets gradients stand over the end of an epoch."""

    count = 0

    def __init__(self, **settings: Any) -> None:
        self.losses: list[Tensor] = []
        self.mean = Mean()
        self._mixer = nn.Linear(1, 1)
        self._scaled = lambda loss: loss * 2
        super().__init__(**settings)

    def training_epoch(self, **kwargs: Any) -> None:
        for batch in self.dataloader:
            self.mbatch = batch
            self.count += 1
            self._unpack_minibatch()
            self._before_training_iteration(**kwargs)
            self.mb_output = self.forward()
            self.loss = self._scaled(self.criterion()) * (1 + self.count % 5)
            self.losses.append(self.loss.detach())
            self.mean.update(self.loss.detach())
            self._mixer.weight.data *= 0.9
            self.loss *= (self._mixer.weight.item() + self.mean.result()) / sum(self.losses)
            self._before_backward(**kwargs)
            self.backward()
            self._before_update(**kwargs)
            if self.count % 2 == 0:
                self.optimizer_step()
                self.optimizer.zero_grad()
            self._after_training_iteration(**kwargs)
        if self.count == 6:
            next(self.model.expert.features.parameters()).requires_grad_(False)
            self.model.expert.dropout.eval()


def test_a_loop_and_attributes_of_the_users_own(stages: Any) -> None:
    require_resumed(stages(cls=Counting), 1, 3)


def test_loader_arguments_and_transforms_that_draw_from_torch(stages: Any) -> None:
    pixels, targets = task_images(0, 60, 3)
    leaf = TensorDataset(pixels, targets)
    leaf.targets = targets.tolist()  # type: ignore[attr-defined]
    noisy = as_classification_dataset(leaf, transform_groups={"train": (noise, None), "eval": (None, None)})
    benchmark = task_incremental_benchmark(benchmark_from_datasets(train=[noisy] * 3, test=[noisy] * 3))
    stage = stages(experience=benchmark.train_stream[TASK], loader_args={"drop_last": True})
    require_resumed(stage, 1)
    stage.slot.delete()
    require_resumed(stages(loader_args={"num_workers": 1}, train_epochs=2), 1)


def noise(image: Tensor) -> Tensor:
    """Random brightness."""
    return image + 0.1 * torch.rand(())


class PlainScheduler:
    """Cannot be asked for its state."""

    base_lrs = (0.05,)

    def step(self) -> None:
        """Nothing."""


class Watching(ExpertGateStrategy):
    """Holds parameters of the network, which a stored copy would not be."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.watched = list(self.model.expert.head.parameters())


LACKING: dict[str, Callable[[], dict[str, Any]]] = {
    "the plugin Averager (1) cannot be asked for state": lambda: {"plugins": [Averager()]},
    "the metric BatchCount (0) cannot be asked for state": lambda: {
        "evaluator": EvaluationPlugin(BatchCount(), loggers=[])
    },
    "PlainScheduler at ['the plugin LRSchedulerPlugin (1).scheduler'] cannot be stored": lambda: {
        "plugins": [LRSchedulerPlugin(PlainScheduler())]
    },
    "set at ['the plugin SynapticIntelligencePlugin (1).excluded_parameters'] cannot be stored": lambda: {
        "plugins": [SynapticIntelligencePlugin(0.1)]
    },
    "Parameter at ['the strategy Watching.watched'][0] cannot be stored": lambda: {"cls": Watching},
}


@pytest.mark.filterwarnings("ignore:.* of earlier tasks, but each expert learns one task:UserWarning")
@pytest.mark.parametrize("words", list(LACKING))
def test_who_cannot_be_asked_for_state_is_named_once_with_the_remedy(stages: Any, caplog: Any, words: str) -> None:
    message = require_restarted(stages(**LACKING[words]()), caplog)
    assert f"{words} in a checkpoint; give it state_dict()" in message or f"{words}; give it state_dict()" in message
    assert "load_state_dict() of tensors and plain values, empty ones where it keeps nothing" in message


class Replacing(Forgets, SupervisedPlugin):
    """Does something to the strategy after each epoch."""

    def __init__(self, act: Callable[[Any], None]) -> None:
        super().__init__()
        self.act = act

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.act(strategy)


REPLACED: dict[str, Callable[[Any], None]] = {
    "model extra": lambda strategy: strategy.model.add_module("extra", nn.ReLU()),
    "parameter 8 of the optimizer's group 0": lambda strategy: strategy.optimizer.param_groups[0]["params"].append(
        nn.Parameter(torch.zeros(()))
    ),
    "the strategy ExpertGateStrategy.dataloader": lambda strategy: strategy.make_train_dataloader(),
}


@pytest.mark.parametrize("what", list(REPLACED))
def test_what_comes_or_goes_or_is_replaced_between_epochs(stages: Any, caplog: Any, what: str) -> None:
    stage = stages(plugins=[Replacing(REPLACED[what])], train_epochs=2)
    stage.trained()
    assert f"{what} comes, goes or is replaced" in caplog.text
    assert stage.slot.load() is None


def test_persistent_workers(stages: Any, caplog: Any) -> None:
    stage = stages(loader_args={"num_workers": 1, "persistent_workers": True}, train_epochs=2)
    stage.trained()
    assert "persistent_workers" in caplog.text
    assert stage.slot.load() is None


class Unwilling(TellingAverager):
    """Does not want to tell."""

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("not yet")


def test_a_state_that_cannot_be_had_stops_no_training(stages: Any, caplog: Any) -> None:
    assert "NotImplementedError: not yet" in require_restarted(stages(plugins=[Unwilling()]), caplog)


class Picky(TellingAverager):
    """Cannot take its state back."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("no")


def test_a_state_that_cannot_be_put_back_is_tried_once(stages: Any) -> None:
    stage = stages(plugins=[Picky()])
    stage.interrupt(2)
    with pytest.raises(StorageError, match="ValueError: no"):
        stage.trained()
    assert stage.slot.load() is None
    stage.trained()


OLD_LAYOUT = {
    "consists of": ["the strategy ExpertGateStrategy", "the evaluator", "the optimizer", "model", "valid 0"],
    "attributes": {"the plugin Clock (3)": {"values": {"train_exp_epochs": 3}, "states": {}}},
    "networks": {"model": {"state": {"network.head.weight": torch.ones(2, 48)}}},
}


def test_a_checkpoint_that_does_not_belong_is_ignored(stages: Any, caplog: Any) -> None:
    stage = stages()
    expected = stage.trained(NEVER)

    def leave_old_layout() -> None:
        stage.slot.save(Checkpoint("k", 3, *encode(OLD_LAYOUT)))

    def damage() -> None:
        stage.interrupt(1)
        next(Path(stage.slot.storage.uri).rglob("checkpoint-*.safetensors")).unlink()

    def leave_other_plugins() -> None:
        stages(plugins=[TellingAverager()]).interrupt(1)

    def leave_other_key() -> None:
        stage.interrupt(1)
        stage.slot = CheckpointSlot(stage.slot.storage, TASK, "of other data")

    for leave, said in (
        (leave_old_layout, "The checkpoint of task 2 (label 2) is of another kind"),
        (damage, "The checkpoint of task 2 cannot be used"),
        (leave_other_plugins, "The checkpoint of task 2 (label 2) is of another kind"),
        (leave_other_key, ""),
    ):
        leave()
        caplog.clear()
        assert stage.trained() == expected
        assert Interrupter.begun == list(range(EPOCHS))
        assert said in caplog.text
        stage.slot.delete()


def test_a_storage_that_is_full_stops_no_training(stages: Any, caplog: Any, monkeypatch: Any) -> None:
    stage = stages()
    expected = stage.trained(NEVER)

    def full(*_: Any) -> None:
        raise StorageError("no room")

    monkeypatch.setattr(CheckpointSlot, "save", full)
    assert stage.trained() == expected
    assert caplog.text.count("no room") == EPOCHS - 1


def test_one_checkpoint_is_kept_and_none_after_the_last_epoch(stages: Any) -> None:
    stage = stages()
    stage.trained()
    kept = stage.slot.load()
    assert kept is not None
    assert kept.epochs == EPOCHS - 1
    assert len(list(Path(stage.slot.storage.uri).rglob("checkpoint-*.safetensors"))) == 1
    stage.slot.delete()
    stages(train_epochs=1).trained()
    assert stage.slot.load() is None
