"""The contract between users' datasets and all that reads them: what a batch must hold, what is cast, what is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from distributed_eg.errors import InputError

Labels: TypeAlias = Literal["ids", "soft", "any"]
"""What targets may be: class ids; in training also soft targets (n, classes), as MixUp and CutMix make them; of a
reference dataset anything, for nobody reads them."""


def conform(batch: object, labels: Labels = "ids") -> list[Any]:
    """A batch as every stage takes it: float32 images, int64 class ids (n,), and whatever follows them, untouched.

    Images of another floating type are cast, and so are class ids of any integer type, as whole floats, or of shape
    (n, 1). Integer images are refused: 0…255 mean a forgotten ToTensor, which divides by 255, more often than not.

    Raises:
        InputError: the batch holds something else; the message says what.
    """
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        raise InputError(f"it is {_described(batch)}; it must be (images, class ids, …)")
    images, targets, *rest = batch
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise InputError(_image_fault(images))
    if labels != "any":
        targets = conform_targets(targets, soft=labels == "soft")
    if isinstance(targets, Tensor) and len(images) != len(targets):
        raise InputError(f"it has {len(images)} images, but {len(targets)} labels")
    return [images.to(torch.float32), targets, *rest]


def conform_targets(targets: object, *, soft: bool) -> Tensor:
    """Int64 class ids (n,), or where ``soft`` allows them float32 targets (n, classes).

    Raises:
        InputError: ``targets`` are something else.
    """
    if soft and isinstance(targets, Tensor) and targets.is_floating_point() and _is_wide(targets):
        return targets.to(torch.float32)
    return _class_ids(targets)


def item_fault(item: object, labels: Labels = "ids") -> str | None:
    """What keeps one sample of a dataset from being (image, class id, …); None: nothing."""
    if not isinstance(item, list | tuple) or len(item) < 2:
        return f"it is {_described(item)}; it must be (image, class id, …)"
    image, label = (_as_tensor(value) for value in item[:2])
    if not isinstance(image, Tensor) or not image.is_floating_point():
        return _image_fault(image)
    if image.ndim != 3:
        return f"its image has the shape {tuple(image.shape)}; it must be (channels, height, width)"
    try:
        if labels == "ids":
            _class_ids(label[None] if isinstance(label, Tensor) else label)
    except InputError as error:
        return str(error)
    return None


def blame(items: Sequence[tuple[str, Any]], labels: Labels = "ids") -> str | None:
    """Which of a batch's named samples is at fault, and why; None: none that can be told."""
    for name, item in items:
        if (fault := item_fault(item, labels)) is not None:
            return f"{name}: {fault}"
    for name, item in items:
        if item[0].shape != items[0][1][0].shape:
            first, shape = items[0][0], tuple(items[0][1][0].shape)
            return f"{name}: its image has the shape {tuple(item[0].shape)}, that of {first} {shape}; resize them alike"
    return None


def item_of(dataset: Any, index: int) -> str:
    """A sample's name, by the class and the row of the dataset behind all views: "item 17 of ImageFolder"."""
    with suppress(Exception):  # a view may lack that row
        dataset, index = _behind(dataset, index)
    return f"item {index} of {type(dataset).__name__}"


def _behind(dataset: Any, index: int) -> tuple[Any, int]:
    if isinstance(dataset, Subset):
        return _behind(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        which = int(np.searchsorted(dataset.cumulative_sizes, index, side="right"))
        return _behind(dataset.datasets[which], index - [0, *dataset.cumulative_sizes][which])
    if hasattr(dataset, "_flat_data"):  # Avalanche's
        return _behind(dataset._flat_data, index)
    if hasattr(dataset, "_get_idx") and getattr(dataset, "_datasets", None):
        which, row = dataset._get_idx(index)
        return _behind(dataset._datasets[which], int(row))
    return dataset, index


def _image_fault(image: object) -> str:
    if not isinstance(image, Tensor):
        return (
            f"its image is {_described(image)}; it must be a float tensor: the dataset's own transforms must end in "
            "one (ToTensor), for what a plugin or an overridden method adds comes too late for the gate"
        )
    return (
        f"its image is {image.dtype}; it must be floating: add ToTensor or ToDtype(torch.float32, scale=True), or cast "
        "it where the numbers are meant as they are"
    )


def _class_ids(targets: object) -> Tensor:
    if not isinstance(targets, Tensor) or targets.is_complex():
        raise InputError(f"its label is {_described(targets)}; it must be a class id, a whole number from 0")
    if targets.ndim == 0 or _is_wide(targets):
        soft = "; soft targets (MixUp, CutMix) are for training only: mix in a plugin's before_training_iteration"
        raise InputError(
            f"its label has the shape {tuple(targets.shape[1:])}; it must be one class id"
            f"{soft if targets.is_floating_point() else ''}"
        )
    ids = targets.reshape(len(targets))
    whole = ids.to(torch.int64)
    if not torch.equal(whole.to(ids.dtype), ids):
        raise InputError(f"its label is {ids[whole.to(ids.dtype) != ids][0].item()}; it must be a whole number")
    return whole


def _is_wide(targets: Tensor) -> bool:
    return targets.ndim > 1 and targets.numel() != len(targets)


def _as_tensor(value: Any) -> Any:
    """A number or an array as torch's own collate function takes it; anything else as it is."""
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind not in "biuf":
        return value
    return torch.as_tensor(value) if isinstance(value, int | float | np.generic | np.ndarray) else value


def _described(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}"
    if isinstance(value, str | bytes):
        return f"the {type(value).__name__} {value!r:.40}"
    return f"a {type(value).__name__}{f' of {len(value)}' if isinstance(value, list | tuple) else ''}"


def require_shape(found: tuple[int, ...], wanted: tuple[int, ...], what: str, *, is_trained: bool = False) -> None:
    """Refuse images of another shape than the backbone was built for; ``what`` names them, ``is_trained`` says that it
    is too late for another model.

    Raises:
        InputError: they have it.
    """
    if found != wanted:
        needs = ["resizes them"] if found[1:] != wanted[1:] else []
        needs = [f"gives them {wanted[0]} channels", *needs] if found[:1] != wanted[:1] else needs
        raise InputError(
            f"The images of {what} have shape {found}, but the model was built for shape={wanted}; add a transform "
            f"that {' and '.join(needs)}{'' if is_trained else ', or build ExpertGate(shape=…) for them'}."
        )
