"""``distributed-eg tasks``: what a run has learnt."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated

import tyro

from distributed_eg.cli.outcome import TaskLine


@dataclass(frozen=True, kw_only=True)
class TasksOptions:
    """List the finished tasks of a run, with their sizes, parents and versions."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory: a path, or any pyarrow.fs URI."""
    json: bool = False
    """Print one JSON object as the last line of stdout; what people read goes to stderr."""


def tasks(options: Annotated[TasksOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> None:
    """List the finished tasks of a run, with their sizes, parents and versions."""
    from distributed_eg.cli.display import Display
    from distributed_eg.store.registry import Registry, read_run_record
    from distributed_eg.store.storage import Storage

    storage = Storage(options.run)
    read_run_record(storage)  # says where there is none, or a damaged one
    registry = Registry.read(storage)
    first = {version: task for task, manifest in registry.newest.items() for version in manifest.versions}
    lines = [
        TaskLine(
            task=task,
            label=manifest.label,
            classes=registry.arrivals[manifest.task].names,
            num_images=registry.autoencoders[manifest.task].num_samples,
            num_bytes=sum(artifact.size_bytes for artifact in registry.weights_of(manifest.task)),
            parent=None if manifest.parent is None else first[manifest.parent],
            transfer=manifest.transfer,
            versions=len(manifest.versions),
            finished=datetime.fromtimestamp(storage.modified_s(manifest.path), UTC).isoformat(timespec="seconds"),
            is_retired=task not in registry.active,
        )
        for task, manifest in registry.newest.items()
    ]
    Display(to_stderr=options.json).tasks(lines)
    if options.json:
        print(json.dumps({"tasks": [asdict(line) for line in lines]}))
