"""A task sequence of the user's own, as ``FILE.py:FUNCTION``: imported, called, and made this package's Benchmark."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import cloudpickle
from avalanche.benchmarks import CLExperience, CLScenario
from avalanche.benchmarks.scenarios import DatasetExperience, EagerCLStream, with_task_labels
from avalanche.benchmarks.utils import ConstantSequence, DataAttribute, TaskLabels
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from torch import Tensor

from distributed_eg import given
from distributed_eg.benchmarks.benchmark import Benchmark
from distributed_eg.errors import InputError, told
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.strategy.tasks.task_labels import index_of, read, task_labels_of

T = TypeVar("T")

_NAMED_CLASSES = 3


def own_benchmark(source: str) -> Benchmark:
    """What the function that ``source`` names returns; class names and the transform are left to the datasets.

    Raises:
        InputError: there is no such file or function, it raises, or it returns something else.
    """
    file, _, name = source.rpartition(":")
    path = Path(given.path(file or source, "FILE.py of FILE.py:FUNCTION"))
    if not file or not name or path.suffix != ".py":
        raise InputError(f"{source!r} names no function: give FILE.py:FUNCTION.")
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}, which should have the function {name!r}.")
    module = _run(lambda: _imported(path), path, str(path))
    function = getattr(module, name, None)
    if not callable(function):
        functions = [known for known, value in vars(module).items() if inspect.isfunction(value)]
        near = given.nearest(name, functions) or (f"; it has {', '.join(functions)}" if functions else "")
        raise InputError(f"{str(path)!r} has no function {name!r}{near}.")
    what = f"{path}:{name}"
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InputError(f"{what} must take no argument, but: {told(error)}.") from error
    returned = _run(function, path, what)
    if isinstance(returned, Benchmark):
        return returned
    if isinstance(returned, CLScenario) and {"train", "test"} <= returned.streams.keys():
        return _run(lambda: benchmark_of(returned, what), path, what)
    has = f" with the streams {', '.join(returned.streams)}" if isinstance(returned, CLScenario) else ""
    raise InputError(
        f"{what} returned {type(returned).__name__}{has}; it must return a benchmark of Avalanche's with the streams "
        "train and test, or distributed_eg.benchmarks.Benchmark."
    )


def benchmark_of(scenario: Any, name: str) -> Benchmark:
    """An Avalanche benchmark, a task for each experience, with the experience's index for a label where it has none.

    Raises:
        InputError: its tasks are not each there once in both streams, or its images are no tensors of three dimensions.
    """
    streams = {stream: list(scenario.streams[stream]) for stream in ("train", "test")}
    labels = [_label(experience, name) for experience in streams["train"]]
    tested = [_label(experience, name) for experience in streams["test"]]
    if not labels or labels != tested or len(set(labels)) < len(labels):
        raise InputError(
            f"{name} has the tasks {labels} to train and {tested} to test; the command needs the same in both, each "
            "once. Other sequences train by ExpertGateStrategy in Python."
        )
    datasets = {stream: [experience.dataset for experience in experiences] for stream, experiences in streams.items()}
    for stream, of_stream in datasets.items():
        if empty := [label for label, dataset in zip(labels, of_stream, strict=True) if not len(dataset)]:
            raise InputError(f"{name}: the tasks {empty} have no images to {stream}.")
    classes = [sorted({int(c) for c in dataset.targets.uniques}) for dataset in datasets["train"]]
    for label, trained, dataset in zip(labels, classes, datasets["test"], strict=True):
        if unknown := sorted({int(c) for c in dataset.targets.uniques} - set(trained)):
            raise InputError(f"{name}: task {label} has the classes {unknown} to test that it has none of to train.")
    of_all = {int(c) for of_stream in datasets.values() for dataset in of_stream for c in dataset.targets.uniques}
    if [read(experience, "task_label") for of_stream in streams.values() for experience in of_stream] != labels * 2:
        scenario = _labelled(datasets, labels)
    return Benchmark(
        name=name,
        scenario=scenario,
        task_names=tuple(f"classes {_listed(of_task)}" for of_task in classes),
        domains=("",) * len(labels),
        shape=_shape(datasets["train"][0], name),
        class_names=dict.fromkeys(sorted(of_all)),
        transform=None,
        labels=tuple(labels),
    )


def _imported(path: Path) -> ModuleType:
    """The file as a module, which finds its neighbours, and whose classes travel to workers with their code."""
    spec = importlib.util.spec_from_file_location(f"benchmark_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.parent.resolve()))  # as ``python FILE.py`` does
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    return module


def _run(call: Callable[[], T], path: Path, what: str) -> T:
    """What a call of the user's code gives.

    Raises:
        InputError: it raised; the message has the last line of the user's file that led there.
    """
    try:
        return call()
    except (Exception, SystemExit) as error:
        frames, own = traceback.extract_tb(error.__traceback__), path.resolve()
        line = next((frame.lineno for frame in reversed(frames) if Path(frame.filename).resolve() == own), None)
        if isinstance(error, InputError) and line is None:
            raise
        at = "" if line is None else f" in line {line}"
        raise InputError(f"{what} raised{at}: {told(error)}.") from error


def _label(experience: CLExperience, name: str) -> int:
    labels = task_labels_of(experience)
    if labels is not None and len(labels) != 1:
        raise InputError(f"{name}: experience {index_of(experience)} has the task labels {labels}; it must have one.")
    return index_of(experience) if labels is None else labels[0]


def _labelled(datasets: dict[str, list[Any]], labels: Sequence[int]) -> Any:
    """The same data as experiences with these task labels."""
    streams = []
    for name, of_stream in datasets.items():
        experiences = []
        for index, (dataset, label) in enumerate(zip(of_stream, labels, strict=True)):
            targets = DataAttribute([int(target) for target in dataset.targets], "targets")
            task_labels = TaskLabels(ConstantSequence(label, len(dataset)))
            own = ClassificationDataset([dataset], data_attributes=[targets, task_labels])
            experiences.append(DatasetExperience(dataset=own, current_experience=index))
        streams.append(EagerCLStream(name, experiences))
    return with_task_labels(CLScenario(streams))


def _shape(dataset: Any, name: str) -> tuple[int, int, int]:
    """Of the first image, which is read."""
    with reproducible(seed=0, threads=1):
        image = dataset[0][0]
    if not isinstance(image, Tensor) or image.ndim != 3:
        shown = f"a tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise InputError(f"{name}: the first image is {shown}; images must be tensors (channels, height, width).")
    channels, height, width = image.shape
    return channels, height, width


def _listed(classes: Sequence[int]) -> str:
    more = " …" if len(classes) > _NAMED_CLASSES else ""
    return ", ".join(map(str, classes[:_NAMED_CLASSES])) + more
