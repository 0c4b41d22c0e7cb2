"""An experience on its way: what of it travels, and what it is on a worker."""

from __future__ import annotations

import pickle
from collections.abc import Sized
from functools import partial
from typing import Any, NoReturn

from avalanche.benchmarks import DatasetExperience
from avalanche.benchmarks.scenarios import CLScenario, CLStream, EagerCLStream
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from avalanche.benchmarks.utils import AvalancheDataset
from torch.utils.data import Dataset

from distributed_eg.errors import InputError
from distributed_eg.runtime.messages import ExperienceInfo
from distributed_eg.runtime.pickling import Pickler, dumps, load
from distributed_eg.strategy.avalanche_types import LabelledDataset
from distributed_eg.strategy.tasks.task_labels import index_of, read

_ATTRIBUTES = "task_label task_labels classes_in_this_experience previous_classes classes_seen_so_far future_classes"
_ABSENT = object()
_INSIDE = "_current_experience _origin_stream _unmask_context_depth _dataset _benchmark"
"""What Avalanche keeps in an experience, and a worker's has of its own."""


class WorkerExperience(DatasetExperience[LabelledDataset]):
    """An experience as a worker knows it: its data, its attributes and what its user gave it, without the benchmark
    behind it."""

    def __init__(self, info: ExperienceInfo, dataset: LabelledDataset) -> None:
        super().__init__(dataset=dataset, current_experience=info.index)
        self._left = info.left
        self.origin_stream = WorkerStream(info, self)
        for name, value in info.attributes.items():
            setattr(self, name, value)
        for name, packed in info.added.items():
            what = f"The attribute {name!r} of experience {info.index}"
            setattr(self, name, load(partial(pickle.loads, packed), what))

    def __getattr__(self, name: str) -> NoReturn:
        if why := vars(self).get("_left", {}).get(name):
            raise InputError(why)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def benchmark(self) -> NoReturn:
        """Not there: raises."""
        raise _not_here("experience.benchmark")


class WorkerStream(EagerCLStream[WorkerExperience]):
    """The stream that an experience is from: as long as on the driver, with that one experience in it."""

    def __init__(self, info: ExperienceInfo, experience: WorkerExperience) -> None:
        self._indices, self._index = info.stream_indices, info.index
        slice_ids = None if isinstance(self._indices, range) else self._indices
        super().__init__(info.stream, [experience], set_stream_info=False, slice_ids=slice_ids)

    def _full_length(self) -> int:
        if self._indices is None:
            raise TypeError(
                f"The stream {self.name!r} gives its experiences one by one: nobody knows how many there are."
            )
        return 1 + max(self._indices)

    def _make_experience(self, experience_idx: int) -> WorkerExperience:
        if experience_idx != self._index:
            raise _not_here(f"experience {experience_idx} of experience.origin_stream")
        return self._exps[0]

    @property
    def benchmark(self) -> NoReturn:
        """Not there: raises."""
        raise _not_here("experience.origin_stream.benchmark")

    @benchmark.setter
    def benchmark(self, _: object) -> None:
        """Avalanche sets it, to None."""


def _not_here(what: str) -> InputError:
    return InputError(
        f"{what} is not available where an expert trains: a worker holds this task's data only. Give your plugin what "
        "it needs when you make it."
    )


class _AttributePickler(Pickler):
    """Takes what a user gave an experience, and no data: with one experience of others, all of them would travel."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, CLExperience | CLStream | CLScenario | AvalancheDataset | Dataset):
            raise TypeError(f"a worker holds this task's data only, and this is a {type(obj).__name__}")
        return super().reducer_override(obj)


def info_of(experience: CLExperience) -> ExperienceInfo:
    """What a worker needs to build the experience again."""
    values = {name: read(experience, name, _ABSENT) for name in _ATTRIBUTES.split()}
    attributes = {name: value for name, value in values.items() if value is not _ABSENT}
    if read(experience, "_origin_stream") is None:
        raise InputError("The experience belongs to no stream: set its origin_stream, such as CLStream('train', ()).")
    index, stream = index_of(experience), experience.origin_stream
    added, left = {}, {}
    known = {*attributes, *_INSIDE.split(), *dir(WorkerExperience)}
    for name in (n for n in dir(type(experience)) if not n.startswith("_") and n not in known):
        left[name] = f"experience.{name} belongs to the class {type(experience).__name__}, which stays on the driver."
    for name in (n for n in vars(experience) if n not in known):
        try:
            what = f"The attribute {name!r} of experience {index}"
            added[name] = dumps(vars(experience)[name], what, _AttributePickler)
        except InputError as error:
            left[name] = str(error)
    indices = None
    if isinstance(stream, Sized):
        sliced = getattr(stream, "slice_ids", None)
        indices = range(len(stream)) if sliced is None else tuple(sliced)
    return ExperienceInfo(index, stream.name, attributes, indices, added, left)
