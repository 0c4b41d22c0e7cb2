"""What an image goes through before the network: torchvision's transforms to data and back, and images through them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import transforms as v1
from torchvision.transforms._presets import ImageClassification

from distributed_eg.errors import InputError
from distributed_eg.types import ImageTransform, TransformStep

Transform: TypeAlias = Callable[[Any], Any]

_MODES = ("RGB", "L", "RGBA", "CMYK")
"""Of the images that networks are given; others are palettes, bits, or deeper than a byte."""

_FIELDS: dict[type, tuple[str, ...]] = {
    v1.Resize: ("size", "interpolation", "max_size", "antialias"),
    v1.CenterCrop: ("size",),
    v1.Grayscale: ("num_output_channels",),
    v1.ToTensor: (),
    v1.PILToTensor: (),
    v1.ConvertImageDtype: ("dtype",),
    v1.Normalize: ("mean", "std"),
    v2.Resize: ("size", "interpolation", "max_size", "antialias"),
    v2.CenterCrop: ("size",),
    v2.Grayscale: ("num_output_channels",),
    v2.RGB: (),
    v2.ToImage: (),
    v2.ToTensor: (),
    v2.ToPureTensor: (),
    v2.PILToTensor: (),
    v2.ToDtype: ("dtype", "scale"),
    v2.ConvertImageDtype: ("dtype",),
    v2.Normalize: ("mean", "std"),
}
"""The transforms that always give the same, and what they were made with."""


def _name(kind: type) -> str:
    return f"v2.{kind.__name__}" if kind.__module__.startswith(v2.__name__) else kind.__name__


_KINDS = {_name(kind): kind for kind in _FIELDS}


def transform_as_data(transform: object, mode: str) -> ImageTransform:
    """One of torchvision's transforms, a composition of them, a preset, or a list, as data.

    Raises:
        InputError: something in it is another one, or draws.
    """
    if mode not in _MODES:
        raise InputError(f"images of the mode {mode!r}")
    return ImageTransform(mode, tuple(_step(part) for part in _flat(transform)))


class ImageReader:
    """Makes images what the network takes: (channels, height, width), float32.

    Raises:
        InputError: the torchvision that is installed does not know the transform.
    """

    def __init__(self, transform: ImageTransform, shape: tuple[int, int, int]) -> None:
        self._mode, self.shape = transform.mode, shape
        self._steps = [_built(step) for step in transform.steps]

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """An image, Pillow's or (channels, height, width) of bytes.

        Raises:
            InputError: it cannot be made what the network takes.
        """
        value: Any = self._converted(image) if isinstance(image, Image.Image) else image
        try:
            for step in self._steps:
                value = step(value)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise InputError(f"its transform fails: {type(error).__name__}: {error}") from error
        if not isinstance(value, Tensor) or tuple(value.shape) != self.shape or value.dtype != torch.float32:
            what = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"it is {what} after its transform, where the model takes {self.shape} of torch.float32")
        return value.as_subclass(Tensor)

    def open(self, path: str | os.PathLike[str]) -> Tensor:
        """The image in a file.

        Raises:
            InputError: it cannot be read, or not be made what the network takes.
        """
        try:
            with Image.open(path) as image:
                return self(image)
        except InputError as error:
            reason = str(error)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{os.fspath(path)} cannot be taken as an image: {reason}")

    def _converted(self, image: Image.Image) -> Image.Image:
        if is_deep(image):
            raise InputError(f"its pixels are deeper than a byte (mode {image.mode}): convert it to {self._mode} first")
        try:
            return image.convert(self._mode)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's SyntaxError: a broken PNG
            raise InputError(f"{type(error).__name__}: {error}") from error


def given_transform(value: object, shape: tuple[int, int, int]) -> ImageTransform | None:
    """A transform that a user gave, as data, for colour images or, where these do not come out in ``shape``, for grey
    ones; None stays None.

    Raises:
        InputError: it cannot be kept as data, or does not give images of that shape.
    """
    if value is None:
        return None
    try:
        found = [transform_as_data(value, mode) for mode in ("RGB", "L")]
    except InputError as error:
        raise InputError(
            f"transform holds {error}, which cannot be kept as data; what can are torchvision's "
            f"{', '.join(sorted({kind.__name__ for kind in _FIELDS}))}, compositions of them, and its weights' presets."
        ) from error
    problems = []
    for transform in found:
        try:
            ImageReader(transform, shape)(Image.new(transform.mode, (shape[2], shape[1])))
        except InputError as error:
            problems.append(str(error))
        else:
            return transform
    raise InputError(f"transform does not give what the model takes; of a colour image: {problems[0]}.")


def is_deep(image: Image.Image) -> bool:
    """Whether an image has pixels deeper than a byte; of colours that is seen before it is read only, for Pillow then
    leaves the lower bits out."""
    return image.mode.startswith(("I", "F")) or ";16" in str(getattr(image, "tile", ""))


def mode_of(image: object) -> str:
    """The mode of a raw image, Pillow's or bytes (channels, height, width).

    Raises:
        InputError: it is none.
    """
    if isinstance(image, Image.Image):
        return image.mode
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) in (1, 3):
        return "L" if len(image) == 1 else "RGB"
    raise InputError(f"images that are {type(image).__name__} before it")


def _flat(transform: object) -> Iterator[object]:
    """The transforms in a composition, in their order; None is none."""
    if isinstance(transform, v1.Compose | v2.Compose):
        parts: Iterable[object] = transform.transforms
    elif isinstance(transform, nn.Sequential | list | tuple):
        parts = transform
    elif type(transform) is ImageClassification:
        parts = [
            v1.Resize(transform.resize_size, transform.interpolation, antialias=transform.antialias),
            v1.CenterCrop(transform.crop_size),
            v1.PILToTensor(),
            v1.ConvertImageDtype(torch.float),
            v1.Normalize(transform.mean, transform.std),
        ]
    else:
        if transform is not None and type(transform) not in (nn.Identity, v2.Identity):
            yield transform
        return
    for part in parts:
        yield from _flat(part)


def _step(transform: object) -> TransformStep:
    kind = type(transform)
    if kind not in _FIELDS:
        raise InputError(f"a {getattr(transform, '__name__', kind.__name__)}")
    return TransformStep(_name(kind), {name: _kept(getattr(transform, name)) for name in _FIELDS[kind]})


def _built(step: TransformStep) -> Transform:
    try:
        built: Transform = _KINDS[step.name](**{name: _loaded(name, value) for name, value in step.values.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"The transform {step.name} with {step.values} cannot be made here ({error}): give transform=."
        ) from error
    return built


def _kept(value: object) -> object:
    if isinstance(value, InterpolationMode):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_kept(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"a transform made with {value!r:.60}")


def _loaded(name: str, value: Any) -> Any:
    if name == "interpolation":
        return InterpolationMode(value)
    return getattr(torch, value) if name == "dtype" else value
