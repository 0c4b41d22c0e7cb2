"""Whatever users' datasets give: used alike by gate, training and evaluation, or refused by name before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import loss_metrics
from avalanche.training.plugins import EvaluationPlugin
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import ToTensor

from distributed_eg import ExpertGateStrategy
from distributed_eg.errors import InputError
from distributed_eg.runtime.worker.contract import conform, item_fault
from tests.helpers import hashes, task_images, tiny_strategy
from tests.inside import manifests_of


class Shaped(Dataset[Any]):
    """Samples as ``shape`` makes them of (image, class id, index)."""

    def __init__(self, shape: Callable[[Any, int, int], Any], count: int = 24) -> None:
        self.images, targets = task_images(0, count, 1)
        self.targets = targets.tolist()
        self.shape = shape

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return self.shape(self.images[index], self.targets[index], index)


def benchmark(shape: Callable[[Any, int, int], Any], **options: Any) -> Any:
    """One task of such samples."""
    made = [as_classification_dataset(Shaped(shape, count), **options) for count in (24, 12)]
    return benchmark_from_datasets(train=made[:1], test=made[1:])


USED: dict[str, Callable[[Any, int, int], Any]] = {
    "a list": lambda x, y, i: [x, y],
    "float64 images": lambda x, y, i: (x.double(), y),
    "arrays of float64": lambda x, y, i: (x.double().numpy(), y),
    "int32 labels": lambda x, y, i: (x, torch.tensor(y, dtype=torch.int32)),
    "uint8 labels": lambda x, y, i: (x, torch.tensor(y, dtype=torch.uint8)),
    "numpy labels": lambda x, y, i: (x, np.int16(y)),
    "bool labels": lambda x, y, i: (x, bool(y)),
    "whole floats": lambda x, y, i: (x, float(y)),
    "labels of shape (1,)": lambda x, y, i: (x, torch.tensor([y])),
    "arrays of shape (1,)": lambda x, y, i: (x, np.array([y], dtype=np.int32)),
    "a path after them": lambda x, y, i: (x, y, f"{i}.png"),
    "a dictionary after them": lambda x, y, i: (x, y, {"index": i}),
    "an index after them": lambda x, y, i: (x, y, i),
}


def outcome_of(shape: Callable[[Any, int, int], Any]) -> Any:
    """Hashes, and the metrics of training and evaluation."""
    evaluator = EvaluationPlugin(loss_metrics(experience=True), loggers=[])
    made = benchmark(shape)
    with tiny_strategy(train_epochs=1, evaluator=evaluator, eval_every=0) as strategy:
        strategy.train(made.train_stream)
        return hashes(strategy), strategy.eval(made.test_stream)


@pytest.fixture(scope="module")
def plain() -> Any:
    """What (float32 image, int) gives."""
    return outcome_of(lambda x, y, i: (x, y))


@pytest.mark.parametrize("shape", USED.values(), ids=USED.keys())
def test_what_is_cast_gives_the_bytes_of_what_is_plain(shape: Callable[[Any, int, int], Any], plain: Any) -> None:
    assert outcome_of(shape) == plain


@pytest.fixture(scope="module")
def refusing() -> Iterator[ExpertGateStrategy]:
    """One strategy, which nothing that it refuses changes."""
    with tiny_strategy() as strategy:
        yield strategy


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_images_are_used(kind: torch.dtype) -> None:
    made = benchmark(lambda x, y, i: (x.to(kind), y))
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(made.train_stream)
        strategy.eval(made.test_stream)
        assert strategy.registry.num_rows == 1


def _heat(x: Any, y: int, i: int) -> Any:
    return x, torch.zeros(16, 16), y


def _grey(x: Any) -> Image.Image:
    return Image.fromarray((x.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


REFUSED: dict[str, tuple[Callable[[Any, int, int], Any], str]] = {
    "dictionaries": (lambda x, y, i: {"image": x, "label": y}, "a dict with the keys 'image', 'label'"),
    "an image alone": (lambda x, y, i: [x], "must be (image, class id, …)"),
    "a heatmap": (_heat, "its label has the shape (16, 16)"),
    "one-hot labels": (lambda x, y, i: (x, torch.eye(2)[y]), "its label has the shape (2,)"),
    "string labels": (lambda x, y, i: (x, "cat"), "its label is the str 'cat'"),
    "labels that are None": (lambda x, y, i: (x, None), "its label is a NoneType"),
    "fractions": (lambda x, y, i: (x, 0.5), "its label is 0.5"),
    "labels that are NaN": (lambda x, y, i: (x, float("nan")), "its label is nan"),
    "uint8 images": (lambda x, y, i: (x.byte(), y), "its image is torch.uint8"),
    "int64 images": (lambda x, y, i: (x.long(), y), "its image is torch.int64"),
    "bool images": (lambda x, y, i: (x > 0, y), "its image is torch.bool"),
    "arrays of uint8": (lambda x, y, i: (x.byte().numpy(), y), "its image is torch.uint8"),
    "PIL images": (lambda x, y, i: (_grey(x), y), "its image is a Image"),
    "lists of pixels": (lambda x, y, i: (x.tolist(), y), "its image is a list"),
    "flat images": (lambda x, y, i: (x.flatten(), y), "shape"),
}


@pytest.mark.parametrize(("shape", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_named_before_training(
    shape: Callable[[Any, int, int], Any], says: str, refusing: ExpertGateStrategy
) -> None:
    made = benchmark(shape)
    with pytest.raises(InputError) as caught:
        refusing.train(made.train_stream)
    assert refusing.registry.num_rows == 0
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_sample_that_is_at_fault_is_named() -> None:
    """By the row of the user's own dataset, whatever the validation split made of it."""
    made = benchmark(lambda x, y, i: (x.byte() if i == 17 else x, y))
    with (
        tiny_strategy() as strategy,
        pytest.raises(InputError, match=r"[Ii]tem 17 of Shaped: its image is torch\.uint8"),
    ):
        strategy.train(made.train_stream)


def test_images_of_different_sizes_are_named() -> None:
    made = benchmark(lambda x, y, i: (x[:, :12] if i == 17 else x, y))
    with tiny_strategy() as strategy, pytest.raises(InputError, match=r"\(3, 12, 16\)"):
        strategy.train(made.train_stream)


def test_the_same_is_refused_in_evaluation() -> None:
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(benchmark(lambda x, y, i: (x, y)).train_stream)
        with pytest.raises(InputError, match=r"[Ii]tem 5 of Shaped: its label is the str 'cat'"):
            strategy.eval(benchmark(lambda x, y, i: (x, "cat" if i == 5 else y)).test_stream)


def test_the_same_is_refused_in_training_alone() -> None:
    """The gate sees eval transforms, the expert train transforms: what only the expert sees is named, too."""
    groups = {"train": (lambda x: (x.clamp(0, 1) * 255).byte(), None), "eval": (None, None)}
    with tiny_strategy() as strategy, pytest.raises(InputError, match=r"training epoch .* torch\.uint8"):
        strategy.train(benchmark(lambda x, y, i: (x, y), transform_groups=groups).train_stream)


class AddsToTensor(SupervisedPlugin):
    """Gives the dataset its transform when the strategy adapts it."""

    def after_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """As users of Avalanche do."""
        strategy.adapted_dataset = strategy.adapted_dataset.replace_current_transform_group(ToTensor())


def test_a_transform_that_a_plugin_adds_comes_too_late_for_the_gate() -> None:
    made = benchmark(lambda x, y, i: (_grey(x), y))
    with tiny_strategy(plugins=[AddsToTensor()]) as strategy, pytest.raises(InputError, match="too late for the gate"):
        strategy.train(made.train_stream)


def test_a_collate_function_that_leaves_samples_out_is_refused() -> None:
    def collate(items: Any) -> Any:
        kept = [item for item in items if item[1]]
        return torch.stack([x for x, _ in kept]), torch.tensor([y for _, y in kept])

    leaf = Shaped(lambda x, y, i: (x, y))
    leaf.collate_fn = collate  # type: ignore[attr-defined]
    made = benchmark_from_datasets(train=[as_classification_dataset(leaf)])
    with tiny_strategy() as strategy, pytest.raises(InputError, match="images of"):
        strategy.train(made.train_stream)


def test_targets_that_are_no_class_ids_are_named() -> None:
    for bad in ("cat", 1.5, None):
        dataset = Shaped(lambda x, y, i: (x, y))
        dataset.targets[3] = bad  # type: ignore[call-overload]
        stream = benchmark_from_datasets(train=[as_classification_dataset(dataset)]).train_stream
        with tiny_strategy() as strategy, pytest.raises(InputError, match="is no class id"):
            strategy.train(stream)


def test_targets_as_tensors_are_class_ids() -> None:
    dataset = Shaped(lambda x, y, i: (x, y))
    dataset.targets = [torch.tensor(target) for target in dataset.targets]
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(benchmark_from_datasets(train=[as_classification_dataset(dataset)]).train_stream)
        assert manifests_of(strategy)[0].classes == (0, 1)


def test_a_plain_batch_is_as_it_was() -> None:
    images, targets, tasks = torch.rand(4, 3, 8, 8), torch.arange(4), torch.zeros(4)
    conformed = conform((images, targets, tasks))
    assert [part.data_ptr() for part in conformed] == [images.data_ptr(), targets.data_ptr(), tasks.data_ptr()]
    assert item_fault((images[0], 3)) is None
