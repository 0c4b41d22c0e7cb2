"""Criteria over one task's classes: weights over all classes, soft targets cut to the task's, ignored classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import loss_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate
from torchvision.transforms import v2

from distributed_eg import ExpertGateStrategy
from distributed_eg.errors import InputError
from distributed_eg.strategy.training.expert_loop import ExpertLoop
from distributed_eg.strategy.training.losses import local_loss
from tests.helpers import hashes, tiny_benchmark, tiny_strategy

WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
CLASSES = (1, 3)


class Focal(nn.Module):
    """A focal loss as users write it, with a weight for each class."""

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.register_buffer("alpha", alpha)

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch."""
        log_p = functional.log_softmax(output, 1).gather(1, targets[:, None])[:, 0]
        return -(self.alpha[targets] * (1 - log_p.exp()) ** 2 * log_p).mean()


class Around(nn.Module):
    """A loss around another one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1)

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        """The other's."""
        return self.inner(output, targets)


class Called:
    """A criterion that is no module."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with them."""
        return functional.cross_entropy(output, targets, weight=self.weight)


WEIGHTED: dict[str, Callable[[Tensor], Any]] = {
    "smoothed": lambda w: nn.CrossEntropyLoss(weight=w, label_smoothing=0.1),
    "plain": lambda w: nn.CrossEntropyLoss(weight=w),
    "nll": lambda w: nn.NLLLoss(weight=w),
    "margin": lambda w: nn.MultiMarginLoss(weight=w),
    "focal": Focal,
    "called": Called,
    "partial": lambda w: partial(functional.cross_entropy, weight=w, label_smoothing=0.1),
}


@pytest.mark.parametrize("make", WEIGHTED.values(), ids=WEIGHTED.keys())
def test_weights_of_all_classes_are_cut_to_the_tasks(make: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    output, targets = torch.randn(6, 5), torch.tensor([1, 3, 3, 1, 3, 1])
    criterion = make(WEIGHTS)
    given = local_loss(criterion, output, targets, CLASSES)
    expected = make(WEIGHTS[[1, 3]])(output[:, [1, 3]], torch.tensor([0, 1, 1, 0, 1, 0]))
    assert torch.equal(given, expected)
    # and the criterion is what it was
    assert torch.equal(local_loss(criterion, output, targets, CLASSES), expected)


@pytest.mark.parametrize("make", WEIGHTED.values(), ids=WEIGHTED.keys())
def test_weights_in_training_and_evaluation(make: Callable[[Tensor], Any]) -> None:
    """Two tasks of two classes each, of which the first is evaluated alone, when the second is not known."""
    made = tiny_benchmark((0, 1), train=20, test=8)
    evaluator = EvaluationPlugin(loss_metrics(experience=True), loggers=[])
    for weights, fails in ((WEIGHTS[:4], False), (WEIGHTS[:2], True)):
        with tiny_strategy(train_epochs=1, criterion=make(weights), evaluator=evaluator, eval_every=0) as strategy:
            strategy.train(made.train_stream[0])
            assert all(value == value for value in strategy.eval(made.test_stream[0]).values())
            if fails:
                with pytest.raises(InputError, match="weights for 2 classes, but the task has the class 3"):
                    strategy.train(made.train_stream[1])
            else:
                strategy.train(made.train_stream[1])


def test_weights_within_a_criterion_are_cut() -> None:
    torch.manual_seed(0)
    output, targets = torch.randn(4, 5), torch.tensor([1, 3, 3, 1])
    smoothed = nn.CrossEntropyLoss(weight=WEIGHTS[[1, 3]], label_smoothing=0.1)
    assert torch.equal(
        local_loss(Around(), output, targets, CLASSES), smoothed(output[:, [1, 3]], torch.tensor([0, 1, 1, 0]))
    )


@pytest.mark.parametrize("ignored", [-100, 1, 3])
def test_an_ignored_class_is_that_of_the_dataset(ignored: int) -> None:
    """Class 3 stands at position 1, which must not be taken for the class 1."""
    output = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 3, 3, ignored])
    given = local_loss(nn.CrossEntropyLoss(ignore_index=ignored, label_smoothing=0.1), output, targets, CLASSES)
    kept = targets != ignored
    local = torch.searchsorted(torch.tensor(CLASSES), targets[kept])
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(output[kept][:, [1, 3]], local)
    assert torch.allclose(given, expected)


class Mixes(SupervisedPlugin):
    """Mixes each training batch, as torchvision's documentation has it for collate functions."""

    def __init__(self, mix: Any) -> None:
        super().__init__()
        self.mix = mix

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Images and targets of the batch."""
        strategy.mbatch[:2] = self.mix(*strategy.mbatch[:2])


class MixesInLoader(ExpertGateStrategy):
    """Mixes in its training loader's collate function."""

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """As Avalanche's, with another collate function."""
        self.adapted_dataset.collate_fn = Mixed(v2.MixUp(num_classes=4))
        super().make_train_dataloader(**kwargs)


class Mixed:
    """A collate function that mixes."""

    def __init__(self, mix: Any) -> None:
        self.mix = mix

    def __call__(self, items: Any) -> Any:
        """Images, soft targets, and the task labels as they are."""
        images, targets, *rest = default_collate(items)
        return [*self.mix(images, targets), *rest]


@pytest.mark.parametrize("mix", [v2.MixUp, v2.CutMix])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=WEIGHTS[:4]),
        nn.BCEWithLogitsLoss(),
    ],
    ids=["plain", "smoothed", "weighted", "bce"],
)
def test_soft_targets(mix: Any, criterion: Any) -> None:
    """The same for the classes 0 and 1 as for 2 and 3: position says nothing."""
    made = tiny_benchmark((0, 0), train=24)
    evaluator = EvaluationPlugin(loss_metrics(epoch=True), loggers=[])
    plugins = [Mixes(mix(num_classes=4))]
    with tiny_strategy(train_epochs=1, criterion=criterion, evaluator=evaluator, plugins=plugins) as strategy:
        metrics = strategy.train(made.train_stream)
        assert strategy.registry.num_rows == 2
        assert all(0 < value < 10 for value in metrics.values())


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        (lambda x, y: (x, functional.one_hot(y, 5).float() * 0.9 + 0.02), "have mass at the class 0"),
        (lambda x, y: (x, functional.one_hot(y - 2, 2).float()), "are over 2 classes, but the task has the class 3"),
        (lambda x, y: (x, y + 2), "holds the class 4"),
        (lambda x, y: (x, functional.one_hot(y, 4)), "its label has the shape"),
    ],
    ids=["mass elsewhere", "local", "another class", "whole vectors"],
)
def test_targets_that_are_refused(mix: Any, says: str) -> None:
    made = tiny_benchmark((0, 1), train=24)
    with tiny_strategy(train_epochs=1, plugins=[Mixes(mix)]) as strategy:
        with pytest.raises(InputError, match=says):
            strategy.train(made.train_stream[1])
        assert strategy.registry.num_rows == 0


def test_soft_targets_of_a_loader_of_its_own() -> None:
    with tiny_strategy(train_epochs=1, cls=MixesInLoader) as strategy:
        strategy.train(tiny_benchmark((0, 1), train=24).train_stream)
        assert strategy.registry.num_rows == 2


def test_soft_targets_of_the_dataset_itself_would_reach_the_gate() -> None:
    made = tiny_benchmark((0,), train=24)
    made.train_stream[0].dataset.collate_fn = Mixed(v2.MixUp(num_classes=4))
    with tiny_strategy() as strategy, pytest.raises(InputError, match=r"soft targets .* are for training only"):
        strategy.train(made.train_stream)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.L1Loss(), nn.BCEWithLogitsLoss(), nn.HuberLoss()])
@pytest.mark.parametrize("size", [1, 2, 16])
def test_losses_of_values_are_no_losses_of_class_ids(criterion: Any, size: int) -> None:
    """A batch of one or two would broadcast: wrong, and without an error."""
    with tiny_strategy(criterion=criterion, train_mb_size=size) as strategy:
        with pytest.raises(InputError, match="number by number"):
            strategy.train(tiny_benchmark((0,), train=12).train_stream)


def test_plain_cross_entropy_is_the_default_as_it_was() -> None:
    """A function of local logits and positions gives a smoothed loss's bytes."""
    made = tiny_benchmark((0, 1), train=20)
    results = []
    for criterion in (nn.CrossEntropyLoss(label_smoothing=0.1), partial(functional.cross_entropy, label_smoothing=0.1)):
        with tiny_strategy(train_epochs=1, criterion=criterion) as strategy:
            strategy.train(made.train_stream)
            results.append(hashes(strategy))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "make",
    [lambda w: nn.CrossEntropyLoss(weight=w), Focal, lambda w: partial(functional.cross_entropy, weight=w)],
    ids=["weight", "buffer", "keyword"],
)
def test_an_evaluation_asks_a_criterion_where_its_weights_are(make: Callable[[Tensor], Any]) -> None:
    """Answers come to the CPU; the user may have the weights on a card."""
    criterion = make(WEIGHTS.to("meta"))
    answers = SimpleNamespace(model=None, _criterion=criterion, is_training=False)
    answers.mb_output, answers.mb_y = torch.zeros(4, 5), torch.tensor([1, 3, 1, 3])
    assert ExpertLoop.criterion(answers).device.type == "meta"  # type: ignore[arg-type]
