"""Evaluation inside training: when it happens, what it measures, and that loader arguments reach the loaders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import EarlyStoppingPlugin, EvaluationPlugin
from avalanche.training.supervised import Naive

from distributed_eg import ClusterConfig
from tests.helpers import INLINE, hashes, tiny_benchmark, tiny_net, tiny_strategy

# Ray's workers cannot import a test module: its classes travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Notes(SupervisedPlugin):
    """Writes what it sees where an expert trains, a line of JSON an event, to a file a task."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.last: list[str] = []

    def _note(self, event: str, strategy: Any, **what: Any) -> None:
        at = [strategy.clock.train_exp_epochs, strategy.clock.train_exp_iterations]
        with (self.folder / f"{strategy.experience.current_experience}.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, "at": at, **what}) + "\n")

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """A task begins; in the first place of the list this comes before periodic evaluation."""
        self.last = sorted(strategy.evaluator.get_last_metrics())

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Now the task is known."""
        self._note("begin", strategy, last=self.last)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """An epoch begins, with this loader."""
        loader = strategy.dataloader
        names = ("num_workers", "pin_memory", "drop_last")
        self._note("epoch", strategy, loader={name: getattr(loader, name, None) for name in names}, num=len(loader))

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """A batch."""
        self._note("batch", strategy, y=strategy.mb_y.tolist(), first=round(float(strategy.mb_x[0, 0, 0, 0]), 4))

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """An experience is measured."""
        experience = strategy.experience
        self._note(
            "eval",
            strategy,
            stream=experience.origin_stream.name,
            index=experience.current_experience,
            size=len(experience.dataset),
            model=type(strategy.model).__name__,
            training=strategy.model.training,
            workers=strategy.dataloader.loader_kwargs.get("num_workers"),
        )

    def read(self, task: int, event: str) -> list[dict[str, Any]]:
        """The notes of one kind."""
        path = self.folder / f"{task}.jsonl"
        notes = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [note for note in notes if note["event"] == event]


class Calls(SupervisedPlugin):
    """When Avalanche's own strategy evaluates: after how many epochs and iterations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[int]] = []

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """An experience is measured."""
        self.calls.append([strategy.clock.train_exp_epochs, strategy.clock.train_exp_iterations])


def calls_of_avalanche(eval_every: int, mode: str, epochs: int) -> list[list[int]]:
    """When ``Naive`` evaluates while it learns a task of 54 samples."""
    benchmark = tiny_benchmark((0,), train=54)
    net, calls = tiny_net(), Calls()
    naive = Naive(
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.01),
        train_mb_size=16,
        train_epochs=epochs,
        eval_mb_size=16,
        plugins=[calls],
        evaluator=EvaluationPlugin(loggers=[]),
        eval_every=eval_every,
        peval_mode=mode,
    )
    naive.train(benchmark.train_stream[0], eval_streams=[benchmark.test_stream])
    return calls.calls


def top1(**levels: bool) -> EvaluationPlugin:
    """Accuracy and loss, no loggers."""
    return EvaluationPlugin(accuracy_metrics(**levels), loss_metrics(**levels), loggers=[])


class TestWhen:
    @pytest.mark.parametrize(
        ("mode", "epochs", "eval_every"),
        [
            *(("epoch", epochs, every) for epochs in (2, 3) for every in (-1, 0, 1, 2)),
            *(("iteration", 1, n) for n in (0, 3)),
        ],
    )
    def test_as_often_as_avalanche(self, tmp_path: Path, mode: str, epochs: int, eval_every: int) -> None:
        """Before the task, every n epochs or iterations, and at its end: where Avalanche itself evaluates."""
        notes = Notes(tmp_path)
        settings = {"eval_every": eval_every, "peval_mode": mode, "train_epochs": epochs}
        with tiny_strategy(plugins=[notes], **settings) as strategy:
            strategy.train(tiny_benchmark((0, 1)).train_stream)
        expected = calls_of_avalanche(eval_every, mode, epochs)
        assert (len(expected) == 0) == (eval_every == -1)
        for task in (0, 1):
            assert [note["at"] for note in notes.read(task, "eval")] == expected
            assert len(notes.read(task, "batch")) == 4 * epochs

    def test_it_changes_nothing_of_the_gate(self) -> None:
        """Autoencoders and parents are the same, however often experts are measured. (Experts draw their order of
        samples from the generator that loaders draw from, as Avalanche's do.)"""
        found = []
        for eval_every in (-1, 0, 1):
            with tiny_strategy(eval_every=eval_every, rel_thresh=0.5) as strategy:
                strategy.train(tiny_benchmark((0, 1, 0)).train_stream)
                found.append(([autoencoder for autoencoder, _ in hashes(strategy)], strategy.relatedness))
        assert found[0] == found[1] == found[2]


class TestWhat:
    @pytest.mark.parametrize("labels", [True, False])
    def test_by_default_the_expert_on_its_validation_part(self, tmp_path: Path, labels: bool) -> None:
        """One in ten of 60 samples, by the expert itself: there is no gate inside training."""
        notes, evaluator = Notes(tmp_path), top1(experience=True)
        with tiny_strategy(plugins=[notes], eval_every=1, evaluator=evaluator) as strategy:
            metrics = strategy.train(tiny_benchmark((0, 1), labels=labels).train_stream)
        for task in (0, 1):
            for note in notes.read(task, "eval"):
                assert (note["stream"], note["index"], note["size"]) == ("valid", task, 6)
                assert (note["model"], note["training"]) == ("SingleExpert", False)
        assert not any(name.startswith(("Gate_", "EndToEnd_", "Expert_")) for name in metrics)
        tail = "Task001/Exp001" if labels else "Exp001"
        positions, values = evaluator.get_all_metrics()[f"Top1_Acc_Exp/eval_phase/valid_stream/{tail}"]
        # 4 iterations an epoch, 8 a task: before the second task, and after each of its epochs.
        assert positions == [8, 12, 16]
        assert all(0 <= value <= 1 for value in values)

    def test_streams_given_count_where_they_carry_the_tasks_label(self, tmp_path: Path) -> None:
        notes, benchmark = Notes(tmp_path), tiny_benchmark((0, 1, 2))
        with tiny_strategy(plugins=[notes], eval_every=0, evaluator=top1(experience=True)) as strategy:
            metrics = strategy.train(benchmark.train_stream[:2], eval_streams=[benchmark.test_stream])
            assert {name.split("/", 1)[1] for name in metrics if "eval_phase" in name} == {
                "eval_phase/test_stream/Task000/Exp000",
                "eval_phase/test_stream/Task001/Exp001",
            }
            after = strategy.eval(benchmark.test_stream)
        for task in (0, 1):
            assert {(n["stream"], n["index"], n["size"]) for n in notes.read(task, "eval")} == {("test", task, 24)}
            # The expert measured alone is the expert given the right task.
            tail = f"Exp/eval_phase/test_stream/Task{task:03d}/Exp{task:03d}"
            assert metrics[f"Top1_Acc_{tail}"] == pytest.approx(after[f"Expert_Acc_{tail}"])

    def test_several_streams_and_single_experiences(self, tmp_path: Path) -> None:
        """Each stream is measured by itself, in the order given."""
        notes, benchmark = Notes(tmp_path), tiny_benchmark((0, 1))
        with tiny_strategy(plugins=[notes], eval_every=0) as strategy:
            strategy.train(
                benchmark.train_stream,
                eval_streams=[benchmark.test_stream, benchmark.train_stream[0], benchmark.train_stream[1]],
            )
        for task in (0, 1):
            seen = [(note["stream"], note["index"]) for note in notes.read(task, "eval")]
            assert seen == [("test", task), ("train", task)] * 2

    @pytest.mark.parametrize("streams", [[], "others"])
    def test_no_stream_of_the_tasks_own_means_no_evaluation(self, tmp_path: Path, streams: Any) -> None:
        notes, benchmark = Notes(tmp_path), tiny_benchmark((0, 1))
        chosen = [benchmark.test_stream[1]] if streams == "others" else []
        with tiny_strategy(plugins=[notes], eval_every=1) as strategy:
            strategy.train(benchmark.train_stream[0], eval_streams=chosen)
        assert notes.read(0, "eval") == []
        assert len(notes.read(0, "epoch")) == 2

    def test_the_gates_metrics_come_from_eval_after_the_task(self) -> None:
        benchmark = tiny_benchmark((0, 1))
        with tiny_strategy(eval_every=1, evaluator=top1(experience=True)) as strategy:
            for done, experience in enumerate(benchmark.train_stream, start=1):
                assert not any(name.startswith("Gate_Acc_Exp") for name in strategy.train(experience)) or done > 1
                metrics = strategy.eval(benchmark.test_stream[:done])
                assert sum(name.startswith("Gate_Acc_Exp") for name in metrics) == done


def everything(stepwise: bool, cluster: ClusterConfig, folder: Path, **loaders: Any) -> dict[str, Any]:
    """All that evaluation inside training leaves behind on the driver, and what a plugin saw on the workers."""
    folder.mkdir()
    benchmark = tiny_benchmark((0, 1, 0), labels=False)
    evaluator, notes = top1(epoch=True, experience=True, stream=True), Notes(folder)
    settings: dict[str, Any] = {"rel_thresh": 0.5, "eval_every": 1, "plugins": [notes], "evaluator": evaluator}
    with tiny_strategy(cluster, **settings) as strategy:
        streams = [benchmark.test_stream]
        last: dict[str, Any] = {}
        for part in benchmark.train_stream if stepwise else [benchmark.train_stream]:
            last = strategy.train(part, eval_streams=streams, **loaders)
        seen = {path.name: path.read_text() for path in sorted(folder.iterdir())}
        return {"all": dict(evaluator.get_all_metrics()), "last": last, "seen": seen, "hashes": hashes(strategy)}


def test_a_stream_and_its_steps_give_the_same(tmp_path: Path) -> None:
    whole = everything(False, INLINE, tmp_path / "whole")
    steps = everything(True, INLINE, tmp_path / "steps")
    assert whole == steps
    assert len(whole["seen"]) == 3
    assert "Top1_Acc_Exp/eval_phase/test_stream/Exp002" in whole["last"]


class TestLastMetrics:
    @pytest.mark.parametrize("stepwise", [False, True])
    def test_each_task_starts_without_any(self, tmp_path: Path, stepwise: bool) -> None:
        notes, benchmark = Notes(tmp_path), tiny_benchmark((0, 1, 2))
        evaluator = top1(epoch=True, experience=True, stream=True)
        with tiny_strategy(plugins=[notes], eval_every=0, evaluator=evaluator) as strategy:
            for part in benchmark.train_stream if stepwise else [benchmark.train_stream]:
                strategy.train(part)
                strategy.eval(benchmark.test_stream)
        assert [notes.read(task, "begin")[0]["last"] for task in range(3)] == [[], [], []]

    def test_early_stopping_does_not_inherit_another_tasks_best(self, tmp_path: Path) -> None:
        """A task stops where it stops by itself, whatever was learnt before it, though no rate is left to learn."""
        epochs = []
        for domains in ((0, 1), (3, 1)):
            folder = tmp_path / str(domains[0])
            folder.mkdir()
            notes = Notes(folder)
            stopping = EarlyStoppingPlugin(2, "valid_stream", metric_name="Top1_Acc_Stream")
            with tiny_strategy(
                plugins=[notes, stopping], eval_every=1, evaluator=top1(stream=True), train_epochs=12
            ) as strategy:
                strategy.train(tiny_benchmark(domains, labels=False).train_stream)
            counts = [len(notes.read(task, "batch")) for task in (0, 1)]
            assert all(8 <= count < 48 for count in counts)
            epochs.append(counts)
        alone = tmp_path / "alone"
        alone.mkdir()
        notes = Notes(alone)
        stopping = EarlyStoppingPlugin(2, "valid_stream", metric_name="Top1_Acc_Stream")
        with tiny_strategy(
            plugins=[notes, stopping], eval_every=1, evaluator=top1(stream=True), train_epochs=12
        ) as strategy:
            strategy.train(tiny_benchmark((0,), labels=False).train_stream)
        assert len(notes.read(0, "batch")) == epochs[0][0]


class TestLoaders:
    def test_arguments_reach_the_loaders_where_experts_train(self, tmp_path: Path) -> None:
        notes = Notes(tmp_path)
        with tiny_strategy(plugins=[notes], eval_every=0) as strategy:
            strategy.train(
                tiny_benchmark((0, 1), labels=False).train_stream,
                num_workers=1,
                shuffle=False,
                pin_memory=False,
                drop_last=True,
            )
        for task in (0, 1):
            for epoch in notes.read(task, "epoch"):
                assert epoch["loader"] == {"num_workers": 1, "pin_memory": False, "drop_last": True}
                assert epoch["num"] == 3  # 54 samples in batches of 16; the last 6 are dropped
            batches = [(note["y"], note["first"]) for note in notes.read(task, "batch")]
            assert len(batches) == 6
            assert batches[:3] == batches[3:]  # not shuffled: each epoch the same
            assert all(len(y) == 16 for y, _ in batches)
            assert {note["workers"] for note in notes.read(task, "eval")} == {1}

    def test_shuffled_by_default(self, tmp_path: Path) -> None:
        notes = Notes(tmp_path)
        with tiny_strategy(plugins=[notes]) as strategy:
            strategy.train(tiny_benchmark((0,), labels=False).train_stream)
        batches = [(note["y"], note["first"]) for note in notes.read(0, "batch")]
        assert len(batches) == 8
        assert batches[:4] != batches[4:]
        assert [len(y) for y, _ in batches] == [16, 16, 16, 6] * 2

    def test_loader_processes_change_nothing(self) -> None:
        found = []
        for workers in (0, 1):
            with tiny_strategy(train_epochs=1) as strategy:
                strategy.train(tiny_benchmark((0,), labels=False).train_stream, num_workers=workers, shuffle=False)
                found.append(hashes(strategy))
        assert found[0] == found[1]

    @pytest.mark.parametrize("labels", [True, False])
    def test_evaluation_takes_loader_arguments(self, labels: bool) -> None:
        benchmark = tiny_benchmark((0, 1), labels=labels)
        with tiny_strategy(train_epochs=1) as strategy:
            strategy.train(benchmark.train_stream)
            plain = strategy.eval(benchmark.test_stream)
            assert strategy.eval(benchmark.test_stream, num_workers=1, pin_memory=False, shuffle=False) == plain


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_same_under_ray(tmp_path: Path) -> None:
    """When, what, values, positions, loaders: what a plugin saw on the workers and what reached the driver."""
    loaders = {"num_workers": 1, "shuffle": False, "pin_memory": False, "drop_last": True}
    inline = everything(False, INLINE, tmp_path / "inline", **loaders)
    ray = everything(False, ClusterConfig(num_workers=2, gpus_per_worker=0.5), tmp_path / "ray", **loaders)
    assert ray == inline
    assert '"num_workers": 1' in ray["seen"]["1.jsonl"]
