"""Experts: a copy of the parent's network with a fresh head for the task's own classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distributed_eg.method.head import input_dtype, new_head, set_head


def derive_expert(parent: nn.Module, head: str, num_classes: int, seed: int) -> nn.Module:
    """A copy of ``parent``, where that is, with a fresh head for ``num_classes``, all of it trainable (section 3.3 of
    the paper); ``head`` as ``find_head`` gives it."""
    return _with_head(copy.deepcopy(parent), head, num_classes, seed)


def blank_expert(root: nn.Module, head: str, num_classes: int) -> nn.Module:
    """A network as ``derive_expert`` gives, but on the CPU and in memory that nobody has written: for weights to be
    loaded."""
    return _with_head(blank(root), head, num_classes, seed=0)


def blank(network: nn.Module) -> nn.Module:
    """A copy of a network on the CPU whose parameters have no values yet."""
    empty = {
        id(old): type(old)(torch.empty_like(old, device="cpu"), requires_grad=old.requires_grad)
        for old in network.parameters()
    }
    return copy.deepcopy(network, dict(empty))


def _with_head(expert: nn.Module, head: str, num_classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU, where it is drawn; others are left alone
        old = expert.get_submodule(head)
        device = next(old.parameters()).device
        set_head(expert, head, new_head(old.cpu(), num_classes).to(device))
    return expert.requires_grad_(True)


def continue_expert(
    before: nn.Module, head: str, classes_before: Sequence[int], classes: Sequence[int], seed: int
) -> nn.Module:
    """A copy of a task's earlier expert for ``classes``, which include its own: the head keeps what it knows of those,
    and has fresh rows for the others."""
    expert = derive_expert(before, head, len(classes), seed)
    old = before.get_submodule(head)
    rows = [list(classes).index(c) for c in classes_before]
    with torch.no_grad():
        for name, value in expert.get_submodule(head).named_parameters(recurse=False):
            earlier = old.get_parameter(name).to(value.device)
            # What has no row a class is one for all of them, such as a scale.
            value[rows if len(earlier) == len(rows) else ...] = earlier
    return expert


def train_as(expert: nn.Module, root: nn.Module, head: str) -> None:
    """Let the expert's parameters learn where the user lets the root's; the fresh head always does."""
    kept = {name: parameter.requires_grad for name, parameter in root.named_parameters()}
    for name, parameter in expert.named_parameters():
        parameter.requires_grad_(kept.get(name, True) or name.startswith(f"{head}."))


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (n, classes) in float32, whatever type the network computes in."""
    logits: Tensor = network(images.to(input_dtype(network)))
    return logits.float()


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
