"""Every metric and every logger of Avalanche: the same under Ray as inline, and named and placed as Avalanche does."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark, with_classes_timeline
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue, TensorImage
from avalanche.evaluation.metrics import (
    CumulativeAccuracyPluginMetric,
    CumulativeForgettingPluginMetric,
    MAC_metrics,
    WeightCheckpoint,
    accuracy_metrics,
    amca_metrics,
    bwt_metrics,
    class_accuracy_metrics,
    confusion_matrix_metrics,
    cpu_usage_metrics,
    disk_usage_metrics,
    forgetting_metrics,
    forward_transfer_metrics,
    gpu_usage_metrics,
    images_samples_metrics,
    labels_repartition_metrics,
    loss_metrics,
    mean_scores_metrics,
    ram_usage_metrics,
    timing_metrics,
    topk_acc_metrics,
)
from avalanche.evaluation.metrics.acc_matrix import accuracy_matrix_metrics
from avalanche.logging import BaseLogger, CSVLogger, InteractiveLogger, TensorboardLogger, TextLogger, WandBLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch.utils.data import TensorDataset

from distributed_eg import ClusterConfig, ExpertGateStrategy, gate_metrics
from distributed_eg.errors import InputError
from distributed_eg.strategy.training.recording import RecordingLogger
from tests.helpers import INLINE, task_images, tiny_net, tiny_strategy

# Ray's workers cannot import a test module: its classes travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.filterwarnings("ignore:.* silent in training:UserWarning")

DOMAINS = (0, 1, 0)
"""Tasks 0 and 2 share a domain: when task 2 has come, the gate errs between them, so that task 0 is forgotten."""
TRAIN, VALID, TEST, MB, EPOCHS = 36, 12, 24, 16, 2
ALL_LEVELS = {"minibatch": True, "epoch": True, "epoch_running": True, "experience": True, "stream": True}
FOUR_LEVELS = {"minibatch": True, "epoch": True, "experience": True, "stream": True}

METRICS: dict[str, Callable[[], Any]] = {
    "accuracy": lambda: accuracy_metrics(**ALL_LEVELS, trained_experience=True),
    "loss": lambda: loss_metrics(**ALL_LEVELS),
    "forgetting": lambda: forgetting_metrics(experience=True, stream=True),
    "bwt": lambda: bwt_metrics(experience=True, stream=True),
    "forward_transfer": lambda: forward_transfer_metrics(experience=True, stream=True),
    "confusion_matrix": lambda: confusion_matrix_metrics(num_classes=7, save_image=False, stream=True),
    "class_accuracy": lambda: class_accuracy_metrics(**ALL_LEVELS, classes=list(range(6))),
    "class_accuracy of any class": lambda: class_accuracy_metrics(**ALL_LEVELS),
    "amca": lambda: amca_metrics(("test",)),
    "topk": lambda: topk_acc_metrics(top_k=2, **ALL_LEVELS, trained_experience=True),
    "timing": lambda: timing_metrics(**ALL_LEVELS),
    "cpu_usage": lambda: cpu_usage_metrics(**ALL_LEVELS),
    "ram_usage": lambda: ram_usage_metrics(every=0.05, **FOUR_LEVELS),
    "disk_usage": lambda: disk_usage_metrics(paths_to_monitor=[str(Path(__file__).parent)], **FOUR_LEVELS),
    "mac": lambda: MAC_metrics(minibatch=True, epoch=True, experience=True),
    "images_samples": lambda: images_samples_metrics(n_rows=2, n_cols=2, on_train=True, on_eval=True),
    "labels_repartition": lambda: labels_repartition_metrics(on_train=True, on_eval=True, image_creator=None),
    "mean_scores": lambda: mean_scores_metrics(on_train=True, on_eval=True, image_creator=None),
    "accuracy_matrix": accuracy_matrix_metrics,
    "weight_checkpoint": WeightCheckpoint,
    "cumulative": lambda: [CumulativeAccuracyPluginMetric(), CumulativeForgettingPluginMetric()],
}
"""The promise: every helper of avalanche.evaluation.metrics, at every level that it has."""
OURS: dict[str, Callable[[], Any]] = {"gate_metrics": gate_metrics}
MEASURED = ("Time_", "RunningTime_", "CPUUsage_", "RunningCPUUsage_", "MaxRAMUsage_", "DiskUsage_")
"""How the names of metrics begin that measure the machine: they agree in name and position, not in value."""
OWN = ("Gate_Acc", "Expert_Acc", "EndToEnd_Acc")
"""How the names begin that ``eval`` reports whatever the evaluator holds."""

COMPARES_TASKS = ("forgetting", "bwt", "forward_transfer", "accuracy_matrix", "cumulative")
"""Metrics that are silent in training, with a warning."""
HISTORIES = ("class_accuracy of any class", "labels_repartition")
"""Metrics that go on naming the classes of every task before, whereas here each task starts with an empty one."""

Series = list[tuple[str, int, Any]]


def three_tasks() -> CLScenario:
    """Three tasks of two classes, with a validation stream of their own."""

    def dataset(task: int, count: int, seed: int) -> Any:
        images, targets = task_images(DOMAINS[task], count, seed)
        targets = targets + 2 * task
        leaf = TensorDataset(images, targets)
        leaf.targets = targets.tolist()  # type: ignore[attr-defined]
        return as_classification_dataset(leaf)

    sizes = {"train": TRAIN, "valid": VALID, "test": TEST}
    scenario = benchmark_from_datasets(
        **{
            name: [dataset(task, size, 100 * place + task) for task in range(len(DOMAINS))]
            for place, (name, size) in enumerate(sizes.items())
        }
    )
    return with_classes_timeline(task_incremental_benchmark(scenario))


class Spy(BaseLogger):
    """Keeps what the evaluator says, in order, and which of it outside of training."""

    def __init__(self) -> None:
        super().__init__()
        self.said: Series = []
        self.outside: Series = []
        self.training = False

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        """Keep it."""
        self.said.append((name, x_plot, value))
        if not self.training:
            self.outside.append((name, x_plot, value))

    def before_training(self, *_: Any) -> None:
        """Training begins."""
        self.training = True

    def after_training(self, *_: Any) -> None:
        """Training has ended."""
        self.training = False


def plain(value: Any) -> Any:
    """A metric value as numbers that ``==`` compares."""
    if isinstance(value, TensorImage):
        return value.image.tolist()
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if hasattr(value, "alternatives"):
        return [plain(part) for part in value.alternatives]
    return value


def comparable(series: Series) -> Series:
    """Names, positions and values, but for those that measure the machine."""
    return [(name, x, None if name.startswith(MEASURED) else plain(value)) for name, x, value in series]


def without_own(series: Series) -> list[tuple[str, int]]:
    """Names and positions of what the user's own metrics say."""
    return [(name, x) for name, x, _ in series if not name.startswith(OWN)]


def learn(strategy: Any, *, parallel: bool = False, before: bool = True, between: bool = True) -> list[dict[str, Any]]:
    """Train three tasks, the first two in one call or each in its own, and evaluate; what every call returned.

    Args:
        strategy: ours or Avalanche's.
        parallel: train the first two in one call.
        before: evaluate before anything is trained.
        between: evaluate after every call of ``train``, not only in the end.
    """
    benchmark = three_tasks()
    train, valid, test = benchmark.train_stream, benchmark.streams["valid"], benchmark.test_stream
    extra = {"valid_stream": valid} if isinstance(strategy, ExpertGateStrategy) else {}
    torch.manual_seed(0)  # image samples are drawn
    returned = [strategy.eval(test)] if before else []
    for part in ((0, 1), (2,)) if parallel else ((0,), (1,), (2,)):
        streams = [[valid[task] for task in part]]
        returned.append(strategy.train([train[task] for task in part], eval_streams=streams, **extra))
        if between or part[-1] == 2:
            torch.manual_seed(1)
            returned.append(strategy.eval(test))
    return returned


def evaluator_of(metrics: Sequence[Any], *loggers: BaseLogger) -> EvaluationPlugin:
    """An evaluator over them."""
    return EvaluationPlugin(*metrics, loggers=list(loggers))


def naive(evaluator: EvaluationPlugin, eval_every: int = 0) -> Naive:
    """Avalanche's plain strategy, with the same numbers."""
    net = tiny_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    sizes = {"train_mb_size": MB, "train_epochs": EPOCHS, "eval_mb_size": MB}
    return Naive(model=net, optimizer=optimizer, device="cpu", evaluator=evaluator, eval_every=eval_every, **sizes)


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in HISTORIES])
def test_names_and_positions_are_those_of_avalanches_own_loop(metric: str) -> None:
    """Avalanche's ``Naive`` on the same stream says the same names, at the same positions, in the same order.

    But in training an expert knows nothing of the tasks before: there what compares tasks is silent.
    """
    theirs, ours = Spy(), Spy()
    before = metric != "accuracy_matrix"  # which cannot be evaluated before it was trained
    every = -1 if metric == "cumulative" else 0  # its first value is that of its first evaluation, in training too
    learn(naive(evaluator_of([METRICS[metric]()], theirs), every), before=before)
    with tiny_strategy(evaluator=evaluator_of([METRICS[metric]()], ours), eval_every=every) as strategy:
        learn(strategy, before=before)
    said = [without_own(spy.outside if metric in COMPARES_TASKS else spy.said) for spy in (theirs, ours)]
    assert (ours.outside == ours.said) or metric not in COMPARES_TASKS
    assert said[0], "the metric says nothing: it proves nothing"
    assert said[1] == said[0]


@pytest.mark.parametrize("metric", [name for name in [*METRICS, *OURS] if name != "accuracy_matrix"])
def test_one_call_says_what_a_call_for_each_task_says(metric: str) -> None:
    """A stream at once, whose tasks may train in parallel, or experience by experience: every value in training is
    the same, and so is every evaluation in the end, but for what remembers evaluations that were not made."""
    factory = {**METRICS, **OURS}[metric]
    once, stepwise = Spy(), Spy()
    for spy, parallel in ((once, True), (stepwise, False)):
        with tiny_strategy(evaluator=evaluator_of([factory()], spy), eval_every=0) as strategy:
            learn(strategy, parallel=parallel, between=False)
    assert comparable(once.said) == comparable(stepwise.said)


CALLBACKS = sorted(name for name in dir(SupervisedPlugin) if name.startswith(("before_", "after_")))


class Hears(BaseLogger):
    """A user's logger with a method for some callbacks: what it was called with, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[Any, ...]] = []


def hears(*callbacks: str) -> Hears:
    """A logger with a method for each of ``callbacks``."""

    def method(name: str) -> Any:
        def hear(self: Hears, strategy: Any, metric_values: Sequence[MetricValue]) -> None:
            experience = strategy.experience
            # Before anything, Avalanche knows no experience, and between two of them it knows the last one.
            known = name not in ("before_training", "before_eval")
            where = (experience.origin_stream.name, experience.current_experience) if known else None
            said = [(value.name, value.x_plot) for value in metric_values]
            self.heard.append((name, where, strategy.is_training, strategy.clock.train_iterations, said))

        return hear

    return type("Hears", (Hears,), {name: method(name) for name in callbacks})()


@pytest.mark.parametrize("callbacks", [CALLBACKS, ["after_backward", "before_eval_forward"], []], ids=len)
def test_a_users_logger_hears_the_callbacks_that_it_has(callbacks: list[str]) -> None:
    """All 26, in Avalanche's order, with the experience that is trained or measured, the clock, and the values."""
    theirs, ours = hears(*callbacks), hears(*callbacks)
    learn(naive(evaluator_of([METRICS["accuracy"]()], theirs)), before=False)
    with tiny_strategy(evaluator=evaluator_of([METRICS["accuracy"]()], ours), eval_every=0) as strategy:
        learn(strategy, before=False)
    said = [
        [(*event, [value for value in said if not value[0].startswith(OWN)]) for *event, said in logger.heard]
        for logger in (theirs, ours)
    ]
    assert said[1] == said[0]
    assert {event[0] for event in said[1]} == set(callbacks)


def test_a_log_without_values_is_short() -> None:
    """Callbacks of every iteration hardly make the log longer that travels to the driver: a few bytes each."""
    recorder = RecordingLogger([], frozenset(CALLBACKS))
    strategy: Any = SimpleNamespace(dataloader=range(9), experience=None, is_training=True)
    for _ in range(1000):
        for callback in CALLBACKS:
            getattr(recorder, callback)(strategy, [])
    assert len(recorder.records) == 26_000
    assert len(pickle.dumps(recorder.records)) < 4 * 26_000


def test_the_text_logger_names_the_stream_that_is_measured() -> None:
    """In training as after it."""
    text = io.StringIO()
    with tiny_strategy(evaluator=evaluator_of([], TextLogger(text)), eval_every=0) as strategy:
        benchmark = three_tasks()
        strategy.train(benchmark.train_stream[:2], eval_streams=[benchmark.test_stream])
        strategy.train(benchmark.train_stream[2])
    starts = [line for line in text.getvalue().splitlines() if line.startswith("-- Starting")]
    assert starts == [
        f"-- Starting {phase} on experience {task} (Task {task}) from {stream} stream --"
        for task, measured in enumerate(("test", "test", "valid"))
        for phase, stream in (("eval", measured), ("training", "train"), ("eval", measured))
    ]


@pytest.mark.parametrize("before", [True, False])
def test_forward_transfer_begins_at_the_root(before: bool) -> None:
    """Whether somebody evaluated before training or not: its first value is the root's, as Avalanche's is the model's
    before training."""
    spy = Spy()
    with tiny_strategy(evaluator=evaluator_of([METRICS["forward_transfer"]()], spy), eval_every=0) as strategy:
        learn(strategy, before=before)
    found = [value for value in spy.said if value[0].startswith(("Experience", "Stream")) and value[1]]
    with tiny_strategy(evaluator=evaluator_of([METRICS["accuracy"]()]), eval_every=0) as strategy:
        results = learn(strategy)
    names = [f"Top1_Acc_Exp/eval_phase/test_stream/Task{task:03d}/Exp{task:03d}" for task in range(3)]
    start, first, second = (results[call] for call in (0, 2, 4))
    gained = [after[names[task]] - start[names[task]] for task, after in ((1, first), (2, second))]
    assert [value for name, _, value in found if name.startswith("Experience")] == pytest.approx(gained)
    assert [value for name, _, value in found if name.startswith("Stream")][:2] == pytest.approx(
        [gained[0], sum(gained) / 2]
    )


def test_forward_transfer_of_experiences_that_come_later() -> None:
    """Avalanche knows no first value of what its first evaluation left out, and fails."""
    benchmark, evaluator = three_tasks(), evaluator_of([METRICS["forward_transfer"]()])
    with tiny_strategy(evaluator=evaluator, eval_every=0) as strategy:
        strategy.train(benchmark.train_stream[0])
        strategy.eval(benchmark.test_stream[0])
        strategy.train(benchmark.train_stream[1])
        answer = strategy.eval(benchmark.test_stream)
    assert [name for name in answer if name.startswith("ExperienceForward")] == [
        "ExperienceForwardTransfer/eval_phase/test_stream/Task002/Exp002"
    ]


@pytest.mark.parametrize("metric", COMPARES_TASKS)
def test_metrics_that_compare_tasks_are_named_where_they_are_silent(metric: str) -> None:
    """With evaluation in training asked for; without it Avalanche, too, has only ``eval``."""
    with pytest.warns(UserWarning, match="silent in training, .* call eval after each train"):
        tiny_strategy(evaluator=evaluator_of([METRICS[metric]()]), eval_every=1).close()
    if metric == "forward_transfer":
        with pytest.raises(InputError, match="eval_every"):
            tiny_strategy(evaluator=evaluator_of([METRICS[metric]()]))
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*silent in training")
            tiny_strategy(evaluator=evaluator_of([METRICS[metric]()])).close()


def test_checkpoints_of_an_expert_that_learns_without_forgetting() -> None:
    """``WeightCheckpoint`` copies and pickles the model beside a metric that runs it: at LwF too."""
    evaluator = evaluator_of([METRICS["mac"](), METRICS["weight_checkpoint"]()])
    with tiny_strategy(evaluator=evaluator, rel_thresh=-1e9) as strategy:
        learn(strategy, before=False, between=False)
        assert strategy.registry["transfer"].to_pylist() == ["fresh", "lwf", "lwf"]
    names = [name for name in evaluator.get_all_metrics() if name.startswith("WeightCheckpoint")]
    assert len(names) == 3


def evaluated(series: Series, name: str) -> list[float]:
    """Values of a metric over the test stream, in order."""
    return [value for said, _, value in series if said == name]


@pytest.mark.parametrize("eval_every", [0, 1])
def test_forgetting_and_transfer_are_what_the_accuracies_say(eval_every: int) -> None:
    spy = Spy()
    metrics = [METRICS[name]() for name in ("accuracy", "forgetting", "bwt", "forward_transfer")]
    with tiny_strategy(evaluator=evaluator_of(metrics, spy), eval_every=eval_every) as strategy:
        learn(strategy)
    tail = [f"/eval_phase/test_stream/Task{task:03d}/Exp{task:03d}" for task in range(3)]
    accuracies = [evaluated(spy.said, f"Top1_Acc_Exp{end}") for end in tail]  # by task, then by evaluation
    # Forgotten: the accuracy right after the task was trained, less the accuracy now.
    forgotten = [accuracies[0][1] - accuracies[0][3], accuracies[1][2] - accuracies[1][3]]
    assert forgotten[0] > 0
    for task in (0, 1):
        assert evaluated(spy.said, f"ExperienceForgetting{tail[task]}")[-1] == pytest.approx(forgotten[task])
        assert evaluated(spy.said, f"ExperienceBWT{tail[task]}")[-1] == pytest.approx(-forgotten[task])
    stream = "/eval_phase/test_stream"
    assert evaluated(spy.said, f"StreamForgetting{stream}")[-1] == pytest.approx(sum(forgotten) / 2)
    assert evaluated(spy.said, f"StreamBWT{stream}")[-1] == pytest.approx(-sum(forgotten) / 2)
    # Forward transfer: the accuracy after the task before was trained, less that before anything was.
    gained = [accuracies[task][task] - accuracies[task][0] for task in (1, 2)]
    for task in (1, 2):
        assert evaluated(spy.said, f"ExperienceForwardTransfer{tail[task]}") == [pytest.approx(gained[task - 1])]
    assert evaluated(spy.said, f"StreamForwardTransfer{stream}")[-1] == pytest.approx(sum(gained) / 2)


def test_positions_are_the_runs_iterations() -> None:
    """Three iterations an epoch, two epochs a task: position 3 of task 1's first epoch is 9 in the run."""
    evaluator = evaluator_of([accuracy_metrics(minibatch=True, epoch=True, experience=True)])
    with tiny_strategy(evaluator=evaluator) as strategy:
        learn(strategy, parallel=True)
        assert strategy.clock.train_iterations == 18
        assert strategy.clock.train_exp_counter == 3
    results = evaluator.get_all_metrics()
    for task in range(3):
        tail = f"train_phase/train_stream/Task{task:03d}"
        assert results[f"Top1_Acc_Epoch/{tail}"][0] == [6 * task + 3, 6 * task + 6]
        assert len(results[f"Top1_Acc_MB/{tail}"][0]) == 6
    assert results["Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp000"][0] == [0, 12, 18]


def test_get_last_metrics_is_what_train_and_eval_return() -> None:
    evaluator = evaluator_of([accuracy_metrics(epoch=True, experience=True, stream=True)])
    with tiny_strategy(evaluator=evaluator) as strategy:
        returned = learn(strategy, parallel=True)
        assert returned[-1] == evaluator.get_last_metrics()
    assert {name for answer in returned for name in answer} == set(evaluator.get_all_metrics())


def test_an_evaluator_that_collects_nothing() -> None:
    evaluator = EvaluationPlugin(accuracy_metrics(epoch=True, stream=True), loggers=[], collect_all=False)
    with tiny_strategy(evaluator=evaluator) as strategy:
        returned = learn(strategy, parallel=True)
        assert "Top1_Acc_Epoch/train_phase/train_stream/Task002" in returned[-1]
        assert evaluator.get_all_metrics() == {}


class Overheard(PluginMetric[int]):
    """A user's metric that counts the hooks that it gets, and says how many when a task ends."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def reset(self) -> None:
        """Count anew."""
        self.count = 0

    def result(self) -> int:
        """Hooks so far."""
        return self.count

    def after_training_iteration(self, strategy: Any) -> None:
        """One iteration."""
        self.count += 1

    def after_training_exp(self, strategy: Any) -> MetricValue:
        """A single value, not a list: Avalanche takes both."""
        return MetricValue(self, f"Overheard/Exp{strategy.experience.current_experience}", self.count, self.count)


def test_a_users_own_metric_speaks_once_a_task() -> None:
    """Each task begins with a fresh copy: it counts its own six iterations; the value may be no list."""
    evaluator = evaluator_of([Overheard()])
    with tiny_strategy(evaluator=evaluator) as strategy:
        learn(strategy, parallel=True)
    found = {name: values for name, (_, values) in evaluator.get_all_metrics().items() if name.startswith("Overheard")}
    assert found == {f"Overheard/Exp{task}": [6] for task in range(3)}


def test_gpu_usage_is_refused_or_measured_as_avalanche_does() -> None:
    """It calls nvidia-smi; where there is none it cannot work anywhere."""
    try:
        metrics = gpu_usage_metrics(0, **FOUR_LEVELS)
    except Exception as error:
        pytest.skip(f"Avalanche's own gpu_usage_metrics cannot be made here: {error}")
    evaluator = evaluator_of([metrics])
    with tiny_strategy(evaluator=evaluator) as strategy:
        learn(strategy, parallel=True)
    assert any(name.startswith("MaxGPU") for name in evaluator.get_all_metrics())


# Loggers: what a run leaves behind in each, read back as text or numbers


def text_logger(folder: Path) -> TextLogger:
    """To a file."""
    return TextLogger((folder / "log.txt").open("w"))


def numbers_of_csv(folder: Path) -> Any:
    """Rows of both files."""
    return [list(csv.reader((folder / "csv" / f"{name}_results.csv").open())) for name in ("training", "eval")]


def scalars_of_tensorboard(folder: Path) -> Any:
    """Every scalar: name, steps, values; names of the other kinds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "board"), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    found: dict[str, Any] = {}
    for name in sorted(tags["scalars"]):
        points = events.Scalars(name)
        found[name] = [(p.step, None if name.startswith(MEASURED) else p.value) for p in points]
    return found, sorted(tags["images"]), sorted(tags["histograms"])


class Listening:
    """Stands before the module wandb and keeps what the logger gave it."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        """Keep it, and let wandb have it."""
        self.logged.append((step, {k: v for k, v in values.items() if isinstance(v, int | float)}))
        self.module.log(values, step=step)

    def Image(self, pixels: Any) -> str:
        """In place of an image: newer wandb refuses the shape that Avalanche 0.6 gives it."""
        return f"an image of shape {pixels.shape}"

    @property
    def viz(self) -> Any:
        """Where Avalanche 0.6 looks for the class of charts; newer wandb has it elsewhere."""
        return getattr(self.module, "viz", self.module.plot)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def times_away(text: str) -> str:
    """A text without what the machine measured, and without the rates of progress bars."""
    kept = [line for line in text.split("\n") if not line.strip().startswith(MEASURED)]
    return re.sub(r"\[[\d:?]+<[\d:?]+, *[^\]]*\]", "[]", "\n".join(kept))


@pytest.fixture(scope="module")
def wandb_offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where wandb keeps its runs, without the network."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}.items():
            patch.setenv(name, value)
        yield folder
        import wandb

        wandb.finish()


class Said:
    """What a run said, through every logger and by itself."""

    def __init__(self, cluster: ClusterConfig, folder: Path, wandb_folder: Path) -> None:
        folder.mkdir()
        # The matrix cannot be evaluated before training; a checkpoint pickles the network's class by its name, which a
        # class that came to the worker by value has not.
        left_out = ("accuracy_matrix", "weight_checkpoint")
        factories = [f for name, f in {**METRICS, **OURS}.items() if name not in left_out]
        spy, terminal = Spy(), io.StringIO()
        with contextlib.redirect_stdout(terminal):
            interactive = InteractiveLogger()
        board, table = TensorboardLogger(str(folder / "board")), CSVLogger(str(folder / "csv"))
        text = text_logger(folder)
        # An id of its own: Avalanche 0.6 makes one by a function that newer wandb has not.
        params = {"mode": "offline", "id": folder.name, "reinit": "finish_previous"}
        cloud = WandBLogger(dir=str(wandb_folder), run_name=folder.name, params=params, save_code=False)
        cloud.wandb = Listening(cloud.wandb)
        evaluator = evaluator_of([f() for f in factories], spy, interactive, board, table, text, cloud)
        with (
            contextlib.redirect_stdout(terminal),
            tiny_strategy(cluster, evaluator=evaluator, eval_every=1) as strategy,
        ):
            self.returned = learn(strategy, parallel=True)
            self.clock = {name: value for name, value in vars(strategy.clock).items() if isinstance(value, int)}
        board.writer.flush()
        text.file.close()
        table.close()
        self.series = spy.said
        self.all = {name: (list(xs), list(values)) for name, (xs, values) in evaluator.get_all_metrics().items()}
        self.text = times_away((folder / "log.txt").read_text())
        self.interactive = times_away(terminal.getvalue())
        self.rows = numbers_of_csv(folder)
        self.board = scalars_of_tensorboard(folder)
        self.cloud = [
            (step, {k: None if k.startswith(MEASURED) else v for k, v in values.items()})
            for step, values in cloud.wandb.logged
        ]


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, wandb_offline: Path) -> Said:
    """Every metric and every logger, inline."""
    return Said(INLINE, tmp_path_factory.mktemp("said") / "inline", wandb_offline)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory, wandb_offline: Path, ray_local: None) -> Said:
    """The same on two workers."""
    cluster = ClusterConfig(num_workers=2)
    return Said(cluster, tmp_path_factory.mktemp("said") / "ray", wandb_offline)


def test_every_metric_and_logger_says_something(inline: Said) -> None:
    """Without this, two empty logs would count as equal."""
    beginnings = {name.split("/")[0] for name, _, _ in inline.series}
    assert len(beginnings) > 50
    assert inline.text.count("Epoch 1 ended.") == 2 * 3 // 2
    assert "100%" in inline.interactive
    assert len(inline.rows[0]) == 1 + EPOCHS * 3
    assert len(inline.rows[1]) == 1 + 3 * 3
    assert len(inline.board[0]) > 50
    assert len(inline.cloud) > 100
    assert all(math.isfinite(value) for _, _, value in inline.series if isinstance(value, float))


@pytest.mark.ray
class TestRayAsInline:
    """One run with every metric and every logger on two workers, against the same run inline."""

    def test_names_values_and_positions_in_order(self, inline: Said, ray: Said) -> None:
        assert [(name, x) for name, x, _ in ray.series] == [(name, x) for name, x, _ in inline.series]
        assert comparable(ray.series) == comparable(inline.series)

    @pytest.mark.parametrize("beginning", ["Top1_Acc", "Loss", "StreamForgetting", "ConfusionMatrix", "Gate_"])
    def test_all_metrics(self, inline: Said, ray: Said, beginning: str) -> None:
        """By name, so that a failure names the metric."""

        def of(said: Said) -> dict[str, Any]:
            return {
                name: (xs, plain_all(values)) for name, (xs, values) in said.all.items() if name.startswith(beginning)
            }

        assert of(inline)
        assert of(ray) == of(inline)

    def test_what_train_and_eval_return(self, inline: Said, ray: Said) -> None:
        assert [list(answer) for answer in ray.returned] == [list(answer) for answer in inline.returned]
        for ours, theirs in zip(ray.returned, inline.returned, strict=True):
            assert comparable([(n, 0, v) for n, v in ours.items()]) == comparable(
                [(n, 0, v) for n, v in theirs.items()]
            )

    def test_the_clock(self, inline: Said, ray: Said) -> None:
        assert ray.clock == inline.clock

    def test_text_logger(self, inline: Said, ray: Said) -> None:
        assert ray.text.split("\n") == inline.text.split("\n")

    def test_interactive_logger(self, inline: Said, ray: Said) -> None:
        assert last_of_bars(ray.interactive) == last_of_bars(inline.interactive)

    def test_csv_logger(self, inline: Said, ray: Said) -> None:
        assert ray.rows == inline.rows

    def test_tensorboard_logger(self, inline: Said, ray: Said) -> None:
        assert ray.board == inline.board

    def test_wandb_logger(self, inline: Said, ray: Said) -> None:
        assert ray.cloud == inline.cloud


def plain_all(values: Sequence[Any]) -> list[Any]:
    """Each of them as numbers."""
    return [plain(value) for value in values]


def last_of_bars(text: str) -> list[str]:
    """Lines of a terminal: what a progress bar shows at last, without the rests of its redraws."""
    return [line.split("\r")[-1].rstrip() for line in text.replace("\x1b[A", "").split("\n")]
