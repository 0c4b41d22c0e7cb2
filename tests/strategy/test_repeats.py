"""A label that comes again: it continues, starts anew, or is refused; the same in a stream and step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, as_classification_dataset
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from torch.utils.data import TensorDataset

from distributed_eg import ExpertGate, ExpertGateStrategy
from distributed_eg.errors import InputError
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import load_tensors
from tests.helpers import SHAPE, hashes, task_images, tiny_net, tiny_strategy
from tests.inside import intake_of, registry_of


def stream(*steps: tuple[int, int, int, tuple[int, ...]]) -> Any:
    """Train and test streams of (label, domain, seed, class ids) steps."""

    def dataset(label: int, domain: int, seed: int, classes: tuple[int, ...], count: int) -> Any:
        images, positions = task_images(domain, count, seed, len(classes))
        targets = torch.tensor(classes)[positions]
        leaf = TensorDataset(images, targets)
        leaf.targets = targets.tolist()  # type: ignore[attr-defined]
        labels = DataAttribute(ConstantSequence(label, count), name="targets_task_labels", use_in_getitem=True)
        return as_classification_dataset(leaf).update_data_attribute("targets_task_labels", labels)

    train = [dataset(label, domain, seed, classes, 60) for label, domain, seed, classes in steps]
    test = [dataset(label, domain, seed + 50, classes, 24) for label, domain, seed, classes in steps]
    return with_task_labels(benchmark_from_datasets(train=train, test=test))


STEPS = ((7, 0, 1, (0, 1)), (3, 1, 2, (2, 3)), (7, 0, 3, (1, 4)), (5, 0, 4, (5, 6)))
"""Label 7 comes again in step 2, with one old class and one new one; step 3 is of its domain."""


def trained(*, stepwise: bool = False, **settings: Any) -> ExpertGateStrategy:
    """A strategy after all of STEPS."""
    strategy = tiny_strategy(**settings)
    train_stream = stream(*STEPS).train_stream
    for experience in train_stream if stepwise else [train_stream]:
        strategy.train(experience)
    return strategy


def test_continuing_commits_the_next_version_of_the_task() -> None:
    with trained() as strategy:
        table = strategy.registry
        assert table["task"].to_pylist() == [0, 1, 3]
        assert table["label"].to_pylist() == [7, 3, 5]
        assert table["transfer"].to_pylist()[0] == "continue"
        assert table["parent"].to_pylist()[0] == 0
        assert table["num_classes"].to_pylist() == [3, 2, 2]
        manifest = registry_of(strategy).newest[0]
        assert manifest.versions == (0, 2)
        assert manifest.classes == (0, 1, 4)
        metrics = strategy.eval(stream(*STEPS).test_stream)
    assert metrics["Gate_Acc_Exp/eval_phase/test_stream/Task003/Exp001"] == 1
    assert metrics["Expert_Acc_Exp/eval_phase/test_stream/Task007/Exp002"] > 0.5


def test_a_later_task_sees_the_newest_version_that_precedes_it() -> None:
    with trained() as strategy:
        rows = [row for row in strategy.relatedness.to_pylist() if row["task"] == 3]
        assert [row["candidate"] for row in rows] == [1, 0]
        record = registry_of(strategy).relatedness[3]
        assert record.candidates == (1, 2)
        assert record.choice.parent == 2


@pytest.mark.parametrize("autoencoder", ["linear", "sgd"])
@pytest.mark.parametrize("on_repeat", ["continue", "new_expert"])
def test_a_stream_and_its_steps_give_the_same(autoencoder: Any, on_repeat: str) -> None:
    results = []
    for stepwise in (False, True):
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder=autoencoder)
        with trained(stepwise=stepwise, model=model, on_repeat=on_repeat) as strategy:
            results.append((hashes(strategy), strategy.relatedness.to_pylist()))
    assert results[0] == results[1]


def test_the_autoencoder_goes_on_from_its_summary() -> None:
    """Its mean is that of both versions' samples; the first version's own images are not there any more."""
    with trained() as strategy:
        storage, registry = Storage(strategy.run_dir or ""), registry_of(strategy)
        first = load_tensors(storage, registry.manifests[0].autoencoder)
        second = load_tensors(storage, registry.manifests[2].autoencoder)
    assert int(first["num_samples"]) == 54
    assert int(second["num_samples"]) == 108
    assert registry.autoencoders[2].num_samples == 108
    assert not torch.equal(first["mean"], second["mean"])


def test_the_head_keeps_what_it_knew() -> None:
    """Without a single epoch the continued expert answers for its old classes as before."""
    with trained(train_epochs=0) as strategy:
        storage, registry = Storage(strategy.run_dir or ""), registry_of(strategy)
        first = load_tensors(storage, registry.manifests[0].expert)
        second = load_tensors(storage, registry.manifests[2].expert)
    assert first["head.weight"].shape[0] == 2
    assert second["head.weight"].shape[0] == 3
    assert torch.equal(first["head.weight"], second["head.weight"][:2])
    assert torch.equal(first["features.0.weight"], second["features.0.weight"])


def test_a_new_expert_starts_as_a_new_task_does() -> None:
    with trained(on_repeat="new_expert") as strategy:
        registry = registry_of(strategy)
        again = registry.manifests[2]
        assert again.versions == (0, 2)
        assert again.transfer in ("finetune", "lwf")
        assert again.classes == (1, 4)
        assert registry.relatedness[2].candidates == (0, 1)
        assert registry.autoencoders[2].num_samples == 54
        assert strategy.registry["task"].to_pylist() == [0, 1, 3]


def test_a_repeat_inside_a_refused_stream_is_found_before_any_work() -> None:
    with tiny_strategy(on_repeat="error") as strategy:
        with pytest.raises(InputError, match="Label 7 was trained already, in the same stream"):
            strategy.train(stream(*STEPS).train_stream)
        assert strategy.run_dir is None


def test_a_repeat_in_a_refused_generator_is_found_before_its_first_task_is_sealed() -> None:
    """Where workers are busy, the stream is read ahead of what they trained."""
    with tiny_strategy(on_repeat="error") as strategy:
        intake = intake_of(strategy, iter(stream(*STEPS).train_stream))
        assert [intake.next_task().record.label for _ in range(2)] == [7, 3]
        with pytest.raises(InputError, match="Label 7 was trained already, as task 0"):
            intake.next_task()
