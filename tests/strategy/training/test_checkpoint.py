"""Checkpoints inside the expert stage: interrupted and run again, it ends with the same bytes and the same log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import EarlyStoppingPlugin, EvaluationPlugin, LRSchedulerPlugin
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.errors import StorageError
from distributed_eg.runtime.messages import Done, ExpertRequest, ExpertResult, Raised, TaskInput
from distributed_eg.runtime.worker.worker import TaskWorker
from distributed_eg.store.checkpoints import CheckpointSlot
from distributed_eg.store.experts import ExpertRef
from distributed_eg.store.layout import task_file
from distributed_eg.store.storage import Storage
from distributed_eg.strategy.strategy import _DRIVER_ONLY
from distributed_eg.strategy.tasks.experiences import info_of, parts_of, task_data
from distributed_eg.strategy.training import checkpoint
from distributed_eg.strategy.training.packing import pack
from distributed_eg.strategy.training.trainer import StrategyTrainer
from distributed_eg.types import TransferChoice
from tests.helpers import SHAPE, TinyNet, task_images, tiny_benchmark, tiny_net, tiny_strategy

EPOCHS = 5
TASK = 2


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    """Each test sees the warnings that come once a process."""
    checkpoint._warn_once.cache_clear()


class Interrupted(Exception):
    """What a killed worker is here."""


class Interrupter(SupervisedPlugin):
    """Counts epochs in a file, and raises in the epochs named in another, once each."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """An epoch begins."""
        with (self.folder / "epochs").open("a") as file:
            file.write(f"{strategy.clock.train_exp_epochs}\n")

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """In the middle of an epoch."""
        marker = self.folder / f"stop-{strategy.clock.train_exp_epochs}"
        if marker.exists():
            marker.unlink()
            raise Interrupted

    def epochs(self) -> list[int]:
        """The epochs that were begun since the last call."""
        path = self.folder / "epochs"
        found = [int(line) for line in path.read_text().split()] if path.exists() else []
        path.unlink(missing_ok=True)
        return found


class Stage:
    """A run whose task 2 is trained as often as a test wants: from the root, or from task 0 by LwF."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        every_s = settings.pop("checkpoint_every_s", 0)
        self.transfer = settings.pop("transfer", "finetune")
        self.loader_args = settings.pop("loader_args", {})
        self.experience = settings.pop("experience", None) or tiny_benchmark((0, 1, 0)).train_stream[TASK]
        plugins = [*settings.pop("plugins", []), Interrupter(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        self.interrupter = plugins[-1]
        cluster = ClusterConfig(engine="inline", storage=str(folder / "run"), checkpoint_every_s=every_s)
        self.strategy = tiny_strategy(cluster, plugins=plugins, **{"train_epochs": EPOCHS, **settings})
        before = self.strategy.train_epochs
        self.strategy.train_epochs = 1
        self.strategy.train(tiny_benchmark((0,)).train_stream)
        self.strategy.train_epochs = before
        self.interrupter.epochs()
        self.folder = folder
        self.storage = Storage(self.strategy.run_dir or "")
        self.key = "k"

    def run(self) -> Done | Raised:
        """Train the task once."""
        run = self.strategy._open
        assert run is not None
        worker = run.engine._worker  # type: ignore[attr-defined]
        assert isinstance(worker, TaskWorker)
        part = parts_of(self.experience)[0]
        data, _held = run.engine.shipper.ship(task_data(part, TASK, 0, 0.1), "data")
        trainer = StrategyTrainer(pack(self.strategy, _DRIVER_ONLY), True, self.loader_args)
        shipped, _ = run.engine.shipper.ship(trainer, "trainer")
        task_input = TaskInput(TASK, TASK, part.classes, data, info_of(self.experience), self.key, (TASK,))
        manifest = self.registry.manifests[0]
        choice = TransferChoice(0, self.transfer)
        return worker.run(ExpertRequest(task_input, choice, ExpertRef(manifest.expert, manifest.classes), shipped))

    @property
    def registry(self) -> Any:
        """What task 0 left."""
        assert self.strategy._open is not None
        found = self.strategy._open
        return found.session.registry if hasattr(found, "session") else found.registry  # type: ignore[attr-defined]

    def trained(self) -> ExpertResult:
        """Train the task to its end."""
        done = self.run()
        assert isinstance(done, Done), done.message + done.traceback
        assert isinstance(done.result, ExpertResult)
        return done.result

    def interrupt(self, epoch: int) -> None:
        """Train the task until the middle of that epoch (counted from 0)."""
        (self.folder / f"stop-{epoch}").touch()
        raised = self.run()
        assert isinstance(raised, Raised)
        assert "Interrupted" in raised.message, raised.message
        assert self.interrupter.epochs()[-1] == epoch

    @property
    def record(self) -> Path:
        """The checkpoint's record."""
        return Path(self.strategy.run_dir or "") / task_file(TASK, "checkpoint")


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    """Makes stages, each in a folder of its own."""
    made: list[Stage] = []

    def make(**settings: Any) -> Stage:
        made.append(Stage(tmp_path / str(len(made)), **settings))
        return made[-1]

    yield make
    for stage in made:
        stage.strategy.close()


def outcome(result: ExpertResult) -> tuple[Any, ...]:
    """What must be the same: weights, mean distillation, log."""
    return result.expert.sha256, result.distillation, result.log


def require_resumed(make: Callable[..., Stage], settings: Callable[[], dict[str, Any]], stops: tuple[int, ...]) -> Any:
    """Disturbed and undisturbed stages end alike, and no epoch that a checkpoint holds is run again."""
    undisturbed = make(**settings(), checkpoint_every_s=1e6)
    expected = undisturbed.trained()
    all_epochs = undisturbed.interrupter.epochs()
    assert not undisturbed.record.exists(), "a long pause: nothing is written"
    stage = make(**settings())
    for stop in stops:
        stage.interrupt(stop)
    assert outcome(stage.trained()) == outcome(expected)
    assert stage.interrupter.epochs() == all_epochs[stops[-1] :]
    return expected


def optimizer_of(make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Any]:
    """Model and optimizer."""
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    return {"model": model, "optimizer": make(model.expert)}


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    """Momentum."""
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def grouped(net: Any) -> torch.optim.Optimizer:
    """Two groups."""
    groups = [
        {"params": net.features.parameters(), "lr": 0.01, "weight_decay": 1e-2},
        {"params": net.head.parameters()},
    ]
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=1e-3)


@pytest.mark.parametrize("transfer", ["finetune", "lwf"])
@pytest.mark.parametrize(
    "optimizer",
    [sgd, lambda net: torch.optim.Adam(net.parameters(), lr=0.01, amsgrad=True), grouped],
    ids=["sgd", "adam", "groups"],
)
def test_optimizers(stages: Any, optimizer: Any, transfer: str) -> None:
    expected = require_resumed(stages, lambda: {**optimizer_of(optimizer), "transfer": transfer}, (1, 3, 4))
    assert (expected.distillation is not None) == (transfer == "lwf")


def test_other_optimizers(stages: Any) -> None:
    for make in (
        lambda net: torch.optim.NAdam(net.parameters(), lr=0.01),
        lambda net: torch.optim.ASGD(net.parameters(), lr=0.01),
        lambda net: torch.optim.Rprop(net.parameters(), lr=0.01),
        lambda net: torch.optim.Adagrad(net.parameters(), lr=0.01),
    ):
        require_resumed(stages, lambda make=make: optimizer_of(make), (3,))


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
    def settings() -> dict[str, Any]:
        made = optimizer_of(sgd)
        return {**made, "plugins": [SCHEDULERS[kind](made["optimizer"])]}

    require_resumed(stages, settings, (2, 4))


def metrics(**levels: bool) -> EvaluationPlugin:
    """Accuracy and loss."""
    return EvaluationPlugin(accuracy_metrics(**levels), loss_metrics(**levels), loggers=[])


def test_validation_loss_and_evaluations(stages: Any) -> None:
    def settings() -> dict[str, Any]:
        made = optimizer_of(sgd)
        plugin = LRSchedulerPlugin(ReduceLROnPlateau(made["optimizer"], patience=0), metric="val_loss")
        evaluator = metrics(minibatch=True, epoch=True, experience=True, stream=True)
        return {**made, "plugins": [plugin], "eval_every": 1, "evaluator": evaluator}

    expected = require_resumed(stages, settings, (1, 3))
    assert sum(record.callback == "after_eval" for record in expected.log) == EPOCHS + 1


@pytest.mark.parametrize("patience", [2, 10])
def test_early_stopping(stages: Any, patience: int) -> None:
    """It asks the evaluator for values of epochs before the interruption, and puts the best weights back."""

    def settings() -> dict[str, Any]:
        plugin = EarlyStoppingPlugin(patience, "valid_stream", metric_name="Loss_Stream", mode="max")
        return {"plugins": [plugin], "eval_every": 1, "evaluator": metrics(stream=True), "train_epochs": 8}

    expected = require_resumed(stages, settings, (1,) if patience == 2 else (2, 6))
    epochs = sum(record.callback == "after_training_epoch" for record in expected.log)
    assert epochs == (2 if patience == 2 else 8)


class Averager(SupervisedPlugin):
    """Keeps a list, and adds noise that depends on it; tells its state."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Change gradients by what was seen."""
        self.seen.append(float(strategy.loss))
        for parameter in strategy.model.parameters():
            parameter.grad += 0.01 * float(np.mean(self.seen)) * torch.randn_like(parameter) * np.random.rand()


class StatefulAverager(Averager):
    """The same, resumable."""

    def state_dict(self) -> dict[str, Any]:
        """The list."""
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it."""
        self.seen = list(state["seen"])


def test_a_plugin_that_tells_its_state(stages: Any) -> None:
    require_resumed(stages, lambda: {"plugins": [StatefulAverager()]}, (2, 3))


class Ema(nn.Module):
    """An average of the weights whose rate depends on a number that its state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.average = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.updates = 0


class HoldsModule(SupervisedPlugin):
    """Keeps an average, and trains by it."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = Ema()

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Change gradients by the average."""
        self.ema.updates += 1
        self.ema.average += (strategy.loss.detach().squeeze() - self.ema.average) / self.ema.updates
        for parameter in strategy.model.parameters():
            parameter.grad *= 1 + self.ema.average


class IsModule(SupervisedPlugin, nn.Module):
    """A plugin that is a module, with a number beside its tensors."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("total", torch.zeros(()))
        self.count = 0

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Change gradients by both."""
        self.count += 1
        self.total += strategy.loss.detach().squeeze()
        for parameter in strategy.model.parameters():
            parameter.grad *= 1 + self.total / self.count


@pytest.mark.parametrize("plugin", [HoldsModule, IsModule])
def test_modules_of_plugins_with_numbers_that_their_state_leaves_out(stages: Any, plugin: Any) -> None:
    require_resumed(stages, lambda: {"plugins": [plugin()]}, (2, 3))


class Unwilling(SupervisedPlugin):
    """Has the two methods, and does not want to."""

    def state_dict(self) -> dict[str, Any]:
        """Raises."""
        raise NotImplementedError("not yet")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Never called."""


def test_a_state_that_cannot_be_asked_for_stops_no_training(stages: Any, caplog: Any) -> None:
    stage = stages(plugins=[Unwilling()])
    stage.trained()
    assert "NotImplementedError: not yet" in caplog.text
    assert not stage.record.exists()


class Counting(ExpertGateStrategy):
    """A loop of its own, which counts, freezes layers half-way and lets gradients stand over the end of an epoch."""

    count = 0

    def training_epoch(self, **kwargs: Any) -> None:
        """Step on every third batch."""
        for batch in self.dataloader:
            self.mbatch = batch
            self.count += 1
            self._unpack_minibatch()
            self._before_training_iteration(**kwargs)
            self.loss = self._make_empty_loss()
            self.mb_output = self.forward()
            self.loss += self.criterion() * (1 + self.count % 5)
            self._before_backward(**kwargs)
            self.backward()
            self._before_update(**kwargs)
            if self.count % 3 == 0:
                self.optimizer_step()
                self.optimizer.zero_grad()
            self._after_training_iteration(**kwargs)
        if self.count == 8:
            next(self.model.expert.features.parameters()).requires_grad_(False)


def test_a_loop_of_the_users_own(stages: Any) -> None:
    require_resumed(stages, lambda: {"cls": Counting}, (1, 3))


class Remembering(TinyNet):
    """A network whose forward pass depends on a count and on a buffer that its state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if self.training:
            self.calls += 1
            self.scale += 0.01
        return super().forward(x) * self.scale * (1 + self.calls % 3)


def test_networks_that_remember(stages: Any) -> None:
    def settings() -> dict[str, Any]:
        torch.manual_seed(0)
        model = ExpertGate(SHAPE, arch=Remembering(), autoencoder="linear")
        return {"model": model, "optimizer": torch.optim.SGD(model.expert.parameters(), lr=0.01), "freeze_norm": False}

    require_resumed(stages, settings, (2,))


def test_loader_arguments(stages: Any) -> None:
    require_resumed(stages, lambda: {"loader_args": {"num_workers": 1, "drop_last": True}}, (2,))


def restarted(make: Callable[..., Stage], settings: Callable[[], dict[str, Any]], caplog: Any) -> str:
    """A stage that cannot go on from the middle ends alike all the same; gives the warning that came, once."""
    expected = make(**settings(), checkpoint_every_s=1e6).trained()
    assert not caplog.records
    stage = make(**settings())
    with caplog.at_level(logging.WARNING, "distributed_eg.strategy.training.checkpoint"):
        stage.interrupt(2)
        assert outcome(stage.trained()) == outcome(expected)
    assert stage.interrupter.epochs() == list(range(EPOCHS))
    assert not stage.record.exists()
    (message,) = [r.getMessage() for r in caplog.records if r.name == "distributed_eg.strategy.training.checkpoint"]
    assert "start from their beginning" in message
    return message


def test_a_list_that_grows(stages: Any, caplog: Any) -> None:
    message = restarted(stages, lambda: {"plugins": [Averager()]}, caplog)
    assert "'seen' (list) of the plugin Averager" in message
    assert "load_state_dict" in message


class CountingReads(Dataset[Any]):
    """Brightens its images with each read."""

    def __init__(self) -> None:
        self.images, self.targets = task_images(0, 60, 3)
        self.reads = 0

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        return self.images[index] + 1e-4 * self.reads, int(self.targets[index])


class InPlace(CountingReads):
    """Works in place on what it stores."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].mul_(1.001), int(self.targets[index])


class OwnGenerator:
    """A transform that draws from a generator of its own."""

    def __init__(self, kind: str) -> None:
        self.numpy = np.random.default_rng(3) if kind == "numpy" else None
        self.torch = torch.Generator().manual_seed(3) if kind == "torch" else None

    def __call__(self, image: Tensor) -> Tensor:
        drawn = self.numpy.random() if self.numpy else float(torch.rand((), generator=self.torch))
        return image + 0.1 * drawn


def experience_of(leaf: Any, transform: Any = None) -> Any:
    """The third task, from that leaf."""
    leaf.targets = leaf.targets.tolist() if isinstance(leaf.targets, Tensor) else leaf.targets
    groups = {"train": (transform, None), "eval": (None, None)} if transform else None
    dataset = as_classification_dataset(leaf, transform_groups=groups)
    benchmark = benchmark_from_datasets(train=[dataset] * 3, test=[dataset] * 3)
    return task_incremental_benchmark(benchmark).train_stream[TASK]


@pytest.mark.parametrize("leaf", [CountingReads, InPlace])
def test_datasets_that_change(stages: Any, caplog: Any, leaf: Any) -> None:
    message = restarted(stages, lambda: {"experience": experience_of(leaf())}, caplog)
    assert leaf.__name__ in message


def images() -> TensorDataset:
    """Plain images."""
    pixels, targets = task_images(0, 60, 3)
    leaf = TensorDataset(pixels, targets)
    leaf.targets = targets  # type: ignore[attr-defined]
    return leaf


def test_transforms_that_draw(stages: Any, caplog: Any) -> None:
    """From torch's own generator they are resumed; from one of their own they are not."""
    require_resumed(stages, lambda: {"experience": experience_of(images(), noise)}, (2,))
    settings = {"experience": experience_of(images(), OwnGenerator("numpy"))}
    assert "OwnGenerator" in restarted(stages, lambda: settings, caplog)


def noise(image: Tensor) -> Tensor:
    """Random brightness."""
    return image + 0.1 * torch.rand(())


class OwnLoader(ExpertGateStrategy):
    """Makes a loader with a generator of its own."""

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """As a user would."""
        generator = torch.Generator().manual_seed(1)
        self.dataloader = DataLoader(
            self.adapted_dataset, self.train_mb_size, shuffle=True, generator=generator, collate_fn=collate
        )


def collate(samples: Any) -> Any:
    """Samples with task labels."""
    return [torch.stack([torch.as_tensor(v) for v in column]) for column in zip(*samples, strict=True)]


def test_a_loader_with_a_generator_of_its_own(stages: Any, caplog: Any) -> None:
    assert "Generator" in restarted(stages, lambda: {"cls": OwnLoader}, caplog)


def test_persistent_workers(stages: Any, caplog: Any) -> None:
    settings = {"loader_args": {"num_workers": 1, "persistent_workers": True}}
    assert "persistent_workers" in restarted(stages, lambda: settings, caplog)


@pytest.mark.parametrize("damage", ["record", "value", "weights", "gone"])
def test_a_damaged_checkpoint(stages: Any, caplog: Any, damage: str) -> None:
    expected = stages(checkpoint_every_s=1e6).trained()
    stage = stages()
    stage.interrupt(3)
    record = json.loads(stage.record.read_text())
    weights = Path(stage.strategy.run_dir) / record["tensors"]["path"]
    if damage == "record":
        stage.record.write_bytes(stage.record.read_bytes()[:100])
    elif damage == "value":
        stage.record.write_text(json.dumps({**record, "epochs": 2}))
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    else:
        weights.unlink()
    assert outcome(stage.trained()) == outcome(expected)
    assert stage.interrupter.epochs() == list(range(EPOCHS))
    assert "The checkpoint of task 2 cannot be used" in caplog.text


def test_another_key_is_ignored(stages: Any) -> None:
    expected = stages(checkpoint_every_s=1e6).trained()
    stage = stages()
    stage.interrupt(3)
    stage.key = "other data"
    assert outcome(stage.trained()) == outcome(expected)
    assert stage.interrupter.epochs() == list(range(EPOCHS))


class Picky(StatefulAverager):
    """Cannot take its state back."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A user's mistake."""
        raise ValueError("no")


def test_a_state_that_cannot_be_put_back_is_tried_once(stages: Any) -> None:
    stage = stages(plugins=[Picky()])
    stage.interrupt(2)
    raised = stage.run()
    assert isinstance(raised, Raised)
    assert isinstance(raised.error, StorageError)
    assert "ValueError: no" in raised.message
    assert not stage.record.exists()
    stage.trained()


def test_a_storage_that_is_full_stops_no_training(stages: Any, caplog: Any, monkeypatch: Any) -> None:
    expected = stages(checkpoint_every_s=1e6).trained()

    def full(*_: Any) -> None:
        raise StorageError("no room")

    monkeypatch.setattr(CheckpointSlot, "save", full)
    assert outcome(stages().trained()) == outcome(expected)
    assert caplog.text.count("no room") == EPOCHS - 1


def test_one_checkpoint_is_kept_and_none_after_the_last_epoch(stages: Any) -> None:
    stage = stages()
    stage.trained()
    assert json.loads(stage.record.read_text())["epochs"] == EPOCHS - 1
    assert len(list(stage.record.parent.glob("checkpoint-*.safetensors"))) == 1
    short = stages(train_epochs=1)
    short.trained()
    assert not short.record.exists()
