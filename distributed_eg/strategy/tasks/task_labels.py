"""Reading an experience, whatever its mode: its place in the stream, and which task's it is."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from avalanche.benchmarks.scenarios.generic_scenario import CLExperience

from distributed_eg.errors import InputError
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.runtime.worker.causes import ends_process
from distributed_eg.strategy.avalanche_types import LabelledDataset


def read(holder: object, name: str, default: object = None) -> Any:
    """An attribute; ``default`` where there is none, or where asking for it raises, as properties of Avalanche's do:
    for several task labels, for what was not set, for what a mode of the experience masks."""
    try:
        with getattr(holder, "no_attribute_masking", nullcontext)():
            return getattr(holder, name)
    except Exception:
        return default


def index_of(experience: CLExperience) -> int:
    """The experience's place in its stream.

    Raises:
        InputError: it has none.
    """
    index = read(experience, "current_experience")
    if index is None:
        raise InputError("An experience has no index: set its current_experience.")
    return int(index)


def task_labels_of(experience: CLExperience) -> list[int] | None:
    """The experience's task labels, ascending; None where there are none.

    They may stand in the experience, in its data, and in the experience that it was cut from. Avalanche puts the label
    0 where there is none: the same single label in every experience of a stream counts as none, and so does a 0 that
    only data carry, unless the stream is known to have others.

    Raises:
        InputError: two of these places have labels that differ, or a label is no integer.
    """
    declared, carried = _declared(experience), _carried(experience)
    found: dict[str, list[int]] = {}
    stream = read(experience, "_origin_stream")
    stream = getattr(stream, "value", stream)
    made = getattr(stream, "_exps", None)
    if declared and not _is_constant(declared, _defined(stream) if made is None else map(_declared, made)):
        found["it declares"] = declared
    if carried and carried != declared:
        constant = _is_constant(carried, map(_carried, made or ()))
        is_default = carried == [0] and (constant or len(made or ()) < 2)
        if not is_default and (found or not constant):
            found["its data carry"] = carried
    of_origin = task_labels_of(origin) if (origin := read(experience, "origin_experience")) is not None else None
    if of_origin and not (found and {*next(iter(found.values()))} <= {*of_origin}):
        found["it was cut from an experience of"] = of_origin
    (_, labels), *others = found.items() or [("", None)]
    if any(other != labels for _, other in others):
        places = " but ".join(f"{where} {values}" for where, values in found.items())
        raise InputError(f"Experience {index_of(experience)} contradicts itself on its task labels: {places}.")
    return labels


def _declared(experience: CLExperience) -> list[int] | None:
    labels, label = read(experience, "task_labels"), read(experience, "task_label")
    if labels is None and label is not None:
        labels = [label]
    return None if labels is None else sorted({whole(value, "task label") for value in labels})


def _carried(experience: CLExperience) -> list[int] | None:
    labels = read(read(experience, "dataset"), "targets_task_labels")
    return None if labels is None else sorted({whole(value, "task label") for value in labels.uniques})


def _defined(stream: object) -> list[list[int]]:
    """The labels that older scenarios tell without making the experiences."""
    definitions = read(read(stream, "benchmark"), "stream_definitions") or {}
    labels = getattr(definitions.get(getattr(stream, "name", None)), "exps_task_labels", ())
    return [[int(label) for label in of_one] for of_one in labels]


def _is_constant(labels: list[int], everywhere: Iterable[list[int] | None]) -> bool:
    """Whether there are several, all of these labels; the first that is not ends the search."""
    num_alike = 0
    for other in everywhere:
        if other is None or {*other} != {*labels}:
            return False
        num_alike += 1
    return num_alike > 1


def label_in_samples(dataset: LabelledDataset) -> int | None:
    """The task label that stands third in the first and the last sample of a dataset that has no labels otherwise; None
    where there is none, or 0. They are read: hand in a copy."""
    labels = []
    with reproducible(seed=0, threads=1):
        for i in (0, len(dataset) - 1) if read(dataset, "targets_task_labels") is None else ():
            try:
                labels.append(whole(dataset[i][2], "task label"))  # type: ignore[index]  # or it raises
            except BaseException as error:  # no third, or something else; the stage that reads it reports it
                if ends_process(error):
                    raise
                return None
    return labels[0] if labels and labels[0] == labels[1] and labels[0] else None


def whole(value: Any, what: str) -> int:
    """``value``, which may be of any type that holds an integer, as one."""
    try:
        number = int(value)
        if bool(value == number):
            return number
    except Exception as error:
        raise InputError(f"{value!r:.80} ({type(value).__name__}) is no {what}: it must be an integer.") from error
    raise InputError(f"{value!r:.80} ({type(value).__name__}) is no {what}: it must be an integer.")
