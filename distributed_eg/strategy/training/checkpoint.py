"""Checkpoints of an expert's training, at the ends of epochs: a stage that is tried again ends with the same bytes."""

from __future__ import annotations

import functools
import logging
import time

from distributed_eg.errors import StorageError
from distributed_eg.runtime.messages import ExpertJob
from distributed_eg.store.checkpoints import Checkpoint, CheckpointSlot, decode, encode
from distributed_eg.strategy.avalanche_types import Template
from distributed_eg.strategy.training.recording import RecordingLogger
from distributed_eg.strategy.training.state import CannotResumeError, TrainingState

logger = logging.getLogger(__name__)

_SHARE = 50
"""Checkpoints take a fiftieth of the time at most: after one, training goes on this many times as long as it took."""


class Checkpointing:
    """One stage's checkpoints: the strategy's loop over the epochs asks where to begin, and tells the end of each."""

    def __init__(self, slot: CheckpointSlot, job: ExpertJob, strategy: Template, recorder: RecordingLogger) -> None:
        self._slot = slot
        self._job = job
        self._strategy = strategy
        self._recorder = recorder
        self._state: TrainingState | None = None
        self._num_epochs = 0
        self._due_s = 0.0
        self.resumed_after = 0
        """Epochs that the checkpoint had from which this stage went on; 0: it began at its beginning."""
        self.num_written = 0

    def begin(self) -> int:
        """Put everything back as the stage's checkpoint has it, where there is one: the number of epochs done.

        Raises:
            StorageError: the run directory does not answer, or the checkpoint does not fit; then it is deleted, so that
                a retried stage starts anew.
        """
        started_s = time.monotonic()
        if self._num_epochs:  # a loop of the user's own comes here twice: a number of epochs says too little then
            self._state = None
            return 0
        self._num_epochs = self._strategy.train_epochs
        if self._num_epochs < 2:
            return 0
        try:
            self._state = TrainingState(self._job, self._strategy, self._recorder.records)
        except Exception as error:  # it may come from a user's object
            self._give_up(error)
            return 0
        checkpoint = self._slot.load()
        epochs = 0 if checkpoint is None else self._resume(self._state, checkpoint)
        self._wait(started_s)
        return epochs

    def epoch_ended(self, epochs: int) -> None:
        """Write a checkpoint after ``epochs`` epochs, if it is time; one that cannot be written stops no training."""
        started_s = time.monotonic()
        if self._state is None or epochs >= self._num_epochs or started_s < self._due_s:
            return
        try:
            values, tensors = encode(self._state.take())
            self._slot.save(Checkpoint(self._slot.key, epochs, values, tensors))
            self.num_written += 1
        except StorageError as error:
            logger.warning("The checkpoint of task %d after epoch %d is left out: %s", self._job.task, epochs, error)
        except Exception as error:  # it may come from a user's state_dict, or from one that is no plain values
            self._give_up(error)
        self._wait(started_s)

    def _give_up(self, error: Exception) -> None:
        self._state = None
        _warn_once(str(error) if isinstance(error, CannotResumeError) else f"{type(error).__name__}: {error}")

    def _wait(self, started_s: float) -> None:
        """Set when the next checkpoint is due, after work on checkpoints that began at ``started_s``."""
        now_s, every_s = time.monotonic(), self._job.checkpoint_every_s
        self._due_s = now_s + max(every_s, _SHARE * (now_s - started_s)) if every_s else now_s

    def _resume(self, mine: TrainingState, checkpoint: Checkpoint) -> int:
        task, label = self._job.task, self._job.label
        try:
            state = decode(checkpoint.values, checkpoint.tensors, self._job.device)
            if state["consists of"] != mine.consists_of:
                logger.warning(
                    "The checkpoint of task %d (label %d) is of another kind (other plugins, metrics or evaluation "
                    "streams, or another version of this package): its expert is trained from the beginning.",
                    task,
                    label,
                )
                return 0
            mine.put_back(state)
        except Exception as error:  # it may come from a user's load_state_dict, or from a state that does not fit
            self._slot.delete()
            raise StorageError(
                f"The checkpoint of task {task} (label {label}) after {checkpoint.epochs} epochs could not be put back "
                f"({type(error).__name__}: {error}). It was deleted: tried again, the expert is trained from the "
                "beginning."
            ) from error
        self.resumed_after = checkpoint.epochs
        logger.info("The expert of task %d (label %d) goes on after %d epochs.", task, label, checkpoint.epochs)
        return checkpoint.epochs


@functools.cache
def _warn_once(reason: str) -> None:
    """Tell it once a process, for every task of the run has the same plugins."""
    logger.warning("Experts that are tried again start from their beginning, not from a checkpoint: %s.", reason)
