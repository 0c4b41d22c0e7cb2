"""A user's criterion over one task's classes: its logits, targets and weights are cut to them, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from distributed_eg.errors import InputError
from distributed_eg.method.gate import ABSENT_LOG_PROBABILITY

_PER_CLASS = ("weight", "weights", "class_weight", "class_weights", "pos_weight", "alpha")
"""Names under which losses keep one number for each class."""
_ELEMENTWISE = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss),
    *(nn.PoissonNLLLoss, nn.SoftMarginLoss, nn.MultiLabelSoftMarginLoss),
)
"""Losses that compare outputs and targets number by number, and know nothing of class ids."""
_SOFT_TOLERANCE = 1e-4
"""What rounding may leave of a sample's mass at classes of other tasks."""


def takes_infinities(criterion: object) -> bool:
    """Whether logits of −inf at absent classes leave its value and gradient as they are: plain cross-entropy only."""
    is_plain = type(criterion) is nn.CrossEntropyLoss and criterion.label_smoothing == 0
    return is_plain or criterion is cross_entropy


def local_loss(criterion: Callable[..., Tensor], output: Tensor, targets: Tensor, classes: Sequence[int]) -> Tensor:
    """A criterion's value over the classes of one task alone; the criterion itself is as before afterwards.

    Args:
        criterion: its weights, where it has any, are over all the dataset's classes.
        output: logits (n, width) over dataset class ids.
        targets: class ids (n,), or soft targets (n, the highest class id + 1 or more).
        classes: the task's class ids, ascending.

    Raises:
        InputError: soft targets that are not over all classes, or have mass outside ``classes``.
    """
    own = torch.tensor(classes, device=output.device)
    weights = [(held, name, held[name]) for held, name in _per_class(criterion)]
    changes = [(held, name, of_all[own.to(of_all.device)].to(own.device)) for held, name, of_all in weights]
    if targets.is_floating_point():
        local = _cut_soft(targets, own)
    else:
        local = torch.searchsorted(own, targets)
        for held, ignored in _ignored(criterion):  # another class may have that position
            local[targets == ignored] = -100
            changes.append((held, "ignore_index", -100))
    before = [(held, name, held[name]) for held, name, _ in changes]
    try:
        for held, name, value in changes:
            held[name] = value
        return criterion(output[:, own], local)
    finally:
        for held, name, value in before:
            held[name] = value


def check_weights(criterion: object, classes: Sequence[int]) -> int:
    """The number of classes that a criterion has weights for; 0: it has none.

    Raises:
        InputError: there are fewer than the dataset has classes, as far as the task's ``classes`` tell.
    """
    lengths = [len(held[name]) for held, name in _per_class(criterion)]
    if lengths and min(lengths) <= max(classes):
        raise InputError(
            f"The criterion has weights for {min(lengths)} classes, but the task has the class {max(classes)}: give a "
            "weight for each of the dataset's classes, in the order of their ids."
        )
    return max(lengths, default=0)


def check_targets(criterion: object, targets: Tensor, classes: Sequence[int] | None) -> None:
    """Look at a batch's class ids; ``classes``, None for any, are those of the task that trains.

    Raises:
        InputError: the criterion would take them for values, or one is of no such class.
    """
    if targets.is_floating_point():
        return
    if isinstance(criterion, _ELEMENTWISE):
        raise InputError(
            f"{type(criterion).__name__} compares outputs and targets number by number, and would take class ids for "
            "values; use CrossEntropyLoss, or a function that makes vectors of the class ids first."
        )
    if classes is not None:
        ignored = [-100] if criterion is cross_entropy else [index for _, index in _ignored(criterion)]
        strangers = targets[~torch.isin(targets, torch.tensor([*classes, *ignored], device=targets.device))]
        if len(strangers):
            raise InputError(
                f"A training batch holds the class {int(strangers[0])}, but the task's classes are {list(classes)}; "
                "check its transforms, and what plugins add to batches."
            )


def widened(criterion: object, output: Tensor) -> Tensor:
    """Outputs (n, width) with log(1e-7) for further classes that ``criterion`` has weights for, whom no expert knows
    yet: torch's losses want a weight for each output."""
    lengths = [len(held[name]) for held, name in _per_class(criterion) if name == "weight"]
    missing = max([output.shape[1], *lengths]) - output.shape[1]
    return pad(output, (0, missing), value=ABSENT_LOG_PROBABILITY) if missing else output


def device_of(criterion: object, otherwise: torch.device) -> torch.device:
    """Where a criterion's weights are; ``otherwise`` where it has none."""
    kept = (value for held in _holders(criterion) for value in held.values() if isinstance(value, Tensor))
    return next((tensor.device for tensor in kept), otherwise)


def one_number(loss: object) -> Tensor:
    """``loss``, as it is.

    Raises:
        InputError: it is not one number.
    """
    if not isinstance(loss, Tensor):
        raise InputError(f"The criterion returned a {type(loss).__name__}; it must return a tensor of one number.")
    if loss.numel() != 1:
        raise InputError(f"The criterion returned {tuple(loss.shape)}; it must return one number: give it a reduction.")
    return loss


def _cut_soft(targets: Tensor, own: Tensor) -> Tensor:
    num_classes, highest = targets.shape[1], int(own[-1])
    if num_classes <= highest:
        raise InputError(
            f"A batch's soft targets are over {num_classes} classes, but the task has the class {highest}: give MixUp "
            "or CutMix the num_classes of the whole dataset."
        )
    elsewhere = targets.detach().abs().index_fill(1, own, 0).amax(0)
    if float(elsewhere.max()) > _SOFT_TOLERANCE:
        raise InputError(
            f"A batch's soft targets have mass at the class {int(elsewhere.argmax())}, but the task's classes are "
            f"{own.tolist()}; mix samples of one task only, without smoothing over all classes."
        )
    return targets[:, own]


def _ignored(criterion: object) -> list[tuple[dict[str, Any], int]]:
    return [(h, h["ignore_index"]) for h in _holders(criterion) if isinstance(h.get("ignore_index"), int)]


def _per_class(criterion: object) -> list[tuple[dict[str, Any], str]]:
    kept = [(held, name) for held in _holders(criterion) for name in _PER_CLASS]
    return [(h, n) for h, n in kept if isinstance(h.get(n), Tensor) and h[n].ndim == 1 and len(h[n]) > 1]


def _holders(criterion: object) -> Iterator[dict[str, Any]]:
    """Where a criterion, the modules in it, or a partial function keep what they hold."""
    if isinstance(criterion, partial):
        yield criterion.keywords
        yield from _holders(criterion.func)
    elif isinstance(criterion, nn.Module):
        for module in criterion.modules():
            yield from (vars(module), module._buffers, module._parameters)
    elif hasattr(criterion, "__dict__"):
        yield vars(criterion)
