"""What images go through, kept as data: the same pixels as torchvision's own, and no guess at what it does not know."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import EfficientNet_B0_Weights, ResNet18_Weights, ViT_B_16_Weights
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import transforms as v1

from distributed_eg.errors import InputError
from distributed_eg.method.image_transform import ImageReader, given_transform
from distributed_eg.store.decoding import decode
from distributed_eg.types import ImageTransform

NORMALIZE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KNOWN: list[tuple[Any, tuple[int, int, int]]] = [
    (v1.Compose([v1.Resize((24, 20)), v1.ToTensor(), v1.Normalize(*NORMALIZE)]), (3, 24, 20)),
    (v1.Compose([v1.Resize(30, InterpolationMode.BICUBIC), v1.CenterCrop(24), v1.ToTensor()]), (3, 24, 24)),
    (v1.Compose([v1.Grayscale(3), v1.Resize((9, 9), antialias=True), v1.ToTensor()]), (3, 9, 9)),
    (v1.Compose([v1.PILToTensor(), v1.Resize((9, 9)), v1.ConvertImageDtype(torch.float32)]), (3, 9, 9)),
    (v2.Compose([v2.ToImage(), v2.Resize((9, 9)), v2.ToDtype(torch.float32, scale=True)]), (3, 9, 9)),
    (v2.Compose([v2.ToImage(), v2.CenterCrop(9), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]), (3, 9, 9)),
    (v2.Compose([v2.Resize(9), v2.CenterCrop(9), v2.RGB(), v1.Compose([v1.ToTensor()])]), (3, 9, 9)),
    ([v2.PILToTensor(), v2.Resize((9, 9)), v2.ConvertImageDtype(torch.float32), v2.Normalize(*NORMALIZE)], (3, 9, 9)),
    (v1.Compose([v1.ToTensor(), nn.Sequential(v1.Resize((9, 9)), nn.Identity())]), (3, 9, 9)),
    (ResNet18_Weights.IMAGENET1K_V1.transforms(), (3, 224, 224)),
    (EfficientNet_B0_Weights.IMAGENET1K_V1.transforms(), (3, 224, 224)),
    (ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms(), (3, 384, 384)),
    (v1.Compose([v1.Resize((9, 9)), v1.ToTensor(), v1.Normalize((0.5,), (0.5,))]), (3, 9, 9)),
    (v1.Compose([v1.Grayscale(), v1.Resize((9, 9)), v1.ToTensor(), v1.Normalize((0.5,), (0.5,))]), (1, 9, 9)),
    (v1.ToTensor(), (3, 40, 50)),
]


def photograph(mode: str = "RGB") -> Image.Image:
    """An image of 50 × 40 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(("transform", "shape"), KNOWN, ids=range(len(KNOWN)))
def test_the_pixels_are_those_of_the_transform_itself(
    transform: Any, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    kept = given_transform(transform, shape)
    again = decode(ImageTransform, json.loads(json.dumps(asdict(kept))), "it")  # type: ignore[arg-type]
    assert again == kept
    expected = photograph()
    for part in transform if isinstance(transform, list) else [transform]:
        expected = part(expected)
    assert torch.equal(ImageReader(again, shape)(photograph()), torch.as_tensor(expected))
    photograph().save(tmp_path / "a.png")
    assert torch.equal(ImageReader(again, shape).open(tmp_path / "a.png"), torch.as_tensor(expected))


def test_grey_images_where_the_network_takes_one_channel() -> None:
    kept = given_transform(v1.Compose([v1.Resize((9, 9)), v1.ToTensor()]), (1, 9, 9))
    assert kept is not None
    assert kept.mode == "L"
    expected = v1.ToTensor()(v1.Resize((9, 9))(photograph("L")))
    assert torch.equal(ImageReader(kept, (1, 9, 9))(photograph()), expected)


class Flip(v1.Resize):
    """One that a user derived."""


@pytest.mark.parametrize(
    ("transform", "word"),
    [
        (v1.Compose([v1.RandomHorizontalFlip(), v1.ToTensor()]), "RandomHorizontalFlip"),
        (v1.Lambda(lambda image: image), "Lambda"),
        ([Flip((9, 9)), v1.ToTensor()], "Flip"),
        (v1.Compose([lambda image: image, v1.ToTensor()]), "<lambda>"),
        (v2.ToDtype({torch.Tensor: torch.float32}, scale=True), "made with"),
    ],
)
def test_what_cannot_be_kept_as_data_is_refused_by_name(transform: Any, word: str) -> None:
    with pytest.raises(InputError, match="cannot be kept as data") as caught:
        given_transform(transform, (3, 9, 9))
    assert word in str(caught.value)


@pytest.mark.parametrize("transform", [3, "resize", {"size": 9}])
def test_what_is_no_transform_is_refused(transform: object) -> None:
    with pytest.raises(InputError, match="transform"):
        given_transform(transform, (3, 9, 9))


def test_what_does_not_give_the_networks_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(3, 9, 9\) of torch.float32, where the model takes \(3, 8, 8\)|takes"):
        given_transform([v1.Resize((9, 9)), v1.ToTensor()], (3, 8, 8))
    with pytest.raises(InputError, match="it is Image after its transform"):
        given_transform(v1.Resize((9, 9)), (3, 9, 9))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_pixels_are_not_cut_to_bytes_in_silence(mode: str, tmp_path: Path) -> None:
    array = np.full((40, 50), 300, dtype={"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    Image.fromarray(array).save(tmp_path / "a.tiff")
    kept = given_transform([v1.Resize((9, 9)), v1.ToTensor()], (3, 9, 9))
    assert kept is not None
    with pytest.raises(InputError, match="cannot be taken as an image: its pixels are deeper than a byte"):
        ImageReader(kept, (3, 9, 9)).open(tmp_path / "a.tiff")


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    reader = ImageReader(given_transform([v1.Resize((9, 9)), v1.ToTensor()], (3, 9, 9)), (3, 9, 9))  # type: ignore[arg-type]
    photograph().save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name, data in {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2], "head": whole[:40]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name} cannot be taken as an image"):
            reader.open(tmp_path / name)
    for gone in (tmp_path / "gone", tmp_path):
        with pytest.raises(InputError, match="cannot be taken as an image"):
            reader.open(gone)


def test_a_transform_of_another_torchvision_is_told() -> None:
    kept = decode(ImageTransform, {"mode": "RGB", "steps": [{"name": "Unheard", "values": {}}]}, "it")
    with pytest.raises(InputError, match=r"Unheard.*give transform="):
        ImageReader(kept, (3, 9, 9))
