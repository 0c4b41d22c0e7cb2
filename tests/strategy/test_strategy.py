"""The strategy as its users see it: hooks, plugins, optimizers, metrics, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import hashlib
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, confusion_matrix_metrics, loss_metrics
from avalanche.logging import TextLogger
from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.errors import HookError
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import load_tensors
from tests.helpers import DOMAINS, INLINE, SETTINGS, SHAPE, hashes, tiny_benchmark, tiny_net, tiny_strategy
from tests.inside import manifests_of, registry_of

# Ray's workers cannot import a test module: its classes travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ENGINES = pytest.mark.parametrize(
    "cluster",
    [pytest.param(INLINE, id="inline"), pytest.param(ClusterConfig(num_workers=2), id="ray", marks=[pytest.mark.ray])],
)


@pytest.fixture
def cluster_is_up(cluster: ClusterConfig, request: pytest.FixtureRequest) -> None:
    """Ray where the engine needs it."""
    if cluster.engine == "ray":
        request.getfixturevalue("ray_local")


class Witness(SupervisedPlugin):
    """Writes what it sees in training to a file of each task."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Targets are dataset class ids, outputs as wide as the highest of them."""
        task = strategy.experience.task_label
        width = strategy.mb_output.shape[1]
        line = f"{sorted(set(strategy.mb_y.tolist()))} {width} {len(strategy.plugins)} {strategy.is_training}\n"
        with (self.folder / f"{task}.txt").open("a") as file:
            file.write(line)


class _Broken(torch.nn.Module):
    """A criterion that raises."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Raise."""
        raise RuntimeError("broken on purpose")


class Overriding(ExpertGateStrategy):
    """A user's subclass: trains with a loss ten times as large."""

    def criterion(self) -> Any:
        """Ten times the loss."""
        return 10 * super().criterion()


class TestTraining:
    @ENGINES
    @pytest.mark.usefixtures("cluster_is_up")
    def test_hooks_see_dataset_class_ids_on_the_worker(self, cluster: ClusterConfig, tmp_path: Path) -> None:
        benchmark = tiny_benchmark((0, 1, 2))
        with tiny_strategy(cluster, plugins=[Witness(tmp_path)], train_epochs=1) as strategy:
            strategy.train(benchmark.train_stream)
        for task in range(3):
            lines = (tmp_path / f"{task}.txt").read_text().splitlines()
            assert len(lines) == 4  # 54 training samples in batches of 16
            # our rules, the witness, the evaluator, periodic evaluation and the clock
            assert set(lines) == {f"[{2 * task}, {2 * task + 1}] {2 * task + 2} 5 True"}

    def test_an_overridden_method_acts_on_the_worker(self) -> None:
        experience = tiny_benchmark((0,)).train_stream
        with tiny_strategy() as plain, tiny_strategy(cls=Overriding) as overriding:
            plain.train(experience)
            overriding.train(experience)
            assert hashes(plain)[0][0] == hashes(overriding)[0][0]
            assert hashes(plain)[0][1] != hashes(overriding)[0][1]

    def test_what_the_caller_gave_is_unchanged(self) -> None:
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.05, momentum=0.9)
        plugins: list[Any] = [LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(optimizer, 1))]
        evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
        benchmark = tiny_benchmark((0, 1))
        weights = copy.deepcopy(model.expert.state_dict())
        images = benchmark.train_stream[0].dataset[0][0].clone()
        groups, metrics = copy.deepcopy(optimizer.state_dict()), list(evaluator.metrics)
        with tiny_strategy(model=model, optimizer=optimizer, plugins=plugins, evaluator=evaluator) as strategy:
            own_plugins = list(strategy.plugins)
            strategy.train(benchmark.train_stream)
            strategy.eval(benchmark.test_stream)
            assert strategy.plugins == own_plugins
            assert strategy.optimizer is optimizer
        assert len(plugins) == 1
        assert evaluator.metrics == metrics
        assert evaluator.loggers == []
        assert all(torch.equal(weights[name], value) for name, value in model.expert.state_dict().items())
        assert optimizer.state_dict() == groups
        assert all(p.requires_grad for p in model.expert.parameters())
        assert torch.equal(benchmark.train_stream[0].dataset[0][0], images)

    def test_parameter_groups_and_schedulers_act_on_the_expert(self) -> None:
        """The features' group has learning rate 0: after training only the rest has moved. The head's is new."""
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        optimizer = torch.optim.SGD(
            [
                {"params": model.expert.features.parameters(), "lr": 0.0},
                {"params": model.expert.head.parameters(), "lr": 0.1},
            ],
            lr=0.1,
        )
        scheduler = LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0))
        experience = tiny_benchmark((0,)).train_stream
        with tiny_strategy(model=model, optimizer=optimizer, train_epochs=1) as one:
            one.train(experience)
            state = load_tensors(Storage(one.run_dir or ""), manifests_of(one)[0].expert)
            assert torch.equal(state["features.0.weight"], model.expert.state_dict()["features.0.weight"])
            first = hashes(one)
        # After the first epoch the scheduler sets every rate to 0: further epochs change nothing.
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        optimizer = torch.optim.SGD(
            [
                {"params": model.expert.features.parameters(), "lr": 0.0},
                {"params": model.expert.head.parameters(), "lr": 0.1},
            ],
            lr=0.1,
        )
        scheduler = LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0))
        with tiny_strategy(model=model, optimizer=optimizer, train_epochs=3, plugins=[scheduler]) as three:
            three.train(experience)
            assert hashes(three) == first

    def test_a_failed_label_keeps_its_number_when_it_is_trained_again(self) -> None:
        """Mended and trained again, it gives what an undisturbed run gives."""
        stream = tiny_benchmark((0, 1, 2)).train_stream
        with tiny_strategy() as undisturbed:
            undisturbed.train(stream)
            expected = hashes(undisturbed)
        with tiny_strategy() as strategy:
            strategy.train(stream[0])
            strategy._criterion = _Broken()
            with pytest.raises(HookError, match="broken on purpose"):
                strategy.train(stream[1])
            strategy._criterion = torch.nn.CrossEntropyLoss()
            strategy.train(stream[1])
            strategy.train(stream[2])
            assert hashes(strategy) == expected

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_label_smoothing_stays_finite(self, smoothing: float) -> None:
        """Smoothing spreads weight over every class: it must be the task's own, not the absent ones."""
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
        evaluator = EvaluationPlugin(loss_metrics(epoch=True), loggers=[])
        with tiny_strategy(criterion=criterion, evaluator=evaluator) as strategy:
            metrics = strategy.train(tiny_benchmark((0, 1)).train_stream)
        assert 0 < metrics["Loss_Epoch/train_phase/train_stream/Task001"] < 2

    def test_a_generator_is_read_one_by_one(self) -> None:
        benchmark = tiny_benchmark(DOMAINS)
        with tiny_strategy(**SETTINGS) as listed, tiny_strategy(**SETTINGS) as lazy:
            listed.train(benchmark.train_stream)
            lazy.train(experience for experience in benchmark.train_stream)
            assert hashes(listed) == hashes(lazy)

    def test_one_experience_with_another_label(self) -> None:
        """Labels are names: gaps and any order."""
        stream = tiny_benchmark((0, 1, 2)).train_stream
        with tiny_strategy() as strategy:
            strategy.train([stream[2], stream[0]])
            assert strategy.registry["label"].to_pylist() == [2, 0]
            assert strategy.registry["task"].to_pylist() == [0, 1]

    def test_without_task_labels_the_index_is_the_task(self) -> None:
        benchmark = tiny_benchmark((0, 1, 2), labels=False)
        with tiny_strategy() as strategy:
            strategy.train(benchmark.train_stream)
            assert strategy.registry["label"].to_pylist() == [0, 1, 2]
            metrics = strategy.eval(benchmark.test_stream)
            assert metrics["Gate_Acc_Stream/eval_phase/test_stream"] > 0.9

    def test_periodic_evaluation_measures_the_expert(self) -> None:
        evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
        with tiny_strategy(eval_every=1, evaluator=evaluator) as strategy:
            metrics = strategy.train(tiny_benchmark((0, 1)).train_stream)
        assert "Top1_Acc_Exp/eval_phase/valid_stream/Task001/Exp001" in metrics

    def test_training_metrics_reach_the_drivers_loggers(self, tmp_path: Path) -> None:
        path = tmp_path / "log.txt"
        with path.open("w") as file:
            evaluator = EvaluationPlugin(
                accuracy_metrics(epoch=True, experience=True), loss_metrics(epoch=True), loggers=[TextLogger(file)]
            )
            with tiny_strategy(evaluator=evaluator) as strategy:
                strategy.train(tiny_benchmark((0, 1)).train_stream)
        text = path.read_text()
        assert text.count("Epoch 1 ended.") == 2
        assert text.index("Task 0") < text.index("Task 1")
        positions, values = evaluator.get_all_metrics()["Top1_Acc_Epoch/train_phase/train_stream/Task001"]
        # 4 iterations an epoch: the second task's epochs end after iterations 12 and 16 of the whole run.
        assert positions == [12, 16]
        assert len(values) == 2


class TestEvaluation:
    def test_a_misrouted_sample_costs_a_finite_loss_and_counts_as_wrong(self) -> None:
        """Tasks 0 and 2 share a domain, so the gate errs between them."""
        evaluator = EvaluationPlugin(
            accuracy_metrics(experience=True, stream=True),
            loss_metrics(experience=True),
            confusion_matrix_metrics(num_classes=8, stream=True, save_image=False),
            loggers=[],
        )
        benchmark = tiny_benchmark(DOMAINS)
        with tiny_strategy(evaluator=evaluator, **SETTINGS) as strategy:
            strategy.train(benchmark.train_stream)
            metrics = strategy.eval(benchmark.test_stream)
        tail = "/eval_phase/test_stream/Task000/Exp000"
        assert metrics[f"Gate_Acc_Exp{tail}"] < 1
        assert 0 < metrics[f"Loss_Exp{tail}"] < 17
        assert metrics[f"EndToEnd_Acc_Exp{tail}"] <= metrics[f"Gate_Acc_Exp{tail}"]
        # Class ids are the tasks' own here, so a sample that went astray cannot be right by accident.
        assert metrics[f"Top1_Acc_Exp{tail}"] == pytest.approx(metrics[f"EndToEnd_Acc_Exp{tail}"])

    def test_overlapping_class_ids_do_not_make_a_misrouted_sample_right(self) -> None:
        """Every task has the classes 0 and 1: the class may match though the expert is the wrong one."""
        evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
        benchmark = tiny_benchmark((0, 1, 0), offset=False)
        with tiny_strategy(evaluator=evaluator) as strategy:
            strategy.train(benchmark.train_stream)
            metrics = strategy.eval(benchmark.test_stream)
        tail = "/eval_phase/test_stream/Task000/Exp000"
        assert metrics[f"EndToEnd_Acc_Exp{tail}"] < metrics[f"Top1_Acc_Exp{tail}"]

    def test_the_model_predicts_here_what_eval_measured(self) -> None:
        benchmark = tiny_benchmark(DOMAINS, test=48)
        with tiny_strategy(**SETTINGS, train_epochs=6) as strategy:
            strategy.train(benchmark.train_stream)
            metrics = strategy.eval(benchmark.test_stream)
            model = strategy.model.eval()
        for task, experience in enumerate(benchmark.test_stream):
            images = torch.stack([experience.dataset[i][0] for i in range(48)])
            targets = torch.tensor([experience.dataset[i][1] for i in range(48)])
            # batches as eval_mb_size cut them
            tasks = torch.cat([model.gate(part).tasks for part in images.split(16)])
            predictions = torch.cat([model(part).argmax(1) for part in images.split(16)])
            tail = f"/eval_phase/test_stream/Task{task:03d}/Exp{task:03d}"
            assert (tasks == task).double().mean().item() == metrics[f"Gate_Acc_Exp{tail}"]
            both = ((tasks == task) & (predictions == targets)).double().mean().item()
            assert both == pytest.approx(metrics[f"EndToEnd_Acc_Exp{tail}"])

    def test_a_batch_that_mixes_tasks_is_routed_sample_by_sample(self) -> None:
        benchmark = tiny_benchmark((0, 1, 2))
        with tiny_strategy() as strategy:
            strategy.train(benchmark.train_stream)
            model = strategy.model.eval()
        images = torch.stack([benchmark.test_stream[i % 3].dataset[i][0] for i in range(24)])
        routing = model.gate(images)
        assert routing.tasks.tolist() == [i % 3 for i in range(24)]
        assert routing.confidences.shape == routing.errors.shape == (24, 3)
        outputs = model(images)
        assert outputs.shape == (24, 6)
        assert (outputs.argmax(1) // 2).tolist() == [i % 3 for i in range(24)]

    def test_a_task_that_was_never_trained_counts_as_wrong(self) -> None:
        benchmark = tiny_benchmark((0, 1, 2))
        with tiny_strategy() as strategy:
            strategy.train(benchmark.train_stream[:2])
            metrics = strategy.eval(benchmark.test_stream)
        assert metrics["Gate_Acc_Exp/eval_phase/test_stream/Task002/Exp002"] == 0
        assert metrics["Gate_Acc_Exp/eval_phase/test_stream/Task001/Exp001"] == 1

    def test_own_metrics_are_there_once_whatever_the_evaluator(self) -> None:
        from distributed_eg import gate_metrics

        benchmark = tiny_benchmark((0, 1))
        evaluator = EvaluationPlugin(gate_metrics(), loggers=[])
        with tiny_strategy(evaluator=evaluator) as given, tiny_strategy(evaluator=None) as none:
            given.train(benchmark.train_stream)
            none.train(benchmark.train_stream)
            with_all, own = given.eval(benchmark.test_stream), none.eval(benchmark.test_stream)
            assert with_all.items() >= own.items()
            matrix = with_all["Gate_ConfusionMatrix_Stream/eval_phase/test_stream"]
            assert matrix.tolist() == [[24, 0], [0, 24]]
            assert 0.5 < with_all["Gate_Confidence_Exp/eval_phase/test_stream/Task001/Exp001"] <= 1
        assert all(len(x) == 1 for x, _ in evaluator.get_all_metrics().values())


class TestRun:
    def test_tables_before_training_are_empty(self) -> None:
        with tiny_strategy() as strategy:
            assert strategy.registry.num_rows == 0
            assert strategy.relatedness.num_rows == 0
            assert strategy.run_dir is None

    def test_the_root_is_a_candidate_where_a_reference_is_given(self, tmp_path: Path) -> None:
        benchmark = tiny_benchmark((0, 1))
        reference = tiny_benchmark((5,), train=80).train_stream[0].dataset
        path = tmp_path / "reference.safetensors"
        with tiny_strategy(reference=reference) as strategy:
            strategy.train(benchmark.train_stream)
            rows = strategy.relatedness.to_pylist()
            strategy.save_reference(path)
            expected = hashes(strategy)
        assert [(row["task"], row["candidate"]) for row in rows] == [(0, None), (1, None), (1, 0)]
        assert strategy.registry["transfer"].to_pylist()[0] in ("finetune", "lwf")
        with tiny_strategy(reference=path) as strategy:
            strategy.train(benchmark.train_stream)
            assert hashes(strategy) == expected

    def test_lwf_from_the_root(self) -> None:
        """A threshold that every candidate exceeds: the teacher is the pretrained root with its own head."""
        reference = tiny_benchmark((0,), train=80).train_stream[0].dataset
        with tiny_strategy(reference=reference, rel_thresh=-1e9) as strategy:
            strategy.train(tiny_benchmark((0,)).train_stream)
            manifest = manifests_of(strategy)[0]
        assert (manifest.parent, manifest.transfer) == (None, "lwf")
        assert manifest.distillation > 0

    def test_the_run_directory_names_the_hashes_of_its_files(self, tmp_path: Path) -> None:
        cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"))
        with tiny_strategy(cluster) as strategy:
            strategy.train(tiny_benchmark((0, 1)).train_stream)
            registry = registry_of(strategy)
            for task, (autoencoder, expert) in enumerate(hashes(strategy)):
                folder = tmp_path / "run" / "tasks" / f"{task:05d}"
                found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
                beside = (registry.autoencoders[task].summary, registry.relatedness[task].held_out)
                assert found == {autoencoder, expert, *(artifact.sha256 for artifact in beside if artifact)}
                assert len(found) == 3

    def test_a_temporary_run_lives_as_long_as_the_model(self) -> None:
        benchmark = tiny_benchmark((0, 1))
        strategy = tiny_strategy()
        strategy.train(benchmark.train_stream)
        run_dir = Path(strategy.run_dir or "")
        model = strategy.model.eval()
        strategy.close()
        del strategy
        gc.collect()
        assert model(benchmark.test_stream[0].dataset[0][0][None]).shape == (1, 4)
        assert run_dir.is_dir()
        del model
        gc.collect()
        assert not run_dir.exists()
