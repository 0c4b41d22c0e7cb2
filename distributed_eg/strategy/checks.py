"""What a strategy checks of what it is given: optimizer, device, settings that go unread, sizes of tasks."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLStream
from avalanche.training.templates.base_sgd import BaseSGDTemplate
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from distributed_eg import given
from distributed_eg.config import AutoencoderConfig, ClusterConfig
from distributed_eg.errors import InputError
from distributed_eg.store.registry import Registry
from distributed_eg.strategy.model import ExpertGate
from distributed_eg.types import GateScore

logger = logging.getLogger(__name__)

_UNEQUAL = 3
_FEW = 20
"""Training images below which the shared score, too, loses more than a tenth of its accuracy beside large tasks."""
_SGD_ONLY = {"batch_size": "ae_train_mb_size", "epochs": "ae_train_epochs", "lr": "ae_lr", "optimizer": "ae_optimizer"}
"""What only the autoencoder "sgd" reads, and its name in the strategy's signature."""


def refuse_other_types(*, optimizer: object, criterion: object, observer: object) -> None:
    """Refuse what could only fail later, in the middle of Avalanche's or our own work.

    Raises:
        InputError: a value is of another type than it must be.
    """
    for name, value, fits, what in (
        ("optimizer", optimizer, isinstance(optimizer, Optimizer), "a torch optimizer that is made already"),
        ("criterion", criterion, callable(criterion), "a module or a function"),
        ("observer", observer, observer is None or callable(observer), "a function"),
    ):
        if not fits:
            raise InputError(f"{name} is {given.shown(value)}; it must be {what}.")


def check_loader_arguments(
    strategy: BaseSGDTemplate[Any, Any, Any], arguments: Mapping[str, object], called: str
) -> None:
    """Refuse what the loaders of Avalanche's strategies drop without a word; warn of what only plugins can hear.

    Raises:
        InputError: an argument of torch's loader that the strategy's own does not take.
    """
    makers = (strategy.make_train_dataloader, strategy.make_eval_dataloader)
    read = {"ffcv_args"}.union(*(inspect.signature(maker).parameters for maker in makers))
    dropped = [name for name in arguments if name in inspect.signature(DataLoader).parameters and name not in read]
    if dropped:
        instead = {
            "batch_size": "give the strategy train_mb_size and eval_mb_size",
            "collate_fn": "give it to the data: AvalancheDataset(…, collate_fn=…)",
        }.get(dropped[0], "leave it out, or override make_train_dataloader in a subclass that takes it")
        raise InputError(f"{called}({dropped[0]}=…) would change nothing: no loader reads it; {instead}.")
    if unheard := [name for name in arguments if name not in read]:
        warnings.warn(
            f"{called}() was given {', '.join(map(repr, unheard))}, which no loader reads; only plugins hear of it.",
            stacklevel=3,
        )


def given_reference(reference: Dataset[object] | str | os.PathLike[str] | None) -> Dataset[object] | str | None:
    """A reference file's path as text, a dataset as it is.

    Raises:
        InputError: it is neither.
    """
    if isinstance(reference, str | os.PathLike):
        return given.path(reference, "reference")
    is_data = hasattr(reference, "__getitem__") and not isinstance(reference, Tensor | np.ndarray | Mapping | CLStream)
    if reference is not None and not is_data:
        advice = "; give its dataset" if hasattr(reference, "dataset") else ""
        raise InputError(
            f"reference is a {type(reference).__name__}; it must be a dataset or the path of a file of save_reference"
            f"{advice}."
        )
    return reference


def warn_of_ignored(config: AutoencoderConfig) -> None:
    """Say which of the seed's settings a closed-form autoencoder ignores."""
    default = AutoencoderConfig()
    ignored = [name for field, name in _SGD_ONLY.items() if getattr(config, field) != getattr(default, field)]
    if config.kind == "linear" and ignored:
        warnings.warn(f"autoencoder='linear' is closed form: it ignores {', '.join(ignored)}.", stacklevel=4)


def check_optimizer(optimizer: Optimizer, model: ExpertGate) -> None:
    """Refuse an optimizer that would train nothing.

    Raises:
        InputError: it holds no parameter of ``model``.
    """
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(id(parameter) in own for parameter in held):
        raise InputError(
            f"The optimizer holds {len(held)} parameters, none of them the model's; make it from "
            "model.expert.parameters()."
        )


def driver_device(device: torch.device | None, of_model: torch.device) -> torch.device:
    """What the driver's own copy of the model is on: where it is; a GPU that only workers have is none here."""
    return of_model if device is None or (device.type == "cuda" and not torch.cuda.is_available()) else device


def placed(cluster: ClusterConfig, device: torch.device | None) -> ClusterConfig:
    """The cluster with the GPUs that a worker needs on ``device``.

    Raises:
        InputError: they contradict each other, or there is no such device in this process, which is to be the worker.
    """
    if device is None:
        return cluster
    if cluster.engine == "inline":
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device={str(device)!r} was asked for, but torch {torch.__version__} finds no GPU here.")
        return cluster
    gpus = cluster.gpus_per_worker
    if gpus is not None and (gpus > 0) != (device.type == "cuda"):
        raise InputError(
            f"device={str(device)!r} and ClusterConfig(gpus_per_worker={gpus:g}) contradict each other: leave one out."
        )
    return replace(cluster, gpus_per_worker=(1.0 if device.type == "cuda" else 0.0) if gpus is None else gpus)


def unequal_sizes(registry: Registry, score: GateScore) -> tuple[int, ...]:
    """The smallest task with its number of training images, and the largest with its own, where they are so unequal
    that the gate is known to be weak; else nothing.

    A small task's autoencoder explains its own unseen images worse; the shared score makes up for that, but for the
    smallest tasks.
    """
    sizes = {task: registry.autoencoders[manifest.task].num_samples for task, manifest in registry.active.items()}
    if not sizes:
        return ()
    smallest, largest = min(sizes, key=lambda task: sizes[task]), max(sizes, key=lambda task: sizes[task])
    is_small = score == "residual" or sizes[smallest] < _FEW
    is_unequal = sizes[largest] > _UNEQUAL * sizes[smallest]
    return (smallest, sizes[smallest], largest, sizes[largest]) if is_small and is_unequal else ()


def warn_of_sizes(extremes: tuple[int, ...]) -> None:
    """Say what ``unequal_sizes`` found."""
    logger.warning(
        "Task sizes are unequal: task %d has %d training images, task %d has %d. The gate tends to send images of "
        "small tasks to large ones of the same kind; with ExpertGate(gate_score='shared') much less, from %d images "
        "on. Look at Gate_Acc_Exp task by task.",
        *(*extremes, _FEW),
    )
