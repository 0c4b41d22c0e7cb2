"""Every method, attribute and plugin of the interface, where the expert trains: in this process and on Ray workers."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training import Naive
from avalanche.training.plugins import EarlyStoppingPlugin, EvaluationPlugin, LRSchedulerPlugin
from torch import Tensor, nn

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.errors import InputError
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import load_tensors
from tests.helpers import INLINE, SEED_METHODS, SHAPE, hashes, tiny_benchmark, tiny_net, tiny_strategy
from tests.inside import manifests_of

# Ray's workers cannot import a test module: its classes travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

AROUND_AN_EXPERT = tuple(name for name in SEED_METHODS if name != "train")
"""Those that are called where the expert trains; ``train`` is the driver's, over all tasks."""


def spied(name: str) -> Any:
    """A method that notes its call and does what it did."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        note(self.folder, name)
        return getattr(super(Calls, self), name)(*args, **kwargs)

    return method


def note(folder: Path, line: str) -> None:
    """Write a line to this process's file."""
    with (folder / f"{os.getpid()}.txt").open("a") as file:
        file.write(f"{line}\n")


def noted(folder: Path) -> dict[int, list[str]]:
    """Lines of each process."""
    return {int(path.stem): path.read_text().splitlines() for path in folder.glob("*.txt")}


class Calls(ExpertGateStrategy):
    """A user's subclass that overrides every method of the seed."""

    folder: Path


for _name in SEED_METHODS:
    setattr(Calls, _name, spied(_name))


class Stops(SupervisedPlugin):
    """Ends task 0's training in its second iteration."""

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Stop task 0."""
        if strategy.experience.task_label == 0 and strategy.clock.train_exp_iterations == 1:
            strategy.stop_training()


class Seen(SupervisedPlugin):
    """Checks every attribute of the seed in every hook that it knows, and writes what does not hold."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.batches = 0
        self.experiences: list[int] = []

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """A task begins: nothing is left of another one."""
        self.experiences.append(strategy.experience.current_experience)
        self.must("fresh plugin", len(self.experiences) == 1 and self.batches == 0)
        counts = {name: count for name, count in vars(strategy.clock).items() if name.startswith("train_")}
        self.must("fresh clock", set(counts.values()) == {0} and len(counts) == 5)
        self.must("fresh optimizer", not strategy.optimizer.state)
        self.must("no metrics of another task", not strategy.evaluator.get_last_metrics())
        held = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
        own = {id(p) for p in strategy.model.expert.parameters()}
        # Under LwF the optimizer has the parent's old head, too: the layers of the expert stay its own.
        self.must("optimizer holds the expert", own <= held and len(held - own) in (0, 2))
        self.must("no parameter twice", len(held) == sum(len(g["params"]) for g in strategy.optimizer.param_groups))
        note(self.folder, f"task {strategy.experience.task_label} has {len(held)} parameters")

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """The data of the task."""
        count = len(strategy.adapted_dataset)
        self.must("adapted_dataset", count == len(strategy.experience.dataset) == 54)
        self.must("dataloader", len(strategy.dataloader) == -(-count // strategy.train_mb_size) == 4)
        self.must("numbers", (strategy.train_epochs, strategy.train_mb_size, strategy.eval_mb_size) == (2, 16, 12))
        self.must("retain_graph", strategy.retain_graph is False)
        self.must("plugins", self in strategy.plugins and strategy.evaluator in strategy.plugins)
        self.must("clock is last", strategy.plugins[-1] is strategy.clock)
        self.must("loggers stay", not any(type(x).__name__ == "TextLogger" for x in strategy.evaluator.loggers))

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """A fresh mini-batch."""
        task = strategy.experience.task_label
        self.must("mbatch", strategy.mbatch[0] is strategy.mb_x and strategy.mbatch[1] is strategy.mb_y)
        self.must("mb_task_id", set(strategy.mb_task_id.tolist()) == {task})
        self.must("mb_y", set(strategy.mb_y.tolist()) <= {2 * task, 2 * task + 1})
        self.must("mb_x", strategy.mb_x.shape == (len(strategy.mb_y), *SHAPE))
        self.must("device", strategy.mb_x.device == torch.device(strategy.device))
        self.must("empty loss", float(strategy.loss) == 0)

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Outputs stand for dataset class ids."""
        task = strategy.experience.task_label
        self.must("is_training", strategy.is_training and not strategy.is_eval)
        self.must("mb_output", strategy.mb_output.shape == (len(strategy.mb_y), 2 * task + 2))
        self.must("model in training", strategy.model.training and isinstance(strategy.model.expert, nn.Module))

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """The loss is that of this mini-batch, and gradients are the expert's."""
        self.must("loss", bool(torch.isfinite(strategy.loss).all()) and float(strategy.loss.detach()) > 0)
        self.must("gradients", all(p.grad is not None for p in strategy.model.expert.parameters()))

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """The clock counts after every other plugin."""
        self.must("train_exp_iterations", strategy.clock.train_exp_iterations == self.batches)
        self.must("train_epoch_iterations", strategy.clock.train_epoch_iterations == self.batches % 4)
        self.batches += 1

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """The clock counts epochs."""
        self.must("train_exp_epochs", strategy.clock.train_exp_epochs == self.batches // 4 - 1)

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """An evaluation begins, in training or by the user."""
        self.must("is_eval", strategy.is_eval and not strategy.is_training)
        self.must("current_eval_stream", len(list(strategy.current_eval_stream)) >= 1)

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The evaluated data."""
        count = len(strategy.adapted_dataset)
        self.must("adapted_dataset in eval", count == len(strategy.experience.dataset))
        self.must("dataloader in eval", len(strategy.dataloader) == -(-count // strategy.eval_mb_size))

    def after_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
        """An evaluated mini-batch."""
        task = strategy.experience.task_label
        self.must("model in eval", not strategy.model.training)
        self.must("mb_y in eval", set(strategy.mb_y.tolist()) <= {2 * task, 2 * task + 1})
        self.must("mb_task_id in eval", set(strategy.mb_task_id.tolist()) == {task})
        self.must("mb_output in eval", strategy.mb_output.shape[0] == len(strategy.mb_y))
        self.must("width in eval", strategy.mb_output.shape[1] >= 2 * task + 2)
        self.must("finite in eval", bool(torch.isfinite(strategy.mb_output).all()))
        note(self.folder, f"evaluated {strategy.experience.origin_stream.name} {task}")

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Its loss."""
        self.must("loss in eval", strategy.loss.numel() == 1 and bool(torch.isfinite(strategy.loss)))

    def must(self, what: str, holds: bool) -> None:
        """Write what does not hold."""
        if not holds:
            note(self.folder, f"WRONG {what}")


DOMAINS = (0, 1, 0)
"""Task 2 learns without forgetting from task 0; task 1 is fine-tuned."""


def whole_run(cluster: ClusterConfig, folder: Path) -> dict[str, Any]:
    """Every overridden method, every attribute, a plugin that stops task 0: one strategy, for it costs seconds."""
    benchmark = tiny_benchmark(DOMAINS)
    (folder / "calls").mkdir(parents=True)
    (folder / "seen").mkdir()
    evaluator = EvaluationPlugin(loss_metrics(minibatch=True, epoch=True), loggers=[])
    with tiny_strategy(
        cluster,
        cls=Calls,
        rel_thresh=0.5,
        eval_every=1,
        eval_mb_size=12,
        evaluator=evaluator,
        plugins=[Seen(folder / "seen")],
    ) as strategy:
        strategy.folder = folder / "calls"
        strategy.train(benchmark.train_stream)
        trained = noted(folder / "calls")
        outside = outside_of_hooks(strategy)
        strategy.eval(benchmark.test_stream)
        again = outside_of_hooks(strategy)
        transfer, seen = strategy.registry["transfer"].to_pylist(), noted(folder / "seen")
        strategy.plugins.insert(0, Stops())
        before = len(evaluator.get_all_metrics()["Loss_MB/train_phase/train_stream/Task000"][0])
        strategy.train(benchmark.train_stream)
        results = evaluator.get_all_metrics()
        return {
            "trained": trained,
            "outside": [outside, again],
            "transfer": transfer,
            "seen": seen,
            "calls": noted(folder / "calls"),
            "second": {
                task: len(results[f"Loss_MB/train_phase/train_stream/Task{task:03d}"][0]) - before for task in range(3)
            },
        }


def outside_of_hooks(strategy: Any) -> dict[str, Any]:
    """What the attributes say between calls."""
    return {
        "is_training": strategy.is_training,
        "is_eval": strategy.is_eval,
        "experience": strategy.experience,
        "adapted_dataset": strategy.adapted_dataset,
        "mbatch": strategy.mbatch,
        "mb_output": strategy.mb_output,
        "dataloader": list(strategy.dataloader),
        "current_eval_stream": list(strategy.current_eval_stream),
        "loss": float(strategy.loss),
        "device": str(strategy.device),
        "clock": (strategy.clock.train_iterations, strategy.clock.train_exp_counter),
        "clock is last": strategy.plugins[-1] is strategy.clock,
        "evaluator is there": strategy.evaluator in strategy.plugins,
    }


def outside_of_avalanches() -> list[dict[str, Any]]:
    """The same of Avalanche's plain strategy, after training and after evaluation."""
    net, benchmark = tiny_net(), tiny_benchmark(DOMAINS, train=54)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    evaluator = EvaluationPlugin(loggers=[])
    sizes = {"train_mb_size": 16, "train_epochs": 2, "eval_mb_size": 12}
    strategy = Naive(model=net, optimizer=optimizer, evaluator=evaluator, device="cpu", **sizes)
    strategy.train(benchmark.train_stream)
    trained = outside_of_hooks(strategy)
    strategy.eval(benchmark.test_stream)
    return [trained, outside_of_hooks(strategy)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(INLINE, id="inline"),
        pytest.param(ClusterConfig(num_workers=2), id="ray", marks=[pytest.mark.ray]),
    ],
)
def engine(request: pytest.FixtureRequest) -> ClusterConfig:
    """Both engines; Ray is up where it is needed."""
    if request.param.engine == "ray":
        request.getfixturevalue("ray_local")
    return request.param


@pytest.fixture(scope="module")
def seen(engine: ClusterConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run of each engine left behind."""
    return whole_run(engine, tmp_path_factory.mktemp(engine.engine))


class TestBothEngines:
    """One run on each engine."""

    @pytest.mark.parametrize("method", AROUND_AN_EXPERT)
    def test_an_override_is_called_where_the_expert_trains(
        self, engine: ClusterConfig, seen: dict[str, Any], method: str
    ) -> None:
        processes = seen["calls"] if method == "stop_training" else seen["trained"]
        where = {process for process, lines in processes.items() if method in lines}
        if engine.engine == "ray":
            assert where - {os.getpid()}
        else:
            assert where == {os.getpid()}

    def test_a_task_is_trained_by_a_worker_only(self, engine: ClusterConfig, seen: dict[str, Any]) -> None:
        mine = seen["trained"].get(os.getpid(), [])
        assert mine.count("train") == 1
        assert ("training_epoch" in mine) == (engine.engine == "inline")

    def test_how_often_each_is_called(self, seen: dict[str, Any]) -> None:
        """Three tasks of two epochs of four iterations, evaluated before and after each epoch, five samples each."""
        lines = [line for process in seen["trained"].values() for line in process]
        for name, count in {
            "train_dataset_adaptation": 3,
            "make_train_dataloader": 3,
            "check_model_and_optimizer": 3,
            "training_epoch": 6,
            "backward": 24,
            "optimizer_step": 24,
            "eval": 9,
            "eval_epoch": 9,
            "make_eval_dataloader": 9,
            "forward": 24 + 9,
            "criterion": 24 + 9,
        }.items():
            assert lines.count(name) == count, name

    def test_every_attribute_in_every_hook(self, seen: dict[str, Any]) -> None:
        lines = [line for process in seen["seen"].values() for line in process]
        assert sorted({line for line in lines if line.startswith("WRONG")}) == []

    def test_the_optimizer_also_trains_the_old_head_under_lwf(self, seen: dict[str, Any]) -> None:
        assert seen["transfer"][:3] == ["fresh", "finetune", "lwf"]
        lines = [line for process in seen["seen"].values() for line in process]
        assert {"task 0 has 8 parameters", "task 1 has 8 parameters", "task 2 has 10 parameters"} <= set(lines)

    def test_hooks_of_evaluation_run_in_training_and_on_the_driver(
        self, engine: ClusterConfig, seen: dict[str, Any]
    ) -> None:
        mine = seen["seen"].get(os.getpid(), [])
        assert {f"evaluated test {task}" for task in range(3)} <= set(mine)
        lines = {line for process in seen["seen"].values() for line in process}
        assert {f"evaluated valid {task}" for task in range(3)} <= lines
        if engine.engine == "ray":
            assert not any("valid" in line for line in mine)

    @pytest.mark.parametrize("after", [0, 1], ids=["after train", "after eval"])
    def test_attributes_between_calls(self, seen: dict[str, Any], after: int) -> None:
        """Those of Avalanche's own loop after the same calls."""
        assert seen["outside"][after] == outside_of_avalanches()[after]

    def test_stop_training_ends_one_tasks_training_only(self, seen: dict[str, Any]) -> None:
        """Task 0 stops after two of its eight iterations; the others train on."""
        assert seen["second"] == {0: 2, 1: 8, 2: 8}


# What an override changes, inline


def expert(strategy: Any, task: int = 0) -> dict[str, Tensor]:
    """The sealed weights of a task's expert."""
    return load_tensors(Storage(strategy.run_dir), manifests_of(strategy)[task].expert)


def epoch_metrics() -> EvaluationPlugin:
    """Loss of each mini-batch, loss and accuracy of each epoch and of each evaluated experience."""
    return EvaluationPlugin(
        loss_metrics(minibatch=True, epoch=True, experience=True),
        accuracy_metrics(epoch=True, experience=True, stream=True),
        loggers=[],
    )


def losses(strategy: Any, task: int = 0) -> list[float]:
    """Loss of each training iteration."""
    return strategy.evaluator.get_all_metrics()[f"Loss_MB/train_phase/train_stream/Task{task:03d}"][1]


@pytest.fixture
def plain() -> Iterator[ExpertGateStrategy]:
    """A strategy as it is, trained on one task."""
    with tiny_strategy(evaluator=epoch_metrics()) as strategy:
        strategy.train(tiny_benchmark((0,)).train_stream)
        yield strategy


def trained(cls: type[ExpertGateStrategy], tasks: int = 1, **settings: Any) -> ExpertGateStrategy:
    """A strategy of a user's class, trained; the caller closes it."""
    strategy = tiny_strategy(cls=cls, evaluator=epoch_metrics(), **settings)
    strategy.train(tiny_benchmark(tuple(range(tasks))).train_stream)
    return strategy


class NoSteps(ExpertGateStrategy):
    """Never steps."""

    def optimizer_step(self) -> None:
        """Nothing."""


class NoGradients(ExpertGateStrategy):
    """Never goes back."""

    def backward(self) -> None:
        """Nothing."""


class Halves(ExpertGateStrategy):
    """Trains on every other sample."""

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Keep the even ones."""
        super().train_dataset_adaptation(**kwargs)
        self.adapted_dataset = self.adapted_dataset.subset(list(range(0, len(self.adapted_dataset), 2)))


class HalvesEvaluation(ExpertGateStrategy):
    """Evaluates on half of the samples."""

    def eval_dataset_adaptation(self, **kwargs: Any) -> None:
        """Keep the first half."""
        super().eval_dataset_adaptation(**kwargs)
        self.adapted_dataset = self.adapted_dataset.subset(list(range(len(self.adapted_dataset) // 2)))


class Scales(ExpertGateStrategy):
    """A loss ten times as large."""

    def criterion(self) -> Tensor:
        """Ten times it."""
        return 10 * super().criterion()


class Negates(ExpertGateStrategy):
    """Turns the images over before the network sees them."""

    def forward(self) -> Tensor:
        """The model's output for the images turned over."""
        self.mbatch[0] = -self.mbatch[0]
        return super().forward()


class OneBatch(ExpertGateStrategy):
    """An epoch of one iteration."""

    def training_epoch(self, **kwargs: Any) -> None:
        """The first mini-batch only."""
        self.dataloader = [next(iter(self.dataloader))]
        super().training_epoch(**kwargs)


class Unshuffled(ExpertGateStrategy):
    """A loader of its own: in order, in batches of eight."""

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """In order."""
        self.train_mb_size = 8
        super().make_train_dataloader(**{**kwargs, "shuffle": False})


class FreezesFeatures(ExpertGateStrategy):
    """Freezes the features as the experience begins."""

    def model_adaptation(self, model: Any = None) -> Any:
        """The adapted model, its features frozen."""
        model = super().model_adaptation(model)
        for parameter in model.expert.features.parameters():
            parameter.requires_grad_(False)
        return model


class LowRate(ExpertGateStrategy):
    """A learning rate of zero, set where the optimizer is made."""

    def make_optimizer(self, **kwargs: Any) -> None:
        """As it was, at rate 0."""
        super().make_optimizer(**kwargs)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0


class AnotherOptimizer(ExpertGateStrategy):
    """Takes another optimizer where the model is checked."""

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Adam in place of the user's SGD."""
        super().check_model_and_optimizer(**kwargs)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)


class TwoLosses(ExpertGateStrategy):
    """An evaluation loop of its own that ends after one mini-batch."""

    def eval_epoch(self, **kwargs: Any) -> None:
        """The first mini-batch only."""
        self.dataloader = [next(iter(self.dataloader))]
        super().eval_epoch(**kwargs)


class TestEffects:
    """What an override changes in the expert."""

    @pytest.mark.parametrize("cls", [NoSteps, LowRate], ids=["optimizer_step", "make_optimizer"])
    def test_without_a_step_the_expert_is_its_start(self, cls: type[ExpertGateStrategy]) -> None:
        """But for the head, which is the task's own, it is the root."""
        with trained(cls) as strategy:
            state, root = expert(strategy), strategy.model.expert.state_dict()
        same = [name for name in state if not name.startswith("head.")]
        assert len(same) > 5
        assert all(torch.equal(state[name], root[name]) for name in same)

    def test_backward(self, plain: ExpertGateStrategy) -> None:
        with trained(NoGradients) as strategy:
            state, root = expert(strategy), strategy.model.expert.state_dict()
            assert torch.equal(state["features.0.weight"], root["features.0.weight"])
        assert not torch.equal(expert(plain)["features.0.weight"], root["features.0.weight"])

    def test_train_dataset_adaptation(self, plain: ExpertGateStrategy) -> None:
        with trained(Halves) as strategy:
            assert (len(losses(strategy)), len(losses(plain))) == (4, 8)
            assert strategy.clock.train_iterations == 4

    def test_criterion(self, plain: ExpertGateStrategy) -> None:
        with trained(Scales) as strategy:
            assert losses(strategy)[0] == pytest.approx(10 * losses(plain)[0])

    def test_forward(self, plain: ExpertGateStrategy) -> None:
        with trained(Negates) as strategy:
            assert hashes(strategy)[0][0] == hashes(plain)[0][0]
            assert losses(strategy)[0] != losses(plain)[0]

    def test_training_epoch(self) -> None:
        with trained(OneBatch) as strategy:
            assert len(losses(strategy)) == 2

    def test_make_train_dataloader(self) -> None:
        with trained(Unshuffled) as strategy:
            assert len(losses(strategy)) == 14

    def test_model_adaptation(self) -> None:
        """What it freezes stays as it is, and the rest learns."""
        with trained(FreezesFeatures) as strategy:
            state, root = expert(strategy), strategy.model.expert.state_dict()
            assert torch.equal(state["features.0.weight"], root["features.0.weight"])
        with trained(NoSteps) as start:
            assert not torch.equal(state["head.weight"], expert(start)["head.weight"])

    def test_check_model_and_optimizer(self, plain: ExpertGateStrategy) -> None:
        with trained(AnotherOptimizer) as strategy:
            assert losses(strategy)[0] == losses(plain)[0]
            assert hashes(strategy) != hashes(plain)

    @pytest.mark.parametrize("cls", [HalvesEvaluation, TwoLosses], ids=["eval_dataset_adaptation", "eval_epoch"])
    def test_evaluation(self, cls: type[ExpertGateStrategy]) -> None:
        counted: list[int] = []
        benchmark = tiny_benchmark((0, 1))

        class Counts(SupervisedPlugin):
            """Counts evaluated samples on the driver."""

            def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
                """Those of this mini-batch."""
                counted.append(len(strategy.mb_y))

        with tiny_strategy(cls=cls) as strategy:
            strategy.train(benchmark.train_stream)
            strategy.plugins.insert(0, Counts())
            strategy.eval(benchmark.test_stream)
        assert sum(counted) == {HalvesEvaluation: 24, TwoLosses: 32}[cls]

    def test_train_and_eval_of_a_subclass_get_the_users_arguments(self) -> None:
        """Loader arguments reach the loaders on the worker and here."""
        benchmark = tiny_benchmark((0,))
        with tiny_strategy(evaluator=epoch_metrics()) as strategy:
            strategy.train(benchmark.train_stream, drop_last=True, shuffle=False, num_workers=0)
            assert len(losses(strategy)) == 6  # 54 samples are three whole batches of 16
            strategy.eval(benchmark.test_stream, num_workers=0, pin_memory=False)


class Clips(SupervisedPlugin):
    """Clips gradients, and notes how large the largest step was."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Clip."""
        nn.utils.clip_grad_norm_(strategy.model.parameters(), 1e-3)
        norm = torch.cat([p.grad.flatten() for p in strategy.model.parameters() if p.grad is not None]).norm()
        note(self.folder, json.dumps(float(norm)))


class Counts(SupervisedPlugin):
    """Keeps a state that must not go from task to task."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.tasks: list[int] = []

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Note every task that this copy has seen."""
        self.tasks.append(strategy.experience.task_label)
        note(self.folder, json.dumps(self.tasks))


def model() -> ExpertGate:
    """A model over a small network."""
    return ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")


class TestPlugins:
    """Avalanche's plugins and users' own."""

    def test_each_task_has_its_own_copy(self, tmp_path: Path) -> None:
        plugin = Counts(tmp_path)
        with tiny_strategy(plugins=[plugin]) as strategy:
            strategy.train(tiny_benchmark((0, 1, 2)).train_stream)
            strategy.train(tiny_benchmark((0, 1, 2, 3)).train_stream[3])
        assert noted(tmp_path)[os.getpid()] == ["[0]", "[1]", "[2]", "[3]"]
        assert plugin.tasks == []

    def test_gradient_clipping(self, tmp_path: Path) -> None:
        with tiny_strategy(plugins=[Clips(tmp_path)], train_epochs=1) as strategy:
            strategy.train(tiny_benchmark((0,)).train_stream)
        norms = [float(line) for line in noted(tmp_path)[os.getpid()]]
        assert len(norms) == 4
        assert max(norms) <= 1.001e-3

    @pytest.mark.parametrize("tasks", [1, 2])
    def test_early_stopping(self, tasks: int) -> None:
        """With a learning rate of 0 nothing improves: every task stops after ``patience`` epochs of its own."""
        gate = model()
        optimizer = torch.optim.SGD(gate.expert.parameters(), lr=0.0)
        early = EarlyStoppingPlugin(patience=2, val_stream_name="valid_stream", metric_name="Top1_Acc_Stream")
        settings = {"model": gate, "optimizer": optimizer, "plugins": [early]}
        with tiny_strategy(**settings, eval_every=1, train_epochs=9, evaluator=epoch_metrics()) as strategy:
            strategy.train(tiny_benchmark(tuple(range(tasks))).train_stream)
            stopped = [len(losses(strategy, task)) // 4 for task in range(tasks)]
            assert all(epochs < 5 for epochs in stopped)
            assert len(set(stopped)) == 1

    def test_early_stopping_restores_the_best_expert(self) -> None:
        """The rate explodes after the first epoch: the expert must be that of the first epoch."""
        gate = model()
        optimizer = torch.optim.SGD(gate.expert.parameters(), lr=0.05)
        early = EarlyStoppingPlugin(
            patience=1, val_stream_name="valid_stream", metric_name="Loss_Exp", mode="min", margin=0.0
        )
        worse = LRSchedulerPlugin(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch == 0 else 20))
        settings = {"model": gate, "optimizer": optimizer, "plugins": [early, worse]}
        with tiny_strategy(**settings, eval_every=1, train_epochs=9, evaluator=epoch_metrics()) as strategy:
            strategy.train(tiny_benchmark((0,)).train_stream)
            assert len(losses(strategy)) < 36

    @pytest.mark.parametrize("schedule", ["epoch", "iteration", "plateau"])
    def test_lr_schedulers(self, schedule: str) -> None:
        gate = model()
        optimizer = torch.optim.SGD(gate.expert.parameters(), lr=0.05)
        if schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1, threshold=1e9)
            plugin = LRSchedulerPlugin(plateau, metric="train_loss")
        else:
            step = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            plugin = LRSchedulerPlugin(step, step_granularity=schedule)
        settings = {"model": gate, "optimizer": optimizer, "plugins": [plugin], "evaluator": epoch_metrics()}
        with tiny_strategy(**settings) as strategy, tiny_strategy(evaluator=epoch_metrics()) as plain:
            strategy.train(tiny_benchmark((0, 1)).train_stream)
            plain.train(tiny_benchmark((0, 1)).train_stream)
            assert [a != b for a, b in zip(hashes(strategy), hashes(plain), strict=True)] == [True, True]
            assert optimizer.param_groups[0]["lr"] == 0.05

    def test_a_plugin_that_cannot_travel_is_named_with_its_attribute(self, tmp_path: Path) -> None:
        class Held(SupervisedPlugin):
            """Holds what no pickle takes."""

            def __init__(self) -> None:
                super().__init__()
                self.fine = 1
                self.the_lock = threading.Lock()

        with tiny_strategy(plugins=[Counts(tmp_path), Held()]) as strategy:
            with pytest.raises(InputError) as caught:
                strategy.train(tiny_benchmark((0,)).train_stream)
            assert strategy.registry.num_rows == 0
        assert "Held" in str(caught.value)
        assert "'the_lock'" in str(caught.value)

    def test_an_attribute_of_a_subclass_that_cannot_travel_is_named(self) -> None:
        with tiny_strategy() as strategy:
            strategy.my_generator = (x for x in range(3))
            with pytest.raises(InputError, match="'my_generator'"):
                strategy.train(tiny_benchmark((0,)).train_stream)


def sgd_with_groups(net: nn.Module) -> torch.optim.Optimizer:
    """Two groups, one of which does not learn."""
    groups = [{"params": net.features.parameters(), "lr": 0.0}, {"params": net.head.parameters(), "weight_decay": 0.01}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)


OPTIMIZERS = {
    "SGD with groups": sgd_with_groups,
    "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=1e-2),
    "Adam amsgrad": lambda net: torch.optim.Adam(net.parameters(), lr=1e-2, amsgrad=True),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1),
    "RMSprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=1e-3),
    "head only": lambda net: torch.optim.SGD(net.head.parameters(), lr=0.05),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: str) -> None:
    """They learn three tasks, one of them without forgetting, and the user's own keeps no state of it."""
    gate = model()
    made = OPTIMIZERS[optimizer](gate.expert)
    settings = {"model": gate, "optimizer": made, "rel_thresh": 0.5, "train_epochs": 4}
    with tiny_strategy(**settings, evaluator=epoch_metrics()) as strategy:
        strategy.train(tiny_benchmark(DOMAINS).train_stream)
        results = strategy.evaluator.get_all_metrics()
        for task in range(3):
            values = results[f"Loss_Epoch/train_phase/train_stream/Task{task:03d}"][1]
            assert values[-1] < values[0]
        state, root = expert(strategy), gate.expert.state_dict()
    frozen = optimizer == "SGD with groups"
    assert torch.equal(state["features.0.weight"], root["features.0.weight"]) == frozen or optimizer == "head only"
    assert not made.state


def test_an_optimizer_that_was_used_before_starts_afresh_for_each_expert() -> None:
    """Its momentum of earlier steps is the user's own: no expert starts with it."""
    outcomes = []
    for used in (False, True):
        gate = model()
        optimizer = torch.optim.Adam(gate.expert.parameters(), lr=1e-2)
        if used:
            start = {name: value.clone() for name, value in gate.expert.state_dict().items()}
            gate.expert(torch.rand(4, *SHAPE)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            gate.expert.load_state_dict(start)
        with tiny_strategy(model=gate, optimizer=optimizer) as strategy:
            strategy.train(tiny_benchmark((0, 1)).train_stream)
            outcomes.append(hashes(strategy))
        assert bool(optimizer.state) == used
    assert outcomes[0] == outcomes[1]


def test_attributes_before_anything() -> None:
    with tiny_strategy() as strategy:
        assert strategy.is_eval
        assert not strategy.is_training
        assert strategy.mbatch is None
        assert strategy.mb_output is None
        assert strategy.experience is None
        assert strategy.adapted_dataset is None
        assert list(strategy.dataloader) == []
        assert list(strategy.current_eval_stream) == []
        assert float(strategy.loss) == 0
        assert (strategy.train_epochs, strategy.train_mb_size, strategy.eval_mb_size) == (2, 16, 16)
        assert strategy.retain_graph is False
        assert strategy.clock.train_iterations == strategy.clock.total_iterations == 0
        assert strategy.plugins[-1] is strategy.clock
        assert strategy.device == torch.device("cpu")
