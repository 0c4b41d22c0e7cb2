"""Every way in which users bring data: Avalanche's generators, classic benchmarks, folders, transforms, streams."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from avalanche.benchmarks import (
    CLScenario,
    CLStream,
    DatasetExperience,
    benchmark_from_datasets,
    benchmark_with_validation_stream,
    class_incremental_benchmark,
    dataset_benchmark,
    nc_benchmark,
    new_instances_benchmark,
    ni_benchmark,
    paths_benchmark,
    task_incremental_benchmark,
    tensors_benchmark,
    with_classes_timeline,
    with_task_labels,
)
from avalanche.benchmarks.classic import PermutedMNIST, RotatedMNIST, SplitCIFAR10, SplitMNIST
from avalanche.benchmarks.scenarios.deprecated.generic_benchmark_creation import (
    LazyStreamDefinition,
    create_lazy_generic_benchmark,
)
from avalanche.benchmarks.utils import DataAttribute, as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import ToTensor

from distributed_eg import ClusterConfig, ExpertGate
from distributed_eg.errors import InputError
from distributed_eg.runtime.dispatcher import Progress
from distributed_eg.schedule.events import Stage
from tests.helpers import INLINE, SHAPE, hashes, task_images, tiny_benchmark, tiny_net, tiny_strategy
from tests.inside import registry_of, sample_counts_of

# Ray's workers cannot import a test module: its classes travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


# What the tests are made of


def leaf_of(domain: int, count: int = 40, seed: int = 1, num_classes: int = 2, first: int = 0) -> TensorDataset:
    """A dataset in memory, with targets as torchvision's have them."""
    images, targets = task_images(domain, count, seed, num_classes)
    leaf = TensorDataset(images, targets + first)
    leaf.targets = (targets + first).tolist()  # type: ignore[attr-defined]
    return leaf


def labelled(dataset: Any, labels: Sequence[int]) -> Any:
    """``dataset`` with a task label for each sample."""
    attribute = DataAttribute(list(labels), name="targets_task_labels", use_in_getitem=True)
    return dataset.update_data_attribute("targets_task_labels", attribute)


def labelled_benchmark(*steps: Sequence[tuple[int, int]], **groups: Any) -> CLScenario:
    """A benchmark whose experiences hold the (label, domain) parts of each step: 40 and 16 samples a part."""

    def dataset(step: Sequence[tuple[int, int]], count: int, seed: int) -> Any:
        parts = [task_images(domain, count, seed + i) for i, (_, domain) in enumerate(step)]
        targets = torch.cat([part[1] + 2 * domain for part, (_, domain) in zip(parts, step, strict=True)])
        leaf = TensorDataset(torch.cat([part[0] for part in parts]), targets)
        leaf.targets = targets.tolist()  # type: ignore[attr-defined]
        labels = [label for label, _ in step for _ in range(count)]
        return labelled(as_classification_dataset(leaf, **groups), labels)

    train = [dataset(step, 40, 10 * i) for i, step in enumerate(steps)]
    test = [dataset(step, 16, 500 + 10 * i) for i, step in enumerate(steps)]
    return with_task_labels(benchmark_from_datasets(train=train, test=test))


class GreyNet(nn.Module):
    """A small network for grey images of 28 × 28."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(torch.relu(self.features(x)).mean((2, 3)))


def grey_model() -> ExpertGate:
    """A model for MNIST."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ExpertGate((1, 28, 28), arch=GreyNet(), autoencoder="linear")


def train_and_eval(benchmark: CLScenario, **settings: Any) -> tuple[list[int], list[tuple[int, ...]], dict[str, Any]]:
    """Labels and classes of the tasks, and eval's metrics."""
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[])
    with tiny_strategy(evaluator=evaluator, train_epochs=1, **settings) as strategy:
        strategy.train(benchmark.train_stream)
        metrics = strategy.eval(benchmark.test_stream)
        classes = [manifest.classes for manifest in registry_of(strategy).newest.values()]
        return strategy.registry["label"].to_pylist(), classes, metrics


def stream_value(metrics: dict[str, Any], name: str) -> float:
    """A stream metric; where there are task labels Avalanche appends that of the last experience to its name."""
    (value,) = [value for key, value in metrics.items() if key.startswith(f"{name}/eval_phase/test_stream")]
    return float(value)


# Generators of benchmarks


def _nc(task_labels: bool, **options: Any) -> CLScenario:
    train, test = leaf_of(0, 80, 1, 4), leaf_of(0, 32, 9, 4)
    return nc_benchmark(train, test, 2, task_labels=task_labels, shuffle=False, **options)


def _ni(task_labels: bool) -> CLScenario:
    train, test = leaf_of(0, 80, 1), leaf_of(0, 32, 9)
    return ni_benchmark(train, test, 2, task_labels=task_labels, shuffle=True, seed=3)


def _class_incremental() -> CLScenario:
    streams = {"train": as_classification_dataset(leaf_of(0, 80, 1, 4))}
    streams["test"] = as_classification_dataset(leaf_of(0, 32, 9, 4))
    return class_incremental_benchmark(streams, num_experiences=2, class_order=[3, 1, 0, 2])


def _new_instances() -> CLScenario:
    train, test = as_classification_dataset(leaf_of(0, 80, 1)), as_classification_dataset(leaf_of(0, 32, 9))
    return new_instances_benchmark(train, test, 2, seed=3)


def _tensors() -> CLScenario:
    train = [task_images(domain, 40, domain) for domain in (0, 1)]
    test = [task_images(domain, 16, 50 + domain) for domain in (0, 1)]
    return tensors_benchmark(train_tensors=train, test_tensors=test, task_labels=[4, 9])


@pytest.mark.parametrize(
    ("make", "labels", "classes"),
    [
        pytest.param(lambda: _nc(False), [0, 1], [(0, 1), (2, 3)], id="nc"),
        pytest.param(lambda: _nc(True), [0, 1], [(0, 1), (2, 3)], id="nc with task labels"),
        pytest.param(
            lambda: _nc(True, class_ids_from_zero_in_each_exp=True), [0, 1], [(0, 1), (0, 1)], id="nc, ids from zero"
        ),
        pytest.param(lambda: _ni(False), [0, 1], [(0, 1), (0, 1)], id="ni"),
        pytest.param(_new_instances, [0, 1], [(0, 1), (0, 1)], id="new instances"),
        pytest.param(_class_incremental, [0, 1], [(1, 3), (0, 2)], id="class incremental"),
        pytest.param(
            lambda: with_classes_timeline(_class_incremental()), [0, 1], [(1, 3), (0, 2)], id="classes timeline"
        ),
        pytest.param(
            lambda: task_incremental_benchmark(_class_incremental()), [0, 1], [(1, 3), (0, 2)], id="task incremental"
        ),
        pytest.param(lambda: tiny_benchmark((0, 1), labels=False), [0, 1], [(0, 1), (2, 3)], id="from datasets"),
        pytest.param(_tensors, [4, 9], [(0, 1), (0, 1)], id="tensors in memory"),
    ],
)
def test_generators(make: Callable[[], CLScenario], labels: list[int], classes: list[tuple[int, ...]]) -> None:
    """A task an experience; without labels its index; each head has its own experience's classes."""
    found, found_classes, metrics = train_and_eval(make())
    assert found == labels
    assert found_classes == classes
    assert 0 <= stream_value(metrics, "Gate_Acc_Stream") <= 1
    assert any(name.startswith("Top1_Acc_Exp/eval_phase/test_stream") for name in metrics)


def test_ni_with_task_labels_has_a_label_for_each_experience() -> None:
    """Avalanche gives experience i the label i, while the test set, complete, has label 0."""
    found, _, metrics = train_and_eval(_ni(True))
    assert found == [0, 1]
    assert "Gate_Acc_Exp/eval_phase/test_stream/Task000/Exp000" in metrics


def test_single_experiences_and_slices_without_labels() -> None:
    """The index in the whole stream is the task's label, whatever part of the stream is given."""
    benchmark = _nc(False)
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(benchmark.train_stream[1:])
        strategy.train(benchmark.train_stream[0])
        assert strategy.registry["label"].to_pylist() == [1, 0]


def test_avalanches_own_lazy_benchmark() -> None:
    def datasets(count: int, seed: int) -> Iterator[Any]:
        for domain in (0, 1, 2):
            leaf = leaf_of(domain, count, seed, first=2 * domain)
            yield labelled(as_classification_dataset(leaf), [0] * count)

    benchmark = create_lazy_generic_benchmark(
        train_generator=LazyStreamDefinition(datasets(40, 1), 3, [0, 0, 0]),
        test_generator=LazyStreamDefinition(datasets(16, 9), 3, [0, 0, 0]),
    )
    labels, _, metrics = train_and_eval(benchmark)
    assert labels == [0, 1, 2]
    assert stream_value(metrics, "Gate_Acc_Stream") > 0.9


# Classic benchmarks


@pytest.fixture
def small_mnist(mnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of MNIST, of which the classic benchmarks read the first images only; nothing is downloaded."""
    from avalanche.benchmarks.classic import cmnist

    if not (mnist_root / "MNIST").is_dir():
        pytest.skip("the MNIST files are not there")

    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a download was asked for")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    whole = cmnist.get_mnist_dataset

    def cut(root: Any) -> tuple[Any, Any]:
        train, test = whole(root)
        for dataset, count in ((train, 120), (test, 100)):
            dataset.data, dataset.targets = dataset.data[:count], dataset.targets[:count]
        return train, test

    monkeypatch.setattr(cmnist, "get_mnist_dataset", cut)
    return mnist_root


@pytest.mark.parametrize("with_labels", [False, True])
def test_split_mnist(small_mnist: Path, with_labels: bool) -> None:
    order = list(range(10))
    benchmark = SplitMNIST(5, return_task_id=with_labels, fixed_class_order=order, dataset_root=small_mnist)
    labels, classes, metrics = train_and_eval(benchmark, model=grey_model())
    assert labels == [0, 1, 2, 3, 4]
    assert classes == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert stream_value(metrics, "Gate_Acc_Stream") > 0.3
    task = 4 if with_labels else 0
    assert f"Top1_Acc_Exp/eval_phase/test_stream/Task{task:03d}/Exp004" in metrics


@pytest.mark.parametrize("make", [PermutedMNIST, RotatedMNIST])
@pytest.mark.parametrize("with_labels", [False, True])
def test_permuted_and_rotated_mnist(small_mnist: Path, make: Callable[..., CLScenario], with_labels: bool) -> None:
    """Two views of the same images, all ten classes in each."""
    benchmark = make(2, return_task_id=with_labels, seed=1, dataset_root=small_mnist)
    labels, classes, metrics = train_and_eval(benchmark, model=grey_model())
    assert labels == [0, 1]
    assert classes == [tuple(range(10))] * 2
    assert stream_value(metrics, "EndToEnd_Acc_Stream") >= 0


def _fake_cifar10(_root: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    sets = []
    for count in (120, 40):
        dataset = CIFAR10.__new__(CIFAR10)
        dataset.data = rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
        dataset.targets = [i % 10 for i in range(count)]
        dataset.transform = dataset.target_transform = dataset.transforms = None
        sets.append(dataset)
    return sets[0], sets[1]


@pytest.mark.parametrize("with_labels", [False, True])
def test_split_cifar10(monkeypatch: pytest.MonkeyPatch, with_labels: bool) -> None:
    """Avalanche's own SplitCIFAR10, with its random crops and flips, over a stand-in for the images."""
    monkeypatch.setattr("avalanche.benchmarks.classic.ccifar10.get_cifar10_dataset", _fake_cifar10)
    experts = []
    for _ in range(2):
        benchmark = SplitCIFAR10(5, return_task_id=with_labels, seed=5)
        model = ExpertGate((3, 32, 32), arch=_colour_net(), autoencoder="linear")
        with tiny_strategy(model=model, train_epochs=1) as strategy:
            strategy.train(benchmark.train_stream)
            metrics = strategy.eval(benchmark.test_stream)
            assert strategy.registry["label"].to_pylist() == [0, 1, 2, 3, 4]
            experts.append(hashes(strategy))
        assert 0 <= stream_value(metrics, "EndToEnd_Acc_Stream") <= 1
    assert experts[0] == experts[1]


def _colour_net() -> nn.Module:
    from tests.helpers import tiny_net

    return tiny_net()


def test_the_real_split_cifar10(mnist_root: Path) -> None:
    if not (mnist_root / "cifar-10-batches-py").is_dir():
        pytest.skip("the CIFAR-10 files are not there; the stand-in above takes their place")
    benchmark = SplitCIFAR10(5, seed=5, dataset_root=mnist_root)
    experience = benchmark.train_stream[0]
    cut = benchmark_from_datasets(train=[experience.dataset.subset(range(60))])
    model = ExpertGate((3, 32, 32), arch=_colour_net(), autoencoder="linear")
    with tiny_strategy(model=model, train_epochs=1) as strategy:
        strategy.train(cut.train_stream)
        assert strategy.registry["num_classes"].to_pylist() == [2]


# Datasets on disk


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two tasks' folders of PNGs, a folder a class."""
    roots = []
    for domain in (0, 1):
        images, targets = task_images(domain, 24, 1)
        root = tmp_path / f"task{domain}"
        for i, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
            folder = root / ("left", "right")[target]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = ((image.clamp(-2, 3) + 2) * 51).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        roots.append(root)
    return roots


def test_image_folders(folders: list[Path]) -> None:
    datasets = [as_classification_dataset(ImageFolder(str(root), transform=ToTensor())) for root in folders]
    labels, classes, metrics = train_and_eval(benchmark_from_datasets(train=datasets, test=datasets))
    assert labels == [0, 1]
    assert classes == [(0, 1), (0, 1)]
    assert stream_value(metrics, "Gate_Acc_Stream") > 0.9


def test_lists_of_paths(folders: list[Path]) -> None:
    """Avalanche's paths_benchmark reads each image when it is asked for."""
    lists = [[(str(p), int(p.parent.name == "right")) for p in sorted(root.rglob("*.png"))] for root in folders]
    benchmark = paths_benchmark(lists, lists, task_labels=[3, 8], train_transform=ToTensor(), eval_transform=ToTensor())
    labels, _, metrics = train_and_eval(benchmark)
    assert labels == [3, 8]
    assert "Gate_Acc_Exp/eval_phase/test_stream/Task008/Exp001" in metrics


# Transforms


class Mark:
    """A transform that marks images in a corner that decides nothing."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, image: Tensor) -> Tensor:
        """The image with its first pixel at the mark."""
        image = image.clone()
        image[0, 0, 0] = self.value
        return image


class Noise:
    """A random augmentation that draws from torch's generator."""

    def __call__(self, image: Tensor) -> Tensor:
        """The image, flipped by chance, with noise."""
        image = image.flip(2) if torch.rand(()) < 0.5 else image
        return image + 0.1 * torch.randn(image.shape)


class Seen(SupervisedPlugin):
    """Writes down the marks that the expert's training and its periodic evaluation see."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _write(self, phase: str, strategy: Any) -> None:
        with (self.folder / f"{phase}.txt").open("a") as file:
            file.writelines(f"{mark:g}\n" for mark in set(strategy.mb_x[:, 0, 0, 0].tolist()))

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """What a training batch carries."""
        self._write("train", strategy)

    def before_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """What an evaluation batch carries."""
        self._write("eval", strategy)


def grouped(train: Any, evaluate: Any) -> CLScenario:
    """Two tasks with a transform a group."""
    groups = {"train": (train, None), "eval": (evaluate, None)}
    made = [as_classification_dataset(leaf_of(d, 40, d, first=2 * d), transform_groups=groups) for d in (0, 1)]
    test = [as_classification_dataset(leaf_of(d, 16, 50, first=2 * d), transform_groups=groups) for d in (0, 1)]
    return benchmark_from_datasets(train=made, test=test)


def trained_hashes(benchmark: CLScenario, **settings: Any) -> list[tuple[str, str]]:
    """Hashes after training the benchmark's train stream."""
    with tiny_strategy(train_epochs=1, **settings) as strategy:
        strategy.train(benchmark.train_stream)
        return hashes(strategy)


def test_experts_train_with_train_transforms_and_are_measured_with_eval_ones(tmp_path: Path) -> None:
    trained_hashes(grouped(Mark(3), Mark(-3)), plugins=[Seen(tmp_path)], eval_every=1)
    assert set((tmp_path / "train.txt").read_text().split()) == {"3"}
    assert set((tmp_path / "eval.txt").read_text().split()) == {"-3"}


def test_the_gate_sees_eval_transforms_only() -> None:
    """Another train transform leaves the autoencoders alone; another eval transform leaves the experts alone."""
    plain = trained_hashes(grouped(Mark(3), Mark(-3)))
    other_train = trained_hashes(grouped(Mark(2), Mark(-3)))
    other_eval = trained_hashes(grouped(Mark(3), Mark(-2)))
    for before, train, evaluate in zip(plain, other_train, other_eval, strict=True):
        assert before[0] == train[0]
        assert before[1] != train[1]
        assert before[0] != evaluate[0]
    # The first task has no parent to choose, so nothing of the gate's reaches its expert.
    assert plain[0][1] == other_eval[0][1]


def test_random_augmentation_gives_the_same_bytes_in_two_runs() -> None:
    first = trained_hashes(grouped(Noise(), None))
    torch.manual_seed(77)
    assert trained_hashes(grouped(Noise(), None)) == first
    assert trained_hashes(grouped(None, None))[0][1] != first[0][1]


def test_an_evaluation_with_random_transforms_gives_the_same_metrics_twice() -> None:
    results = []
    for _ in range(2):
        benchmark = grouped(None, Noise())
        with tiny_strategy(train_epochs=1) as strategy:
            strategy.train(benchmark.train_stream)
            results.append((hashes(strategy), strategy.eval(benchmark.test_stream)))
    assert results[0] == results[1]


# Validation streams


def test_a_valid_stream_given_to_train_is_what_relatedness_is_measured_on() -> None:
    """With it the autoencoder is fitted to the whole train experience, and periodic evaluation measures it."""
    benchmark = tiny_benchmark((0, 1))
    valid = tiny_benchmark((0, 1), train=20, test=4).train_stream
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    with tiny_strategy(eval_every=0, evaluator=evaluator) as strategy:
        metrics = strategy.train(benchmark.train_stream, valid_stream=valid)
        counts = sample_counts_of(strategy)
    assert counts == [60, 60]
    assert "Top1_Acc_Exp/eval_phase/valid_stream/Task001/Exp001" in metrics


def test_another_valid_stream_gives_another_relatedness() -> None:
    benchmark = tiny_benchmark((0, 1))
    errors = []
    for seed_of in (20, 30):
        valid = tiny_benchmark((0, 1), train=seed_of, test=4).train_stream
        with tiny_strategy(train_epochs=1) as strategy:
            strategy.train(benchmark.train_stream, valid_stream=valid)
            errors.append((strategy.relatedness["own_error"].to_pylist(), hashes(strategy)))
    assert errors[0][0] != errors[1][0]
    assert [autoencoder for autoencoder, _ in errors[0][1]] == [autoencoder for autoencoder, _ in errors[1][1]]


def test_benchmark_with_validation_stream() -> None:
    benchmark = benchmark_with_validation_stream(tiny_benchmark((0, 1), labels=False), validation_size=12, seed=1)
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(benchmark.train_stream, valid_stream=benchmark.valid_stream)
        counts = sample_counts_of(strategy)
    assert counts == [48, 48]


def test_the_valid_stream_of_a_benchmark_is_found() -> None:
    """Where experiences know their benchmark, its "valid" stream needs no mention."""
    made = {
        name: [labelled(as_classification_dataset(leaf_of(d, count, seed + d)), [d] * count) for d in (0, 1)]
        for name, count, seed in (("train", 40, 1), ("test", 12, 50), ("valid", 16, 90))
    }
    benchmark = dataset_benchmark(made["train"], made["test"], other_streams_datasets={"valid": made["valid"]})
    with tiny_strategy(train_epochs=1) as found, tiny_strategy(train_epochs=1) as given:
        found.train(benchmark.train_stream)
        given.train(benchmark.train_stream, valid_stream=benchmark.streams["valid"])
        assert sample_counts_of(found) == [40, 40]
        assert hashes(found) == hashes(given)
        assert found.relatedness == given.relatedness


def test_a_valid_stream_may_be_a_generator() -> None:
    benchmark = tiny_benchmark((0, 1, 2))
    with tiny_strategy(train_epochs=1) as lazy, tiny_strategy(train_epochs=1) as listed:
        lazy.train(benchmark.train_stream, valid_stream=(experience for experience in benchmark.test_stream))
        listed.train(benchmark.train_stream, valid_stream=benchmark.test_stream)
        assert lazy.relatedness == listed.relatedness


def test_a_valid_stream_gives_each_label_of_an_experience_its_part() -> None:
    benchmark = labelled_benchmark([(3, 0), (8, 1)], [(5, 2)])
    residual = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    with tiny_strategy(model=residual, train_epochs=1) as strategy:
        strategy.train(benchmark.train_stream, valid_stream=benchmark.test_stream)
        model = strategy.model.eval()
        rows = strategy.relatedness.to_pylist()
    dataset = benchmark.test_stream[0].dataset
    images = torch.stack([dataset[i][0] for i in range(16, 32)])  # label 8 comes second
    assert rows[0]["own_error"] == pytest.approx(float(model.gate(images).errors[:, 1].mean()), rel=1e-4)


@pytest.mark.parametrize("lacks", ["the label", "all labels"])
def test_a_valid_stream_without_a_label_of_the_experience_is_refused(lacks: str) -> None:
    """One clear error, not one of a dictionary's or an attribute's."""
    benchmark = labelled_benchmark([(3, 0), (8, 1)])
    other = labelled_benchmark([(3, 0)]) if lacks == "the label" else tiny_benchmark((0,), labels=False)
    with tiny_strategy() as strategy, pytest.raises(InputError):
        strategy.train(benchmark.train_stream, valid_stream=other.test_stream)


def test_a_valid_stream_without_the_experience_is_refused() -> None:
    benchmark = tiny_benchmark((0, 1, 2))
    with tiny_strategy() as strategy, pytest.raises(InputError, match="no experience 2"):
        strategy.train(benchmark.train_stream, valid_stream=benchmark.train_stream[:2])


# Labels


def test_labels_with_gaps_negative_ones_and_any_order() -> None:
    benchmark = labelled_benchmark([(40, 0)], [(-4, 1)], [(7, 2)])
    labels, classes, metrics = train_and_eval(benchmark)
    assert labels == [40, -4, 7]
    assert classes == [(0, 1), (2, 3), (4, 5)]
    assert stream_value(metrics, "Gate_Acc_Stream") > 0.9
    assert sum(name.startswith("Gate_Acc_Exp") for name in metrics) == 3


def test_any_order_of_a_stream_without_labels() -> None:
    """The index is the task's label wherever the experience stands in the list."""
    stream = tiny_benchmark((0, 1, 2), labels=False).train_stream
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train([stream[2], stream[0]])
        strategy.train(stream[1])
        assert strategy.registry["label"].to_pylist() == [2, 0, 1]


def test_an_experience_with_several_labels_is_a_task_for_each() -> None:
    benchmark = labelled_benchmark([(3, 0), (8, 1)], [(5, 2)])
    labels, classes, metrics = train_and_eval(benchmark)
    assert labels == [3, 8, 5]
    assert classes == [(0, 1), (2, 3), (4, 5)]
    assert metrics["Gate_Acc_Exp/eval_phase/test_stream/Task005/Exp001"] == 1
    assert stream_value(metrics, "EndToEnd_Acc_Stream") > 0.5


def test_a_label_alone_equals_the_same_label_among_others() -> None:
    """The first task of a mixed experience is what it is by itself."""
    with tiny_strategy(train_epochs=1) as alone, tiny_strategy(train_epochs=1) as mixed:
        alone.train(labelled_benchmark([(3, 0)]).train_stream)
        mixed.train(labelled_benchmark([(3, 0), (8, 1)]).train_stream)
        assert hashes(mixed)[0] == hashes(alone)[0]


# Streams given lazily


class LazyStream:
    """Makes experiences one by one, and knows which of their datasets are still alive."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.asked = 0
        self.leaves: list[weakref.ref[Dataset[Any]]] = []
        self.most_alive = 0

    @property
    def alive(self) -> int:
        """How many of the datasets made so far somebody still holds."""
        gc.collect()
        return sum(leaf() is not None for leaf in self.leaves)

    def __iter__(self) -> Iterator[DatasetExperience[Any]]:
        for k in range(self.num):
            self.most_alive = max(self.most_alive, self.alive)
            self.asked += 1
            yield self._make(k)

    def _make(self, k: int) -> DatasetExperience[Any]:
        leaf = leaf_of(k % 3, 30, k, first=2 * k)
        self.leaves.append(weakref.ref(leaf))
        experience: DatasetExperience[Any] = DatasetExperience(
            dataset=as_classification_dataset(leaf), current_experience=k
        )
        experience.origin_stream = CLStream("train", ())
        return experience


def _plain(lazy: LazyStream) -> Iterable[Any]:
    return iter(lazy)


def _named(lazy: LazyStream) -> Iterable[Any]:
    return CLStream("train", lazy)


@pytest.mark.parametrize("given_as", [_plain, _named], ids=["generator", "CLStream"])
def test_lazy_experiences_are_made_shipped_and_dropped_one_by_one(
    given_as: Callable[[LazyStream], Iterable[Any]],
) -> None:
    lazy = LazyStream(6)
    asked_at_commit: list[int] = []

    def observe(progress: Progress) -> None:
        if progress.stage is Stage.EXPERT and progress.state == "finished":
            asked_at_commit.append(lazy.asked)

    with tiny_strategy(train_epochs=1, observer=observe) as strategy:
        strategy.train(given_as(lazy))
        assert strategy.registry["label"].to_pylist() == list(range(6))
        # One is trained, one may be prefetched, and the last committed one is strategy.experience.
        assert asked_at_commit[0] <= 2
        assert lazy.most_alive <= 3
        assert lazy.alive <= 1


def test_a_lazy_stream_gives_what_a_list_gives() -> None:
    with tiny_strategy(train_epochs=1) as lazy, tiny_strategy(train_epochs=1) as listed:
        lazy.train(iter(LazyStream(3)))
        listed.train(list(LazyStream(3)))
        assert hashes(lazy) == hashes(listed)
        assert lazy.relatedness == listed.relatedness


def test_a_bare_experience_is_used_or_refused_clearly() -> None:
    """One that a user makes by hand knows of no stream: no assertion of Avalanche's insides may reach its user."""
    bare: DatasetExperience[Any] = DatasetExperience(
        dataset=as_classification_dataset(leaf_of(0)), current_experience=0
    )
    with tiny_strategy(train_epochs=1) as strategy, contextlib.suppress(InputError):
        strategy.train(iter([bare]))
        assert strategy.registry["label"].to_pylist() == [0]


def test_an_error_in_a_generator_keeps_what_was_committed() -> None:
    def broken() -> Iterator[DatasetExperience[Any]]:
        yield from LazyStream(2)
        raise OSError("the disk is gone")

    with tiny_strategy(train_epochs=1) as strategy:
        with pytest.raises(OSError, match="the disk is gone"):
            strategy.train(broken())
        committed = strategy.registry["label"].to_pylist()
        strategy.train(list(LazyStream(3))[2])
        assert strategy.registry["label"].to_pylist() == [*committed, 2]
        assert committed == [0] or committed == [0, 1]


def test_lazy_evaluation() -> None:
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(iter(LazyStream(3)))
        from_list = strategy.eval(list(LazyStream(3)))
        from_generator = strategy.eval(iter(LazyStream(3)))
    assert from_list == from_generator


# Under Ray


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_same_under_ray() -> None:
    """Several labels in an experience, gaps, random augmentation, transform groups, a generator: the same bytes."""
    groups = {"train": (Noise(), None), "eval": (Mark(-1), None)}
    results = []
    for cluster in (INLINE, ClusterConfig(num_workers=2, gpus_per_worker=0.5)):
        benchmark = labelled_benchmark([(30, 0), (8, 1)], [(-5, 0)], transform_groups=groups)
        with tiny_strategy(cluster, train_epochs=1) as strategy:
            strategy.train(experience for experience in benchmark.train_stream)
            results.append((hashes(strategy), strategy.relatedness, strategy.eval(benchmark.test_stream)))
            assert strategy.registry["label"].to_pylist() == [8, 30, -5]
    assert results[0] == results[1]
