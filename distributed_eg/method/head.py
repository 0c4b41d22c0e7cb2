"""The head of a network, the layer that its answers come from: found by forward passes, and made anew for a task."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from distributed_eg.errors import BackboneError, told

_SIZES = ("out_features", "out_channels", "num_classes")
"""Attributes in which layers keep how many outputs they have."""


def find_head(network: nn.Module, shape: tuple[int, int, int], named: str | None = None) -> str:
    """Dotted name of the network's head: the last layer whose place a fresh one can take, so that the network answers
    for another number of classes.

    A head is an ``nn.Linear``, an ``nn.Conv2d``, or a layer of one's own with a ``weight`` of a row a class and with
    ``reset_parameters()``, such as a cosine classifier.

    Args:
        network: gives logits (n, classes), in training mode, too; it is left as it is.
        shape: (channels, height, width) of one image.
        named: the name that the user gave, where the layer is not to be looked for.

    Raises:
        BackboneError: there is none; or the network gives no logits, or cannot take such images.
    """
    _refuse_wrapper(network)
    called: dict[str, None] = {}

    def note(name: str) -> None:
        called.pop(name, None)
        called[name] = None

    modules = dict(network.named_modules())
    handles = [
        module.register_forward_hook(lambda _module, _inputs, _output, name=name: note(name))
        for name, module in modules.items()
    ]
    try:
        with trial(network, shape) as image:
            num_classes = _num_classes(network, network(image))
    finally:
        for handle in handles:
            handle.remove()
    if named is not None and named not in modules:
        raise BackboneError(f"head={named!r} is no layer of {type(network).__name__}.")
    candidates = [name for name in reversed(called) if _is_head(modules[name])] if named is None else [named]
    for name in candidates:
        if _is_head(modules[name]) and _answers_for_others(network, modules[name], shape, num_classes):
            return name
    tried = f"tried: {', '.join(candidates[:3])}" if candidates else "it has none with a weight of a row a class"
    raise BackboneError(
        f"The backbone {type(network).__name__} has no head that can be made anew for the classes of a task ({tried}). "
        f"Its {num_classes} outputs must come from one layer, an nn.Linear, an nn.Conv2d, or one of your own with "
        "weight and reset_parameters(), and nothing that follows it may depend on their number; head= names it."
    )


def new_head(like: nn.Module, num_classes: int) -> nn.Module:
    """A copy of ``like``, hooks and settings included, with ``num_classes`` outputs and freshly drawn weights, all of
    them trainable; draws from torch's global generator."""
    head = copy.deepcopy(like)
    num_before = len(head.get_parameter("weight"))
    for name, value in head.named_parameters(recurse=False):
        if value.ndim and len(value) == num_before:
            setattr(head, name, nn.Parameter(value.new_empty(num_classes, *value.shape[1:])))
    for name in _SIZES:
        if getattr(head, name, None) == num_before:
            setattr(head, name, num_classes)
    head.reset_parameters()  # type: ignore[operator]  # as _is_head asks
    return head.requires_grad_(True)


def set_head(network: nn.Module, name: str, head: nn.Module) -> None:
    """Put ``head`` in the place of the network's head."""
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, head)


def own_draws(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside, on the CPU or on ``device``, changes nothing outside."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def trial(network: nn.Module, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """A black image for the network in eval mode; afterwards every module has the mode that it had."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            first = next(network.parameters(), torch.zeros(0))
            yield torch.zeros(1, *shape, device=first.device, dtype=input_dtype(network))
    except BackboneError:
        raise
    except Exception as error:  # of any type: it comes from a network that may be the user's own
        raise BackboneError(
            f"The backbone {type(network).__name__} cannot take images of shape {shape} ({in_a_line(error)}); give "
            "shape= as (channels, height, width) of the images after their transforms, and a network whose forward "
            "takes them alone."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def input_dtype(network: nn.Module) -> torch.dtype:
    """What the network computes in: the type of its first floating point parameter."""
    kinds = (parameter.dtype for parameter in network.parameters())
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def in_a_line(error: BaseException) -> str:
    """An error's class and the first line of its text."""
    return told(error).splitlines()[0]


def require_copies(network: nn.Module, shape: tuple[int, int, int]) -> None:
    """See that an expert can be made of a network of the user's own: copied, and trained.

    Raises:
        BackboneError: a copy cannot be made, or gives no logits in training mode.
    """
    kind = type(network).__name__
    if lazy := [name for name, parameter in network.named_parameters() if is_lazy(parameter)]:
        raise BackboneError(f"{kind} never uses the lazy layer of {lazy[0]!r}, so its shape is unknown; remove it.")
    if odd := [name for name, module in network.named_modules() if is_parametrized(module)]:
        raise BackboneError(
            f"{kind} cannot be sent to a worker: its layer {odd[0]!r} is parametrized; take that away before training "
            "(torch.nn.utils.parametrize.remove_parametrizations), or use torch.nn.utils.spectral_norm or weight_norm."
        )
    try:
        expert = copy.deepcopy(network).train()
    except Exception as error:  # of any type: a user's module may hold anything
        raise BackboneError(
            f"{kind} cannot be copied for each task's expert ({in_a_line(error)}); keep in it "
            "only what copy.deepcopy takes."
        ) from error
    images = torch.zeros(2, *shape, device=next(network.parameters()).device, dtype=input_dtype(network))
    try:
        with own_draws(images.device):
            _num_classes(network, expert(images))
    except BackboneError:
        raise
    except Exception as error:  # of any type: it comes from the user's forward
        raise BackboneError(f"{kind} fails in training mode on images alone ({in_a_line(error)}).") from error


def _refuse_wrapper(network: nn.Module) -> None:
    is_wrapper = isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel)
    if is_wrapper or isinstance(network, torch.jit.ScriptModule) or hasattr(network, "_orig_mod"):
        raise BackboneError(
            f"The backbone is a {type(network).__name__}, whose layers cannot be read and replaced; give the plain "
            "module that it was made from."
        )


def _num_classes(network: nn.Module, output: object) -> int:
    if isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point():
        return output.shape[1]
    found = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise BackboneError(
        f"The backbone {type(network).__name__} must give one tensor of logits (n, classes), not {found}; wrap it in a "
        "module whose forward gives them, in training mode, too."
    )


def _is_head(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and callable(getattr(module, "reset_parameters", None))


def _answers_for_others(network: nn.Module, head: nn.Module, shape: tuple[int, int, int], num_classes: int) -> bool:
    """Whether the network has another number of outputs with a fresh head of that many in the place of ``head``."""
    other = 3 if num_classes == 2 else 2
    with own_draws(head.get_parameter("weight").device):
        fresh = new_head(head, other).eval()
    handle = head.register_forward_hook(lambda _module, inputs, _output: fresh(*inputs))
    try:
        with trial(network, shape) as image:
            return tuple(network(image).shape) == (1, other)
    except BackboneError:  # what follows takes no other number
        return False
    finally:
        handle.remove()
