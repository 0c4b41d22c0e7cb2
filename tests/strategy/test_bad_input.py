"""Bad input gets one clear sentence and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation import PluginMetric
from avalanche.training.plugins import EvaluationPlugin
from torch.utils.data import TensorDataset

from distributed_eg import ClusterConfig, ExpertGate
from distributed_eg.errors import (
    BackboneError,
    DivergedError,
    ExpertGateError,
    HookError,
    InputError,
    ResourceError,
    StorageError,
    TaskFailedError,
)
from tests.helpers import SHAPE, hashes, task_images, tiny_benchmark, tiny_net, tiny_strategy


def experience(images: torch.Tensor, targets: torch.Tensor) -> Any:
    """One training experience; with the label 0 where Avalanche can give it one, which it cannot without samples."""
    leaf = TensorDataset(images, targets)
    leaf.targets = targets.tolist()  # type: ignore[attr-defined]
    scenario = benchmark_from_datasets(train=[as_classification_dataset(leaf)])
    return (task_incremental_benchmark(scenario) if len(images) else scenario).train_stream[0]


def one_sentence(error: BaseException) -> str:
    """The message, which must be a single line."""
    message = str(error)
    assert message
    assert "\n" not in message
    return message


def images_with_nan() -> torch.Tensor:
    """One bad pixel among many good ones."""
    images, _ = task_images(0, 40, 1)
    images[17, 0, 3, 3] = torch.nan
    return images


@pytest.mark.parametrize(
    ("images", "targets", "says"),
    [
        (torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.long), "no samples"),
        (torch.rand(40, 1, 16, 16), torch.arange(40) % 2, "(1, 16, 16)"),
        (torch.rand(40, 3, 20, 16), torch.arange(40) % 2, "shape=(3, 16, 16)"),
        (images_with_nan(), torch.arange(40) % 2, "NaN"),
        (torch.rand(40, *SHAPE), torch.arange(40) % 2 - 1, "negative class id -1"),
    ],
    ids=["no samples", "channels", "size", "nan", "negative class"],
)
def test_an_experience_that_cannot_be_used(images: torch.Tensor, targets: torch.Tensor, says: str) -> None:
    with tiny_strategy() as strategy:
        with pytest.raises(InputError) as caught:
            strategy.train(experience(images, targets))
        assert says in one_sentence(caught.value)
        assert strategy.registry.num_rows == 0
        # and the strategy goes on
        strategy.train(tiny_benchmark((0,)).train_stream)
        assert strategy.registry.num_rows == 1


def test_targets_outside_the_declared_classes() -> None:
    bad = experience(torch.rand(40, *SHAPE), torch.arange(40) % 3)
    bad.classes_in_this_experience = [0, 1]
    with tiny_strategy() as strategy:
        with pytest.raises(InputError) as caught:
            strategy.train(bad)
        message = one_sentence(caught.value)
    assert "[0, 1]" in message
    assert "[2]" in message


def test_a_bad_experience_in_a_list_is_found_before_any_work() -> None:
    good = tiny_benchmark((0,), labels=False).train_stream[0]
    empty = experience(torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.long))
    with tiny_strategy() as strategy:
        with pytest.raises(InputError, match="no samples"):
            strategy.train([good, empty])
        assert strategy.run_dir is None


def test_a_label_that_was_trained_already_where_that_is_refused() -> None:
    stream = tiny_benchmark((0, 1)).train_stream
    with tiny_strategy(on_repeat="error") as strategy:
        strategy.train(stream)
        before = hashes(strategy)
        with pytest.raises(InputError, match="Label 1 was trained already, as task 1, and on_repeat='error'"):
            strategy.train(stream[1])
        assert hashes(strategy) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"arch": "alexnett", "pretrained_flag": False}, "'alexnett' is unknown"),
        ({"arch": "alexnet", "pretrained_flag": False, "shape": (3, 8, 8)}, "cannot take images of shape (3, 8, 8)"),
        ({"arch": "alexnet", "pretrained_flag": False, "shape": (1, 224, 224)}, "cannot take images"),
        ({"arch": "alexnet", "weights": "NO_SUCH_V1"}, "NO_SUCH_V1"),
        ({"arch": tiny_net(), "output_layer_name": "nowhere"}, "no layer 'nowhere'"),
        ({"arch": tiny_net(), "shape": (16, 16)}, "(channels, height, width)"),
    ],
)
def test_a_backbone_that_cannot_be_used(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(BackboneError) as caught:
        ExpertGate(**{"shape": SHAPE, **arguments})
    assert says in one_sentence(caught.value)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(tiny_net().state_dict(), path)
    with pytest.raises(BackboneError) as caught:
        ExpertGate((3, 64, 64), arch="resnet18", weights=str(path))
    assert "another architecture than resnet18" in one_sentence(caught.value)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_more_than_any_node_has_is_refused_at_once() -> None:
    with tiny_strategy(ClusterConfig(num_workers=1, cpus_per_worker=4, gpus_per_worker=1)) as strategy:
        with pytest.raises(ResourceError) as caught:
            strategy.train(tiny_benchmark((0,)).train_stream)
        message = one_sentence(caught.value)
    assert "4 CPU and 1 GPU" in message
    assert "2 CPU, 2 GPU" in message


def test_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for storage in (str(tmp_path / "file" / "run"), "nonsense://bucket/run"):
        with tiny_strategy(ClusterConfig(engine="inline", storage=storage)) as strategy:
            with pytest.raises(StorageError) as caught:
                strategy.train(tiny_benchmark((0,)).train_stream)
            assert storage in one_sentence(caught.value)


def test_a_storage_that_holds_a_run(tmp_path: Path) -> None:
    cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"))
    with tiny_strategy(cluster) as strategy:
        strategy.train(tiny_benchmark((0,)).train_stream)
    with tiny_strategy(cluster) as strategy, pytest.raises(StorageError, match="already holds a run"):
        strategy.train(tiny_benchmark((0,)).train_stream)


def test_a_diverging_loss_fails_its_task_and_commits_nothing_of_it() -> None:
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=1e30)
    with tiny_strategy(model=model, optimizer=optimizer, train_epochs=5) as strategy:
        with pytest.raises(DivergedError) as caught:
            strategy.train(tiny_benchmark((0,)).train_stream)
        message = one_sentence(caught.value)
        assert strategy.registry.num_rows == 0
    assert "task 0 (label 0)" in message
    assert "learning rate 1e+30" in message


class FailsOnTaskOne(SupervisedPlugin):
    """Raises in task 1."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The hook that raises."""
        if strategy.experience.task_label == 1:
            raise KeyError("a user's mistake")


def test_a_task_that_fails_does_not_take_the_others_with_it() -> None:
    """Task 1 fails; tasks 2 and 3 start from task 0 and are committed. The error carries the worker's traceback."""
    with tiny_strategy(plugins=[FailsOnTaskOne()]) as strategy:
        with pytest.raises(HookError) as caught:
            strategy.train(tiny_benchmark((0, 1, 0, 0)).train_stream)
        assert strategy.registry["label"].to_pylist() == [0, 2, 3]
        strategy.eval(tiny_benchmark((0, 1, 0, 0)).test_stream)
    message = str(caught.value)
    first = message.splitlines()[0]
    assert "task 1 (label 1)" in first
    assert "the plugin FailsOnTaskOne in before_training_exp" in first
    assert 'KeyError: "a user\'s mistake"' in first
    assert "Traceback" in message
    assert 'raise KeyError("a user' in message


class FailsAndStarves(SupervisedPlugin):
    """Raises in task 0, from which task 1 starts."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The hook that raises."""
        if strategy.experience.task_label == 0:
            raise ValueError("no")


def test_what_needs_a_failed_task_is_reported_as_not_trained() -> None:
    with tiny_strategy(plugins=[FailsAndStarves()]) as strategy:
        with pytest.raises(TaskFailedError) as caught:
            strategy.train(tiny_benchmark((0, 1)).train_stream)
        assert strategy.registry.num_rows == 0
    assert "2 task(s) were not trained" in str(caught.value)
    assert "task 1 (label 1) failed in expert: its expert starts from the expert of task 0" in str(caught.value)


def test_a_criterion_that_returns_no_scalar() -> None:
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    with tiny_strategy(criterion=criterion) as strategy, pytest.raises(InputError, match="must return one number"):
        strategy.train(tiny_benchmark((0,)).train_stream)


class BrokenMetric(PluginMetric[float]):
    """Raises when an epoch ends."""

    def reset(self) -> None:
        """Nothing to reset."""

    def result(self) -> float:
        """Nothing to tell."""
        return 0.0

    def after_training_epoch(self, strategy: Any) -> None:
        """The callback that raises."""
        raise ZeroDivisionError("a metric's mistake")

    def __str__(self) -> str:
        return "Broken"


def test_a_metric_that_raises_is_named() -> None:
    evaluator = EvaluationPlugin(BrokenMetric(), loggers=[])
    with tiny_strategy(evaluator=evaluator) as strategy:
        with pytest.raises(HookError) as caught:
            strategy.train(tiny_benchmark((0,)).train_stream)
    assert "the metric Broken in after_training_epoch: ZeroDivisionError" in str(caught.value).splitlines()[0]


def test_a_plugin_that_cannot_travel_is_named() -> None:
    import threading

    plugin = SupervisedPlugin()
    plugin.guard = threading.Lock()  # type: ignore[attr-defined]
    with tiny_strategy(plugins=[plugin]) as strategy:
        with pytest.raises(InputError) as caught:
            strategy.train(tiny_benchmark((0,)).train_stream)
        message = one_sentence(caught.value)
    assert "SupervisedPlugin" in message
    assert "'guard'" in message


def test_an_optimizer_of_another_model() -> None:
    optimizer = torch.optim.SGD(tiny_net().parameters(), lr=0.1)
    with pytest.raises(InputError, match="none of them the model's"):
        tiny_strategy(optimizer=optimizer)


def test_a_model_that_is_no_expert_gate() -> None:
    net = tiny_net()
    with pytest.raises(InputError, match="not TinyNet"):
        tiny_strategy(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "settings",
    [
        {"ae_lr": -1.0},
        {"ae_latent_dim": 0},
        {"ae_optimizer": "rmsprop"},
        {"temp": 0},
        {"validation_fraction": 1.5},
        {"confidence_threshold": 2.0},
        {"distillation_weight": -1.0},
    ],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        tiny_strategy(**settings)
    one_sentence(caught.value)
    assert isinstance(caught.value, ExpertGateError)


def test_settings_that_the_linear_autoencoder_ignores_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="ignores ae_train_epochs, ae_lr"):
        tiny_strategy(ae_train_epochs=5, ae_lr=0.1)
