"""Experts: a copy of the parent's network with a fresh head for the task's own classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distributed_eg.errors import BackboneError

Head = nn.Linear | nn.Conv2d


def find_head(network: nn.Module) -> str:
    """Dotted name of the network's head: its last linear layer, or its last convolution where there is none
    (SqueezeNet).

    Raises:
        BackboneError: there is neither.
    """
    for kind in (nn.Linear, nn.Conv2d):
        names: list[str] = [name for name, module in network.named_modules() if isinstance(module, kind)]
        if names:
            return names[-1]
    raise BackboneError(
        f"The backbone {type(network).__name__} has neither a linear layer nor a convolution that could be its head."
    )


def get_head(network: nn.Module, name: str) -> Head:
    """The head of ``network``; ``name`` as ``find_head`` gives it."""
    module = network.get_submodule(name)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    return module


def set_head(network: nn.Module, name: str, head: nn.Module) -> None:
    """Put ``head`` in the place of the network's head."""
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, head)


def new_head(like: Head, num_classes: int) -> Head:
    """A freshly initialised head as ``like``, with ``num_classes`` outputs; draws from torch's global generator."""
    if isinstance(like, nn.Linear):
        return nn.Linear(like.in_features, num_classes, bias=like.bias is not None)
    # Torch's types say of what a convolution keeps less than of what it takes.
    return nn.Conv2d(
        like.in_channels,
        num_classes,
        kernel_size=like.kernel_size,  # type: ignore[arg-type]
        stride=like.stride,  # type: ignore[arg-type]
        padding=like.padding,  # type: ignore[arg-type]
        bias=like.bias is not None,
    )


def derive_expert(parent: nn.Module, num_classes: int, seed: int) -> nn.Module:
    """A copy of ``parent`` on the CPU with a fresh head for ``num_classes``, all of it trainable (section 3.3 of the
    paper)."""
    expert = copy.deepcopy(parent).cpu()
    name = find_head(expert)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        set_head(expert, name, new_head(get_head(expert, name), num_classes))
    return expert.requires_grad_(True)


def continue_expert(before: nn.Module, classes_before: Sequence[int], classes: Sequence[int], seed: int) -> nn.Module:
    """A copy of a task's earlier expert for ``classes``, which include its own: the head keeps what it knows of those,
    and has fresh rows for the others."""
    expert = derive_expert(before, len(classes), seed)
    name = find_head(expert)
    old, new = get_head(before, name), get_head(expert, name)
    rows = [list(classes).index(c) for c in classes_before]
    with torch.no_grad():
        new.weight[rows] = old.weight.cpu()
        if new.bias is not None and old.bias is not None:
            new.bias[rows] = old.bias.cpu()
    return expert


def freeze_norm(network: nn.Module) -> None:
    """Keep the running statistics of batch normalisation as they are: a task has too few batches to move them."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def scatter_logits(logits: Tensor, classes: Sequence[int], width: int) -> Tensor:
    """Logits (n, len(classes)) placed at their dataset class ids in (n, width), with −inf elsewhere.

    Cross-entropy of the result with dataset class ids, and its gradient, are those of local logits up to the rounding
    of a sum in another order.
    """
    columns = torch.as_tensor(classes, device=logits.device)
    return logits.new_full((len(logits), width), -torch.inf).index_copy(1, columns, logits)
