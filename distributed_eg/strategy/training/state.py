"""The state of a training as values and tensors: networks, optimizer, random generators, recorded metrics."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from distributed_eg.strategy.training.changes import CannotResumeError
from distributed_eg.strategy.training.recording import RecordedCallback, RecordedValue


def network_state(net: nn.Module) -> dict[str, Any]:
    """Also what a state dict leaves out: gradients that nobody cleared, buffers that are not kept, what is frozen."""
    state = net.state_dict()
    return {
        "state": state,
        "buffers": {name: buffer for name, buffer in net.named_buffers() if name not in state},
        "gradients": {name: p.grad for name, p in net.named_parameters() if p.grad is not None},
        "trained": {name: p.requires_grad for name, p in net.named_parameters()},
    }


def set_network(net: nn.Module, stored: dict[str, Any]) -> None:
    state = net.state_dict()
    state.update(stored["state"])  # not a plain dict: it knows the versions of the layers
    net.load_state_dict(state)
    buffers = dict(net.named_buffers())
    for name, value in stored["buffers"].items():
        buffers[name].copy_(value)
    for name, parameter in net.named_parameters():
        gradient: Tensor | None = stored["gradients"].get(name)
        parameter.requires_grad_(stored["trained"][name])
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def require_exact(optimizer: Optimizer) -> None:
    """Torch's own ``load_state_dict`` casts state to its parameter's type."""
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        return
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            tensors = isinstance(value, Tensor) and isinstance(parameter, Tensor)
            if tensors and name != "step" and parameter.is_floating_point() and value.dtype != parameter.dtype:
                kind = type(optimizer).__name__
                raise CannotResumeError(
                    f"{kind} keeps {name!r} as {value.dtype} for a parameter of {parameter.dtype}, and loads it as that"
                )


def set_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load, but keep the groups that others may hold."""
    groups = optimizer.param_groups
    optimizer.load_state_dict(state)
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        group.clear()
        group.update(loaded)
    optimizer.param_groups = groups


def publish(evaluator: EvaluationPlugin, records: Sequence[RecordedCallback], last: list[str]) -> None:
    """Give the evaluator back what it knew: plugins such as early stopping ask it for the ``last`` values."""
    evaluator.all_metric_results.clear()
    evaluator.last_metric_results = {}
    for record in records:
        for value in record.values:
            evaluator.publish_metric_value(MetricValue(None, value.name, value.value, value.x))
    evaluator._metric_values = []
    evaluator.last_metric_results = {name: evaluator.last_metric_results[name] for name in last}


def random_state(device: torch.device) -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def set_random(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def pack_records(records: Sequence[RecordedCallback]) -> dict[str, Any]:
    """Records as columns: there is one for every iteration, and most are like the one before.

    Raises:
        TypeError: a value stands at an x that is no integer.
    """
    kinds: dict[tuple[Any, ...], int] = {}
    sequence: list[int] = []
    xs: list[int] = []
    floats: list[float] = []
    others: dict[str, Any] = {}
    for record in records:
        values = record.values
        kind = (record.callback, record.num_batches, tuple((v.metric, v.name, type(v.value) is float) for v in values))
        sequence.append(kinds.setdefault(kind, len(kinds)))
        for value in values:
            if type(value.x) is not int:
                raise TypeError(f"a value of the metric {value.name!r} stands at x = {value.x!r}, which is no integer")
            xs.append(value.x)
            if type(value.value) is float:
                floats.append(value.value)
            else:
                others[f"{len(others)} {value.name}"] = value.value
    return {
        "kinds": list(kinds),
        "sequence": torch.tensor(sequence, dtype=torch.int64),
        "xs": torch.tensor(xs, dtype=torch.int64),
        "floats": torch.tensor(floats, dtype=torch.float64),
        "others": others,
    }


def unpack_records(packed: dict[str, Any]) -> list[RecordedCallback]:
    xs, floats, others = iter(packed["xs"].tolist()), iter(packed["floats"].tolist()), iter(packed["others"].values())
    records = []
    for position in packed["sequence"].tolist():
        callback, num_batches, kinds = packed["kinds"][position]
        values = [
            RecordedValue(metric, name, next(floats if is_float else others), next(xs))
            for metric, name, is_float in kinds
        ]
        records.append(RecordedCallback(callback, tuple(values), num_batches))
    return records
