"""Task labels are taken from wherever they stand; two places that differ are named; without any, the index is said."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from avalanche.benchmarks import (
    benchmark_from_datasets,
    benchmark_with_validation_stream,
    dataset_benchmark,
    split_online_stream,
    task_incremental_benchmark,
)
from avalanche.benchmarks.utils import as_classification_dataset
from torch.utils.data import TensorDataset

from distributed_eg.errors import InputError
from distributed_eg.strategy.tasks.experiences import parts_of
from tests.contract.test_benchmarks import LazyStream, labelled, labelled_benchmark, leaf_of
from tests.helpers import hashes, tiny_benchmark, tiny_strategy
from tests.inside import intake_of


def with_data_label(dataset: Any, label: int) -> Any:
    """A dataset whose samples carry one task label."""
    return labelled(as_classification_dataset(dataset), [label] * len(dataset))


def carrying(*labels: int) -> Any:
    """A benchmark whose data alone carry these labels."""
    made = [with_data_label(leaf_of(i, 24, i, first=2 * i), label) for i, label in enumerate(labels)]
    return benchmark_from_datasets(train=made, test=made)


def labels_of(experiences: Sequence[Any]) -> list[int]:
    return [part.label for experience in experiences for part in parts_of(experience)]


def test_labels_that_only_the_data_carry() -> None:
    made = carrying(7, 3)
    assert labels_of(made.train_stream) == [7, 3]
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(made.train_stream)
        metrics = strategy.eval(made.test_stream)
    assert strategy.registry["label"].to_pylist() == [7, 3]
    assert metrics["Gate_Acc_Stream/eval_phase/test_stream"] == 1


def test_one_label_everywhere_is_none() -> None:
    """Avalanche's own placeholder, in data as in older scenarios."""
    assert labels_of(carrying(0, 0, 0).train_stream) == [0, 1, 2]
    assert labels_of(carrying(4, 4).train_stream) == [0, 1]
    assert labels_of(carrying(0, 1).train_stream) == [0, 1]
    assert labels_of(carrying(4).train_stream) == [4]


def test_a_placeholder_in_a_stream_that_nobody_knows_is_none() -> None:
    lazy = [type(e)(dataset=with_data_label(e.dataset, 0), current_experience=i) for i, e in enumerate(LazyStream(3))]
    for experience in lazy:
        experience.origin_stream = tiny_benchmark((0,)).train_stream
    assert labels_of(lazy) == [0, 1, 2]


def test_a_validation_stream_keeps_the_labels_of_what_it_was_split_from() -> None:
    made = benchmark_with_validation_stream(labelled_benchmark([(5, 0)], [(9, 1)]), validation_size=12, seed=1)
    assert labels_of(made.train_stream) == [5, 9]
    assert labels_of(made.valid_stream) == [5, 9]


def test_the_parts_that_a_stream_was_cut_into_keep_its_labels() -> None:
    online = list(split_online_stream(labelled_benchmark([(5, 0)], [(9, 1)]).train_stream, 20, seed=1))
    for i, experience in enumerate(online):
        experience.current_experience = i
    assert labels_of(online) == [5, 5, 9, 9]
    unlabelled = list(split_online_stream(tiny_benchmark((0, 1), labels=False).train_stream, 30, seed=1))
    for i, experience in enumerate(unlabelled):
        experience.current_experience, experience.origin_stream = i, tiny_benchmark((0,)).train_stream
    assert labels_of(unlabelled) == [0, 1, 2, 3]


def test_only_a_part_of_the_labels_of_what_it_was_cut_from() -> None:
    online = list(split_online_stream(labelled_benchmark([(5, 0), (9, 1)]).train_stream, 40, shuffle=False, seed=1))
    for i, experience in enumerate(online):
        experience.current_experience, experience.origin_stream = i, tiny_benchmark((0,)).train_stream
    assert labels_of(online) == [5, 9]


def _declared_and_carried() -> Any:
    made = carrying(7, 3).train_stream
    made[0].task_label = 8
    return made


def _declared_and_constant() -> Any:
    made = carrying(7, 7).train_stream
    for label, experience in zip((8, 9), made, strict=True):
        experience.task_labels = [label]
    return made


def _origin_and_carried() -> Any:
    made = carrying(7, 3).train_stream
    made[0].origin_experience = labelled_benchmark([(8, 0)]).train_stream[0]
    return made


@pytest.mark.parametrize("make", [_declared_and_carried, _declared_and_constant, _origin_and_carried])
def test_two_places_that_differ_are_named(make: Any) -> None:
    with tiny_strategy() as strategy:
        with pytest.raises(InputError, match=r"contradicts itself on its task labels: .*\[[78]\] but .*\[[78]\]"):
            strategy.train(make())
        assert strategy.run_dir is None


def test_a_label_given_by_hand_beside_the_placeholder_is_no_contradiction() -> None:
    made = carrying(0, 0).train_stream
    for label, experience in zip((8, 9), made, strict=True):
        experience.task_label = label
    assert labels_of(made) == [8, 9]


class Triples(TensorDataset):
    """Samples with a task label of the user's own, third."""

    label = 0

    def __getitem__(self, index: int) -> Any:
        return (*super().__getitem__(index), self.label)


def triples(*labels: int) -> Any:
    """A benchmark whose samples alone carry these labels."""
    made = []
    for i, label in enumerate(labels):
        leaf = leaf_of(i, 24, i, first=2 * i)
        leaf.__class__ = Triples
        leaf.label = label  # type: ignore[attr-defined]
        made.append(as_classification_dataset(leaf))
    return benchmark_from_datasets(train=made, test=made)


def test_labels_that_only_the_samples_carry(caplog: pytest.LogCaptureFixture) -> None:
    made = triples(7, 3)
    with tiny_strategy(train_epochs=1, eval_every=0) as strategy:
        strategy.train(made.train_stream, eval_streams=[made.test_stream])
        metrics = strategy.eval(made.test_stream)
    assert strategy.registry["label"].to_pylist() == [7, 3]
    assert metrics["Gate_Acc_Stream/eval_phase/test_stream"] == 1
    assert "The task label 7 of experience 0 is the one that its samples carry third" in caplog.text


def test_samples_that_contradict_the_experience_are_refused() -> None:
    made = triples(7, 3).train_stream
    made[0].task_label = 8
    with (
        tiny_strategy(train_epochs=1) as strategy,
        pytest.raises(InputError, match="it is of 8 but its samples carry 7"),
    ):
        strategy.train(made)


def test_the_index_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(tiny_benchmark((0, 1, 2), labels=False).train_stream)
    assert caplog.text.count("has no task labels: its index is taken") == 1


def test_labels_that_are_no_integers_are_named() -> None:
    made = tiny_benchmark((0,), labels=False).train_stream
    made[0].task_labels = ["photos"]
    with tiny_strategy() as strategy, pytest.raises(InputError, match=r"'photos' .* is no task label"):
        strategy.train(made)


# Properties that raise


def several(label: int) -> Any:
    """An older scenario's benchmark with two labels in its first experience, and one in its second."""
    made = {}
    for name, count in (("train", 24), ("test", 8)):
        first = [with_data_label(leaf_of(i, count, i, first=2 * i), label + i) for i in range(3)]
        made[name] = [first[0].concat(first[1]), first[2]]
    return dataset_benchmark(made["train"], made["test"])


def test_several_labels_of_an_older_scenario_are_a_task_each() -> None:
    """Asking such an experience for its only label raises a ValueError."""
    made = several(3)
    with pytest.raises(ValueError, match="single task label"):
        _ = made.train_stream[0].task_label
    with tiny_strategy(train_epochs=1, eval_every=0) as strategy:
        strategy.train(made.train_stream, eval_streams=[made.test_stream])
        metrics = strategy.eval(made.test_stream)
        assert strategy.registry["label"].to_pylist() == [3, 4, 5]
        found = hashes(strategy)
    assert next(value for name, value in metrics.items() if name.startswith("Gate_Acc_Stream")) > 0.9
    newer = labelled_benchmark([(3, 0)])
    assert len(found) == 3
    assert labels_of(newer.train_stream) == [3]


@pytest.mark.parametrize(
    "name", ["task_label", "task_labels", "classes_in_this_experience", "benchmark", "future_classes"]
)
@pytest.mark.parametrize("error", [ValueError, AssertionError, KeyError, RuntimeError])
def test_a_property_that_raises_is_not_there(name: str, error: type[Exception]) -> None:
    def raises(_self: Any) -> Any:
        raise error("cannot be asked")

    experience = tiny_benchmark((0,), labels=False).train_stream[0]
    experience.__class__ = type("Raises", (type(experience),), {name: property(raises)})
    with tiny_strategy(train_epochs=1) as strategy:
        task = next(iter([intake_of(strategy, [experience]).next_task()]))
    assert task.record.label == 0
    assert name not in task.experience.attributes


def test_a_dataset_that_cannot_be_had_is_named() -> None:
    def raises(_self: Any) -> Any:
        raise FileNotFoundError("no such folder")

    experience = tiny_benchmark((0,)).train_stream[0]
    experience.__class__ = type("Raises", (type(experience),), {"dataset": property(raises)})
    with tiny_strategy() as strategy, pytest.raises(InputError, match="experience 0 cannot be had: FileNotFoundError"):
        strategy.train(experience)


def test_an_experience_in_training_mode_hides_its_index_and_is_used() -> None:
    experience = task_incremental_benchmark(tiny_benchmark((0,), labels=False)).train_stream[0].train()
    assert labels_of([experience]) == [0]
