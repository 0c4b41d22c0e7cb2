"""Reading a user's dataset sample by sample, by the contract: what goes wrong is named, and never taken for ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset, default_collate

from distributed_eg.errors import InputError
from distributed_eg.runtime.worker.causes import ends_process, users_error
from distributed_eg.runtime.worker.contract import Labels, blame, conform, item_of


class Reader(Dataset[tuple[int, Any]]):
    """Gives each sample with its index; ``collate`` makes a batch of them, with the dataset's own collate function.

    ``what`` names the data in errors.
    """

    def __init__(self, dataset: Any, what: str, labels: Labels = "ids") -> None:
        self._dataset = dataset
        self._what = what
        self._labels = labels

    def __len__(self) -> int:
        """Number of samples."""
        try:
            return len(self._dataset)
        except BaseException as error:
            raise self._theirs(error, f" in the length of {type(self._dataset).__name__}") from error

    def __getitem__(self, index: int) -> tuple[int, Any]:
        """A sample and its index.

        Raises:
            HookError: the dataset, or one of its transforms, raised.
        """
        try:
            return index, self._dataset[index]
        except BaseException as error:
            raise self._theirs(error, f" in {item_of(self._dataset, index)}") from error

    def collate(self, rows: Sequence[tuple[int, Any]]) -> list[Any]:
        """A batch: (images, class ids, …).

        Raises:
            InputError: the samples, or what the collate function makes of them, are no images and class ids.
            HookError: the collate function raised though the samples are well.
        """
        first = rows[0][0]
        try:
            batch = (getattr(self._dataset, "collate_fn", None) or default_collate)([item for _, item in rows])
        except BaseException as error:
            if isinstance(error, Exception) and (fault := self._blame(rows)):
                raise InputError(f"The data of {self._what} cannot be used. {fault[0].upper()}{fault[1:]}.") from error
            raise self._theirs(error, f" in the collate function, from {item_of(self._dataset, first)} on") from error
        # Torch makes a batch of images of several types without a word.
        fault = self._blame(rows) if len({_type_of(item) for _, item in rows}) > 1 else None
        try:
            batch = conform(batch, self._labels)
            if len(batch[0]) != len(rows):
                raise InputError(f"it has {len(batch[0])} images of {len(rows)} samples")
        except InputError as error:
            fault = self._blame(rows) or f"the batch that is collated from {item_of(self._dataset, first)} on: {error}"
        if fault is not None:
            raise InputError(f"The data of {self._what} cannot be used. {fault[0].upper()}{fault[1:]}.")
        return list(batch)

    def _blame(self, rows: Sequence[tuple[int, Any]]) -> str | None:
        return blame([(item_of(self._dataset, index), item) for index, item in rows], self._labels)

    def _theirs(self, error: BaseException, place: str) -> BaseException:
        return error if ends_process(error) else users_error(error, f"Reading the data of {self._what}", place=place)


def _type_of(item: object) -> object:
    return getattr(item[0], "dtype", None) if isinstance(item, list | tuple) and item else None
