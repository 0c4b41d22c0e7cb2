"""What is asked of a task sequence beside its name. Loads nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """Checked values; ``make_benchmark`` says what they mean."""

    image_size: int
    data: str | None
    download: bool
    train_per_task: int | Sequence[int] | None
    test_per_task: int | Sequence[int] | None
    classes_per_task: int | None
    seed: int
    order_seed: int | None
