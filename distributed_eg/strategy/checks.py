"""What a strategy checks of what it is given: optimizer, device, settings that go unread."""

from __future__ import annotations

import warnings

import torch
from torch.optim import Optimizer

from distributed_eg.config import AutoencoderConfig
from distributed_eg.errors import InputError
from distributed_eg.strategy.model import ExpertGate

_SGD_ONLY = {"batch_size": "ae_train_mb_size", "epochs": "ae_train_epochs", "lr": "ae_lr", "optimizer": "ae_optimizer"}
"""What only the autoencoder "sgd" reads, and its name in the strategy's signature."""


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


def driver_device(device: torch.device | str | None) -> torch.device | str:
    """What the driver's own copy of the model is on: a GPU that only workers have is none here."""
    wants_cuda = device is not None and str(device).startswith("cuda")
    return "cpu" if device is None or (wants_cuda and not torch.cuda.is_available()) else device
