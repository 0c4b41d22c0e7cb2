"""What users do with the run behind a strategy, beside training and evaluating it: look at it, and close it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import pyarrow as pa

from distributed_eg import given
from distributed_eg.config import MethodConfig
from distributed_eg.method.image_transform import given_transform
from distributed_eg.runtime.signals import terminable
from distributed_eg.schedule.events import WorkerJoined
from distributed_eg.strategy.answers import ask_about_files
from distributed_eg.strategy.driver import Driver
from distributed_eg.strategy.predictions import Prediction, notes_of, reader_for
from distributed_eg.strategy.training.expert_loop import ExpertLoop
from distributed_eg.strategy.training.packing import lasting_state


class RunHolder(ExpertLoop):
    """The part of a strategy that is about its run."""

    _driver: Driver
    method: MethodConfig

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, deepcopy and Avalanche's checkpoints: a reference to the run, by its run directory, that goes on
        with it as ``resume="append"`` does. Without a ``storage`` the model holds its experts, and can predict when the
        run's temporary folder is gone, but nothing can be trained then."""
        state = lasting_state(self)
        driver: Driver | None = state.get("_driver")  # none on a worker
        if driver is not None and driver.run is not None and driver.cluster.storage is not None:
            state["model"] = self.model.without_answers()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "_driver" in state:
            self._driver.attach_to(self.model)

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
        return self._driver.run_dir

    def workers(self) -> list[WorkerJoined]:
        """Name and node of each worker that is up; none before the first ``train``."""
        return [] if self._driver.run is None else self._driver.run.workers()

    def predict(
        self, files: Sequence[str | os.PathLike[str]], *, transform: object = None, batch_size: int = 32
    ) -> list[Prediction | None]:
        """What each of many image files shows, on the workers, which see these files; None for those that cannot be
        read. ``strategy.model.predict`` is the same in this process, for tensors and images of Pillow's, too.

        Args:
            files: their paths, as workers see them.
            transform: as in ``model.predict``.
            batch_size: images a batch.

        Raises:
            InputError: a value cannot be used, or what images go through must be said.
            StorageError: the run holds no finished task.
        """
        driver = self._driver
        paths = [os.path.abspath(given.path(file, "a file")) for file in files]
        batch_size, shape = given.whole(batch_size, "batch_size", least=1), self.model.shape
        run = driver.open_to_answer()
        reader = reader_for(notes_of(driver.registry), given_transform(transform, shape), shape)
        if not paths:
            return []
        with terminable(), run.working():
            return list(ask_about_files(run, driver.registry, paths, reader, batch_size, self.method))

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
