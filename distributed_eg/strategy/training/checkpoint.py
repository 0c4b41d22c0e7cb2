"""Checkpoints of an expert's training, at the ends of epochs: a stage that is tried again ends with the same bytes."""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING, Any

from distributed_eg.errors import StorageError
from distributed_eg.runtime.messages import ExpertJob
from distributed_eg.store.checkpoints import Checkpoint, CheckpointSlot, decode, encode
from distributed_eg.strategy.training import state as state_of
from distributed_eg.strategy.training.changes import Beginning, CannotResumeError
from distributed_eg.strategy.training.recording import RecordingLogger

if TYPE_CHECKING:
    from distributed_eg.strategy.strategy import ExpertGateStrategy

logger = logging.getLogger(__name__)

_SHARE = 50
"""Checkpoints take a fiftieth of the time at most: after one, training goes on this many times as long as it took."""


class Checkpointing:
    """One stage's checkpoints: the strategy's loop over the epochs asks where to begin, and tells the end of each."""

    def __init__(
        self, slot: CheckpointSlot, job: ExpertJob, strategy: ExpertGateStrategy, recorder: RecordingLogger
    ) -> None:
        self._slot = slot
        self._job = job
        self._strategy = strategy
        self._recorder = recorder
        self._beginning: Beginning | None = None
        self._num_epochs = 0
        self._due_s = 0.0
        self.resumed_after = 0
        """Epochs that the checkpoint had from which this stage went on; 0: it began at its beginning."""

    def begin(self) -> int:
        """Put everything back as the stage's checkpoint has it, where there is one: the number of epochs done.

        Raises:
            StorageError: the run directory does not answer, or the checkpoint does not fit; then it is deleted, so that
                a retried stage starts anew.
        """
        started_s = time.monotonic()
        if self._num_epochs:  # a loop of the user's own comes here twice: a number of epochs says too little then
            self._beginning = None
            return 0
        self._num_epochs = self._strategy.train_epochs
        if self._num_epochs < 2:
            return 0
        try:
            self._beginning = Beginning(self._job, self._strategy)
        except Exception as error:  # it may come from a user's state_dict
            _warn_once(f"{type(error).__name__}: {error}")
            return 0
        checkpoint = self._slot.load()
        epochs = 0 if checkpoint is None else self._resume(self._beginning, checkpoint)
        self._wait(started_s)
        return epochs

    def epoch_ended(self, epochs: int) -> None:
        """Write a checkpoint after ``epochs`` epochs, if it is time; one that cannot be written stops no training."""
        started_s = time.monotonic()
        if self._beginning is None or epochs >= self._num_epochs or started_s < self._due_s:
            return
        try:
            values, tensors = encode(self._state(self._beginning))
            self._slot.save(Checkpoint(self._slot.key, epochs, values, tensors))
        except StorageError as error:
            logger.warning("The checkpoint of task %d after epoch %d is left out: %s", self._job.task, epochs, error)
        except (CannotResumeError, TypeError) as reason:
            self._beginning = None
            _warn_once(str(reason))
        except Exception as error:  # it may come from a user's state_dict
            self._beginning = None
            _warn_once(f"{type(error).__name__}: {error}")
        self._wait(started_s)

    def _wait(self, started_s: float) -> None:
        """Set when the next checkpoint is due, after work on checkpoints that began at ``started_s``."""
        now_s, every_s = time.monotonic(), self._job.checkpoint_every_s
        self._due_s = now_s + max(every_s, _SHARE * (now_s - started_s)) if every_s else now_s

    def _resume(self, beginning: Beginning, checkpoint: Checkpoint) -> int:
        task, label = self._job.task, self._job.label
        try:
            state = decode(checkpoint.values, checkpoint.tensors)
            if state["consists of"] != self._consists_of(beginning):
                logger.warning(
                    "The checkpoint of task %d (label %d) is of other plugins, metrics, layers or evaluation streams: "
                    "its expert is trained from the beginning.",
                    task,
                    label,
                )
                return 0
            self._put_back(beginning, state)
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

    def _state(self, beginning: Beginning) -> dict[str, Any]:
        optimizer = self._strategy.optimizer
        state_of.require_exact(optimizer)
        return {
            "consists of": self._consists_of(beginning),
            "attributes": beginning.changes(),
            "networks": {name: state_of.network_state(net) for name, net in beginning.networks.items()},
            "optimizer": optimizer.state_dict(),
            "records": state_of.pack_records(self._recorder.records),
            "last metrics": list(self._strategy.evaluator.last_metric_results),
            "random": state_of.random_state(self._job.device),
        }

    def _consists_of(self, beginning: Beginning) -> list[str]:
        """What tells whether a state belongs to this strategy; its settings and data are in the checkpoint's key."""
        metrics = [type(metric).__qualname__ for metric in self._strategy.evaluator.metrics]
        streams = [f"{info.stream} {info.index}" for info, _ in self._job.data.evaluations]
        return [*beginning.names, *metrics, *streams]

    def _put_back(self, beginning: Beginning, state: dict[str, Any]) -> None:
        for name, net in beginning.networks.items():
            state_of.set_network(net, state["networks"][name])
        state_of.set_optimizer(self._strategy.optimizer, state["optimizer"])
        beginning.put_back(state["attributes"])
        self._recorder.records[:] = state_of.unpack_records(state["records"])
        state_of.publish(self._strategy.evaluator, self._recorder.records, state["last metrics"])
        state_of.set_random(state["random"], self._job.device)


@functools.cache
def _warn_once(reason: str) -> None:
    """Tell it once a process, for every task of the run has the same plugins."""
    logger.warning("Experts that are tried again start from their beginning, not from a checkpoint: %s.", reason)
