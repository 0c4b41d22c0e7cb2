"""Run directories of any number of tasks, made of records alone: nothing is trained."""

from __future__ import annotations

from pathlib import Path

import torch

from distributed_eg.method.calibration import hold_out
from distributed_eg.store import records
from distributed_eg.store.evaluations import EvaluatedExperience, EvaluationRecord, Route, seal_next
from distributed_eg.store.records import (
    AutoencoderRecord,
    RelatednessRecord,
    RunRecord,
    StageTiming,
    TaskManifest,
    TaskRecord,
    TaskTimings,
)
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.weights import save_tensors
from distributed_eg.types import TransferChoice

BEGAN_S = 1_780_000_000.0
WEIGHTS = Artifact("root-0123456789abcdef.safetensors", "ab" * 32, 1000)


def make_run(path: Path, num_tasks: int, *, evaluated: bool = True, name: str = "{}", families: int = 4) -> Storage:
    """A finished run. Tasks of a family are related by 0.95 less a little for each step between them, others by 0.2;
    task 3 is as related to two. ``name`` is each class's, with the task's number in it. Two workers took turns."""
    storage = Storage(str(path))
    root = {"arch": "tiny", "root": {"path": WEIGHTS.path, "sha256": WEIGHTS.sha256, "size_bytes": 1000}}
    method = {"temp": None, "seed": 7, "gate_score": "shared"}
    records.seal(storage, RunRecord("5eed0fa11", method, 1, root, {"lr": 0.1}, {"torch": "2.0"}, {"cpu": "AVX2"}))
    for task in range(num_tasks):
        _make_task(storage, task, name.format(task), families)
    if evaluated:
        experiences = tuple(
            EvaluatedExperience(task, "test", (task + 100,), 20, 0.9, 0.8, 0.75, 0.05) for task in range(num_tasks)
        )
        routes = [Route(task, task, 18) for task in range(num_tasks)]
        routes += [Route(task, (task + 1) % num_tasks, 2) for task in range(num_tasks)]
        tasks, finished = tuple(range(num_tasks)), "2026-06-01T12:00:00+00:00"
        seal_next(storage, EvaluationRecord(0, finished, "0.1", 7, tasks, experiences, tuple(routes)))
    return storage


def _make_task(storage: Storage, task: int, name: str, families: int) -> None:
    related = [0.95 - 0.001 * (task - c) if c % families == task % families else 0.2 for c in range(task)]
    if task == 3:
        related = [0.1, 0.6, 0.5995]
    parent = None if task == 0 else max(range(task), key=lambda c: related[c])
    transfer = "fresh" if parent is None else "lwf" if related[parent] > 0.9 else "finetune"
    own = torch.linspace(0, 3, 30)
    others = (own + 1)[:, None] if task else own.new_empty(30, 0)
    held_out = save_tensors(storage, f"tasks/{task:05d}/held-out", hold_out(own, others).tensors())
    records.seal(storage, TaskRecord(task, task + 100, (2 * task, 2 * task + 1), (task,), None, {}, (name, None)))
    records.seal(storage, AutoencoderRecord(task, task + 100, "linear", WEIGHTS, 50))
    choice = TransferChoice(parent, transfer)
    row = RelatednessRecord(
        *(task, choice, 1.0, 10.0, "variance", tuple(range(task))),
        tuple(1.0 + 10.0 * (1 - value) for value in related),
        held_out,
    )
    sealed = records.seal(storage, row)
    classes = (2 * task, 2 * task + 1)
    manifest = TaskManifest(task, task + 100, (task,), classes, parent, transfer, None, WEIGHTS, sealed, WEIGHTS)
    records.seal(storage, manifest)
    began_s = BEGAN_S + 10 * (task // 2)
    stages = [
        StageTiming(stage, f"w{task % 2}", 2.0, "CPU", began_s + 2 * i)
        for i, stage in enumerate(("features", "autoencoder", "relate", "expert"))
    ]
    records.seal(storage, TaskTimings(task, tuple(stages)))
