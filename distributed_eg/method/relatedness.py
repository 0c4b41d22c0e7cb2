"""Relatedness between tasks, and where a new expert starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distributed_eg.errors import DivergedError
from distributed_eg.types import RelatednessUnit, TaskId, TransferChoice


@dataclass(frozen=True)
class TaskErrors:
    """Errors on one task's validation features, each a mean over samples.

    ``own`` is the task's own autoencoder's, ``variance`` the mean squared distance of the features to their mean,
    ``candidates`` those of earlier autoencoders by task, None standing for the pretrained root.
    """

    own: float
    variance: float
    candidates: Mapping[TaskId | None, float]


def relatedness(
    errors: Sequence[float] | np.ndarray, own_error: float, variance: float, unit: RelatednessUnit
) -> np.ndarray:
    """Rel = 1 − (Er_a − Er_k) / Er_k (equation 3 of the paper), or with the task's variance below the line, of each
    candidate's error.

    Both units keep the order of the candidates, hence the parent; only the scale that ``rel_thresh`` is read on
    differs. A task without any variation (below the line 0) is related to a candidate only if that errs no more.
    """
    below = own_error if unit == "own_error" else variance
    values = np.asarray(errors, dtype=float)
    return np.where(values <= own_error, 1.0, -math.inf) if below <= 0 else 1 - (values - own_error) / below


def choose_transfer(task: TaskId, errors: TaskErrors, unit: RelatednessUnit, rel_thresh: float) -> TransferChoice:
    """Where the expert of ``task`` starts: from the most related candidate, the earlier one where two tie.

    Above ``rel_thresh`` the expert learns without forgetting from it, else it is fine-tuned (section 3.3 of the
    paper). Without a candidate the expert starts from the pretrained root.

    Raises:
        DivergedError: an error is not finite.
    """
    for candidate, error in [(task, errors.own), *errors.candidates.items()]:
        if not math.isfinite(error):
            raise DivergedError(
                f"The autoencoder of {'the root' if candidate is None else f'task {candidate}'} has error {error} on "
                f"the validation features of task {task}; look for extreme values in the images of either."
            )
    # The root precedes every task.
    candidates = sorted(errors.candidates, key=lambda candidate: -1 if candidate is None else candidate)
    of_each = relatedness([errors.candidates[c] for c in candidates], errors.own, errors.variance, unit)
    if not candidates:
        return TransferChoice(None, "fresh")
    best = int(of_each.argmax())  # the first of equals
    return TransferChoice(candidates[best], "lwf" if of_each[best] > rel_thresh else "finetune")
