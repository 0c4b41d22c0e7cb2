"""An experience as hooks see it where an expert trains: as in Avalanche, or one clear error."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
from avalanche.benchmarks.scenarios import CLStream, ExperienceAttribute, class_incremental_benchmark
from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
from avalanche.benchmarks.scenarios.deprecated.generators import dataset_benchmark, nc_benchmark
from avalanche.benchmarks.scenarios.generic_scenario import ExperienceMode, MaskedAttributeError
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch.utils.data import TensorDataset

from distributed_eg.errors import InputError
from distributed_eg.runtime.messages import ExperienceInfo
from distributed_eg.strategy.tasks.experiences import parts_of
from distributed_eg.strategy.tasks.worker_experience import WorkerExperience, info_of
from tests.helpers import task_images, tiny_benchmark, tiny_net, tiny_strategy

# As a script's own module: all that is defined here travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def four_classes(seed: int) -> Any:
    """Images of four classes, for Avalanche's splits."""
    images, targets = task_images(0, 80, seed, num_classes=4)
    dataset = TensorDataset(images, targets)
    dataset.targets = targets.tolist()  # type: ignore[attr-defined]
    return as_classification_dataset(dataset)


def class_incremental() -> Any:
    """Two experiences with a timeline of classes, and no task labels."""
    datasets = {"train": four_classes(1), "test": four_classes(2)}
    return class_incremental_benchmark(datasets, num_experiences=2, class_order=[0, 1, 2, 3])


def older() -> Any:
    """Two experiences of Avalanche's older scenarios."""
    return nc_benchmark(four_classes(1), four_classes(2), n_experiences=2, task_labels=True, seed=0)


BENCHMARKS: dict[str, Callable[[], list[Any]]] = {
    "from datasets": lambda: list(tiny_benchmark((0, 1), train=20).train_stream),
    "without labels": lambda: list(tiny_benchmark((0, 1), train=20, labels=False).train_stream),
    "class-incremental": lambda: list(class_incremental().train_stream),
    "older": lambda: list(older().train_stream),
    "slice": lambda: list(tiny_benchmark((0, 1, 2), train=20).train_stream[1:]),
    "slice of older": lambda: list(older().train_stream[1:]),
}


def on_worker(experience: Any) -> Any:
    """As a worker builds it again."""
    return WorkerExperience(info_of(experience), experience.dataset)


AS_IN_AVALANCHE: dict[str, Callable[[Any], Any]] = {
    "index": lambda e: e.current_experience,
    "label": lambda e: e.task_label,
    "labels": lambda e: e.task_labels,
    "classes": lambda e: (e.classes_in_this_experience, e.previous_classes, e.classes_seen_so_far, e.future_classes),
    "name": lambda e: e.origin_stream.name,
    "length": lambda e: len(e.origin_stream),
    "own position": lambda e: e.origin_stream[len(e.origin_stream) - 1].current_experience,
    "own slice": lambda e: [o.current_experience for o in e.origin_stream[len(e.origin_stream) - 1 :]],
    "length of slices": lambda e: (len(e.origin_stream[:1]), len(e.origin_stream[1:]), len(e.origin_stream[:0])),
    "beyond": lambda e: e.origin_stream[99],
    "slice ids": lambda e: e.origin_stream.slice_ids,
    "its stream's": lambda e: e.origin_stream[len(e.origin_stream) - 1].origin_stream.name,
    "masked": lambda e: e.train().current_experience,
    "masked in eval": lambda e: e.eval().current_experience,
    "logging": lambda e: e.train().logging().current_experience,
    "unmasked": lambda e: unmasked(e.train()),
    "are masked": lambda e: e.are_attributes_masked,
    "dataset": lambda e: len(e.dataset),
    "nothing": lambda e: e.nothing,
    "has nothing": lambda e: hasattr(e, "nothing"),
    "a number": lambda e: e.number,
    "a private one": lambda e: e._number,
    "a function": lambda e: e.function(2),
    "a tensor": lambda e: e.tensors["a"].tolist(),
    "hidden in training": lambda e: e.hidden,
    "hidden": lambda e: e.train().hidden,
    "a copy": lambda e: copy.copy(e).number,
}
"""What hooks ask, of the last experience of a stream."""


def unmasked(experience: Any) -> Any:
    """Its index, though its mode hides it."""
    with experience.no_attribute_masking():
        return experience.current_experience


def answer(ask: Callable[[Any], Any], experience: Any) -> Any:
    """Its value, or the class of what it raises."""
    try:
        return ask(experience)
    except (AttributeError, IndexError, ValueError, AssertionError) as error:
        return type(error)


@pytest.mark.parametrize("benchmark_of", BENCHMARKS.values(), ids=BENCHMARKS.keys())
def test_what_hooks_ask_is_answered_as_in_avalanche(benchmark_of: Callable[[], list[Any]]) -> None:
    experience = benchmark_of()[-1]
    experience.number, experience._number, experience.function = 3, 4, lambda x: x + 1
    experience.tensors, experience.hidden = {"a": torch.ones(2)}, ExperienceAttribute(5, use_in_eval=True)
    mine = on_worker(experience)
    for name, ask in AS_IN_AVALANCHE.items():
        assert answer(ask, mine) == answer(ask, experience), name


NOT_THERE: dict[str, Callable[[Any], Any]] = {
    "benchmark": lambda e: e.benchmark,
    "stream's benchmark": lambda e: e.origin_stream.benchmark,
    "another experience": lambda e: e.origin_stream[0],
    "all experiences": lambda e: list(e.origin_stream),
    "experiences of a slice": lambda e: list(e.origin_stream[:1]),
    "stream's experiences": lambda e: e.origin_stream.exps,
}


@pytest.mark.parametrize("benchmark_of", ["from datasets", "class-incremental", "older"])
@pytest.mark.parametrize("ask", NOT_THERE.values(), ids=NOT_THERE.keys())
def test_what_only_the_driver_has_is_one_clear_error(benchmark_of: str, ask: Callable[[Any], Any]) -> None:
    with pytest.raises(InputError, match=r"experience.* is not available where an expert trains: .*when you make it"):
        ask(on_worker(BENCHMARKS[benchmark_of]()[-1]))


def test_a_stream_that_gives_experiences_one_by_one_has_no_length_on_a_worker_either() -> None:
    (experience,) = CLStream("train", tiny_benchmark((0,), train=20).train_stream)
    experience.origin_stream = CLStream("train", (e for e in [experience]))
    mine = on_worker(experience)
    assert mine.origin_stream.name == "train"
    for stream in (experience.origin_stream, mine.origin_stream):
        with pytest.raises(TypeError):
            len(stream)


# What a user gave it


class Hard(DatasetExperience[Any]):
    """An experience of a class of its own."""

    @property
    def difficulty(self) -> int:
        """A number."""
        return 7


def test_what_cannot_travel_or_would_bring_other_data_is_told_when_it_is_asked_for() -> None:
    first, second = tiny_benchmark((0, 1), train=20).train_stream
    hard = Hard(dataset=second.dataset, current_experience=1)
    hard.origin_stream = second.origin_stream
    hard.lock, hard.note = threading.Lock(), "kept"
    for name, value in {
        "other": first,
        "others": [first],
        "stream": first.origin_stream,
        "data": first.dataset,
    }.items():
        setattr(hard, name, value)
    info = info_of(hard)
    assert sum(len(packed) for packed in info.added.values()) < 1000
    mine = WorkerExperience(info, hard.dataset)
    assert mine.note == "kept"
    with pytest.raises(InputError, match=r"attribute 'lock' of experience 1 .*cannot pickle '_thread.lock'"):
        _ = mine.lock
    for name in ("other", "others", "stream", "data"):
        with pytest.raises(InputError, match=rf"attribute '{name}' of experience 1 .*holds this task's data only"):
            getattr(mine, name)
    with pytest.raises(InputError, match=r"experience.difficulty belongs to the class Hard"):
        _ = mine.difficulty


def test_what_cannot_be_made_again_is_named() -> None:
    info = ExperienceInfo(3, "train", added={"gone": b"cnot_there\nx\n."})
    with pytest.raises(InputError, match=r"attribute 'gone' of experience 3 cannot be made .*'not_there'"):
        WorkerExperience(info, tiny_benchmark((0,), train=20).train_stream[0].dataset)


def test_the_mode_of_an_experience_travels() -> None:
    for experience in tiny_benchmark((0,), train=20).train_stream:
        assert on_worker(experience.train())._exp_mode is ExperienceMode.TRAIN
        with pytest.raises(MaskedAttributeError):
            _ = on_worker(experience.train()).current_experience


def test_an_older_experience_of_several_labels_has_none_of_its_own() -> None:
    """There ``task_label`` is a property that raises."""
    parts = [experience.dataset for experience in tiny_benchmark((0, 1), train=20).train_stream]
    (experience,) = dataset_benchmark([parts[0].concat(parts[1])], [parts[0]]).train_stream
    assert [on_label.info.attributes["task_label"] for on_label in parts_of(experience)] == [0, 1]


# In hooks


class Looks(SupervisedPlugin):
    """Keeps what it is told about the experiences that it meets, in training and in the evaluations within."""

    def __init__(self, folder: Any) -> None:
        super().__init__()
        self.folder = folder

    def look(self, where: str, strategy: Any) -> None:
        """Write a line."""
        e = strategy.experience
        line = f"{where} {e.origin_stream.name} {e.current_experience} {len(e.origin_stream)} {e.task_label} {e.note}\n"
        with (self.folder / f"{e.task_label}.txt").open("a") as file:
            file.write(line)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.look("train", strategy)

    def after_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.look("eval", strategy)


def test_hooks_see_it_as_avalanche_shows_it(tmp_path: Any) -> None:
    """Each task measures its own experience."""
    told = []
    for name in ("naive", "ours"):
        folder = tmp_path / name
        folder.mkdir()
        experiences = list(tiny_benchmark((0, 1), train=20).train_stream)
        for experience in experiences:
            experience.note = f"note {experience.current_experience}"
        net, settings = (
            tiny_net(),
            {"train_mb_size": 16, "train_epochs": 1, "eval_every": 1, "plugins": [Looks(folder)]},
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        if name == "naive":
            for experience in experiences:
                Naive(model=net, optimizer=optimizer, **settings).train(experience, eval_streams=[experience])
        else:
            with tiny_strategy(**settings) as strategy:
                strategy.train(experiences, eval_streams=[experiences])
        told.append([path.read_text() for path in sorted(folder.iterdir())])
    assert told[0] == told[1]
    assert "eval train 1 2 1 note 1" in told[0][1]
