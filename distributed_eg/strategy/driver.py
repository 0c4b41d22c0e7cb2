"""The ends of a run as a strategy sees them: starting it, taking a reference in, handing the gate to the model."""

from __future__ import annotations

import logging
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch.utils.data import Dataset

from distributed_eg.config import ClusterConfig, MethodConfig
from distributed_eg.runtime.dispatcher import Observer
from distributed_eg.runtime.run import OpenRun, open_run
from distributed_eg.store.experts import ExpertReader, Reference
from distributed_eg.store.registry import Registry
from distributed_eg.store.tables import REGISTRY_SCHEMA, RELATEDNESS_SCHEMA
from distributed_eg.store.weights import load_tensors
from distributed_eg.strategy.model import ExpertGate
from distributed_eg.strategy.predictor import TrainedRun
from distributed_eg.types import AutoencoderKind

logger = logging.getLogger(__name__)

_UNEQUAL = 3


def start_run(
    model: ExpertGate,
    cluster: ClusterConfig,
    method: MethodConfig,
    settings: dict[str, Any],
    device: str | None,
    observer: Observer | None,
) -> OpenRun:
    """Open a run for ``model``; without a storage it lies in a temporary folder that lives as long as the model."""
    by_ray = cluster.engine == "ray" and (device is None or device.startswith("cuda"))
    run = open_run(
        cluster,
        method,
        settings=settings,
        root=model.expert,
        backbone={
            "arch": model.arch,
            "custom": model.custom,
            "weights": model.weights,
            "pretrained": model.pretrained_flag,
        },
        feature_layer=model.output_layer_name,
        shape=model.shape,
        device=None if by_ray else device,
        observer=observer,
    )
    if cluster.storage is None:
        weakref.finalize(model, shutil.rmtree, run.storage.uri, ignore_errors=True)
    return run


def adopt_reference(run: OpenRun, reference: Dataset[Any] | str | Path | None, kind: AutoencoderKind) -> None:
    """Give the run its statistics, and the root its autoencoder, from a dataset or a file of ``save_reference``."""
    if isinstance(reference, str | Path):
        run.session.adopt_reference(Reference.load(reference, kind).store(run.storage))
    elif reference is not None:
        dataset = reference.eval() if hasattr(reference, "eval") else reference
        shipped, _held = run.engine.shipper.ship(dataset, "the reference dataset")
        run.session.fit_reference(shipped)


@contextmanager
def attaching(model: ExpertGate, run: OpenRun, method: MethodConfig, max_resident_experts: int) -> Iterator[None]:
    """After the block, hand ``model`` the gate over all sealed tasks; but whoever interrupts it waits for nothing."""
    try:
        yield
    except Exception:
        _attach(model, run, method, max_resident_experts)
        raise
    _attach(model, run, method, max_resident_experts)


def _attach(model: ExpertGate, run: OpenRun, method: MethodConfig, max_resident_experts: int) -> None:
    registry = run.session.registry
    if registry.manifests and registry.statistics is not None:
        if run.reader is None:
            load = partial(load_tensors, run.storage)
            run.reader = ExpertReader(load, model.expert, max_resident_experts, model.device)
        gate = run.reader.gate(registry.gate_ref(method))
        model.attach(TrainedRun(gate, registry.expert_refs(), run.reader, run.threads))


def tables(run: OpenRun | None) -> tuple[pa.Table, pa.Table]:
    """Registry and relatedness table; empty before there is a run."""
    if run is None:
        return REGISTRY_SCHEMA.empty_table(), RELATEDNESS_SCHEMA.empty_table()
    return run.session.registry.tables()


def warn_of_unequal_tasks(registry: Registry) -> None:
    """Say where the gate is known to be weak: a small task's subspace explains its own unseen images worse."""
    sizes = {task: registry.autoencoders[manifest.task].num_samples for task, manifest in registry.newest.items()}
    if not sizes:
        return
    smallest, largest = min(sizes, key=lambda task: sizes[task]), max(sizes, key=lambda task: sizes[task])
    if sizes[largest] > _UNEQUAL * sizes[smallest]:
        logger.warning(
            "Task sizes are unequal: task %d has %d training images, task %d has %d. The gate tends to send images of "
            "small tasks to large ones of the same kind: look at Gate_Acc_Exp task by task.",
            smallest,
            sizes[smallest],
            largest,
            sizes[largest],
        )
