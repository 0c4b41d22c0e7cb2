"""Taking up what an earlier driver left, task by task, as its stream arrives."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from distributed_eg.errors import DamagedFileError, ResumeError
from distributed_eg.schedule.events import Stage
from distributed_eg.store.records import TaskRecord
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.types import TaskId

logger = logging.getLogger(__name__)

_SHA256 = re.compile("[0-9a-f]{64}")
_SHOWN_DIGITS = 12
_NOTHING = object()


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that differs, sorted by key: ``method.seed: the run has 0, now 1``.

    Both are compared as JSON, where a tuple equals a list; nan equals nan. Data that were told by all their content,
    before this was done by their samples, are compared by what both descriptions know.
    """
    old, new = (dict(_flat(json.loads(json.dumps(side)), "")) for side in (then, now))
    for content in [key for key in old.keys() - new.keys() if key.rpartition(".")[2] == "content"]:
        samples, indices = (content.removesuffix("content") + name for name in ("samples", "indices"))
        if samples in new.keys() - old.keys() and indices in old.keys() & new.keys():
            del old[content], new[samples]
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, _NOTHING), new.get(key, _NOTHING)
        same = before == after or (before != before and after != after)
        # An empty list beside a filled one is told by what fills that one.
        told = {} in (before, after) and any(other.startswith(f"{key}.") for other in (*old, *new))
        if not same and not told:
            lines.append(f"{key}: the run has {_shown(before)}, now {_shown(after)}")
    return lines


def refuse(what: str, shown: str, lines: list[str]) -> ResumeError:
    """The error for a run that was begun with something else."""
    told = "".join(f"\n  {line}" for line in lines)
    return ResumeError(
        f"The run in {shown!r} was begun with {what}:{told}\nGive what it was begun with, or another storage for a "
        "new run."
    )


def take_up(storage: Storage, recorded: Registry, registry: Registry, arrival: TaskRecord) -> frozenset[Stage]:
    """Move what is recorded for an arriving task into ``registry``; return the stages whose results are whole.

    Every file that these left is read and hashed; a damaged one is named in the log, and its stage is not among them.

    Raises:
        ResumeError: another task, or other data, arrived as this number before.
    """
    task = arrival.task
    before = recorded.arrivals.get(task)
    if before is None:
        return frozenset()
    begun = task in recorded.autoencoders or task in recorded.manifests
    # Autoencoders of others were made under the statistics that the first task's data gave.
    begun |= bool(recorded.autoencoders) and task == min(recorded.arrivals)
    lines = differences(_described(before), _described(arrival))
    if _has_content(before) and not any(map(_has_content, registry.arrivals.values())):  # told once
        logger.warning(
            "The run in %r was begun by an earlier version, which noted no samples of its tasks' data: these are "
            "compared by their classes, lengths, indices and targets.",
            storage.shown,
        )
    # Nothing was learnt from the data of a task that failed early: they may have been corrected since.
    if lines and (begun or before.label != arrival.label):
        raise refuse(f"another task {task}", storage.shown, lines)
    if lines:
        return frozenset()
    return frozenset(_whole_stages(storage, recorded, registry, task))


def _whole_stages(storage: Storage, recorded: Registry, registry: Registry, task: TaskId) -> Iterator[Stage]:
    autoencoder, manifest = recorded.autoencoders.get(task), recorded.manifests.get(task)
    if task in recorded.timings:
        registry.add(recorded.timings[task])
    is_swept = recorded.is_swept(task)  # nobody needs its weights, which may be gone
    if autoencoder is not None and (is_swept or all([is_whole(storage, file) for file in autoencoder.artifacts])):
        registry.add(autoencoder)
        yield Stage.AUTOENCODER
        yield Stage.FEATURES
    relatedness = recorded.relatedness.get(task)
    if relatedness is not None and (is_swept or all([is_whole(storage, file) for file in relatedness.artifacts])):
        registry.add(relatedness)
        yield Stage.RELATE
    if manifest is not None and relatedness is not None and (is_swept or is_whole(storage, manifest.expert)):
        registry.add(manifest)
        yield Stage.EXPERT


def is_whole(storage: Storage, artifact: Artifact) -> bool:
    """Whether a sealed file is what its record says; if not, the log says so."""
    try:
        storage.read_artifact(artifact)
    except DamagedFileError as error:
        logger.warning("%s Its stage is run again.", error)
        return False
    return True


def _has_content(record: TaskRecord) -> bool:
    """Whether an earlier version of this package told the data, by all their content."""
    return "content" in record.identity.get("data", {})


def _described(record: TaskRecord) -> dict[str, Any]:
    told = ("task", "class_names", "transform")  # beside the data, for those who ask later
    return {name: value for name, value in asdict(record).items() if name not in told}


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Scalars by their dotted keys; an empty list or dict counts as one, {}."""
    items = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(items, dict) or (key and not items):
        yield key, items
        return
    for name, item in items.items():
        yield from _flat(item, f"{key}.{name}" if key else str(name))


def _shown(value: Any) -> str:
    if isinstance(value, str) and _SHA256.fullmatch(value):
        return f"{value[:_SHOWN_DIGITS]}…"
    return "nothing" if value is _NOTHING else repr(value)
