"""What users do with the run behind a strategy, beside training and evaluating it: look at it, and close it."""

from __future__ import annotations

import os
from typing import Self

import pyarrow as pa

from distributed_eg import given
from distributed_eg.schedule.events import WorkerJoined
from distributed_eg.strategy.driver import Driver
from distributed_eg.strategy.training.expert_loop import ExpertLoop


class RunHolder(ExpertLoop):
    """The part of a strategy that is about its run."""

    _driver: Driver

    @property
    def registry(self) -> pa.Table:
        """One row a task: task, label, parent (null: the root), transfer, num_classes, hashes, train_s, worker."""
        return self._driver.tables()[0]

    @property
    def relatedness(self) -> pa.Table:
        """One row a task and candidate (null: the root): errors, unit, relatedness, which was chosen, and how."""
        return self._driver.tables()[1]

    @property
    def run_dir(self) -> str | None:
        """The run directory's path or URI, to open the run by, and so with whatever secrets the URI holds: mind where
        you print it. None before the first ``train``."""
        return None if self._driver.run is None else self._driver.run.storage.uri

    def workers(self) -> list[WorkerJoined]:
        """Name and node of each worker that is up; none before the first ``train``."""
        return [] if self._driver.run is None else self._driver.run.workers()

    def retire(self, label: int) -> None:
        """Have the gate do without the task with that label, from now on and for tasks to come; twice is once.

        Its files are kept until ``distributed-eg gc`` removes them, and experts that came from its own keep all that
        they have.

        Raises:
            InputError: no finished task has the label.
            StorageError: the run holds no finished task, or cannot be written.
        """
        self._driver.change(lambda life: life.retire(self._driver.task_of(label)))

    def restore(self, label: int) -> None:
        """Undo ``retire``; twice is once.

        Raises:
            InputError: no finished task has the label, or its weights are gone.
            StorageError: the run holds no finished task, or cannot be written.
        """
        self._driver.change(lambda life: life.restore(self._driver.task_of(label)))

    def save_reference(self, path: str | os.PathLike[str]) -> None:
        """Write this run's statistics, and the root's autoencoder where it has one, for another run's ``reference``.

        Raises:
            InputError: ``path`` is none, or nothing is trained yet.
        """
        self._driver.save_reference(given.path(path, "path"))

    def close(self) -> None:
        """End the workers, and Ray where it was started here and no other strategy of this process uses it. The model
        keeps its gate and its experts."""
        self._driver.close()

    def __enter__(self) -> Self:
        """The strategy itself."""
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Close it."""
        self._driver.close(in_error=error_type is not None)
