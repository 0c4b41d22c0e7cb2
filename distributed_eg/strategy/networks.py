"""A network of the user's own, as one that experts can be copies of."""

from __future__ import annotations

import copy

from avalanche.models import DynamicModule, IncrementalClassifier
from torch import nn

from distributed_eg.errors import BackboneError
from distributed_eg.method.head import set_head


def with_plain_head(network: nn.Module) -> nn.Module:
    """The network; a copy with a plain linear head where it has Avalanche's growing one, for each expert has a head of
    its task's classes anyway.

    Raises:
        BackboneError: another layer changes itself from task to task, or asks for task labels.
    """
    changing = {name: module for name, module in network.named_modules() if isinstance(module, DynamicModule)}
    for name, module in changing.items():
        if type(module) is not IncrementalClassifier or not name:
            raise BackboneError(
                f"{name or 'The backbone'} is a {type(module).__name__}, which changes with the tasks or asks for task "
                "labels; here every task has an expert of its own: put an nn.Linear in its place."
            )
    if changing:
        network = copy.deepcopy(network)
        for name in changing:
            set_head(network, name, network.get_submodule(f"{name}.classifier"))
    return network
