"""The task worker: one process's door to the stages; a plain class, made an actor only where one is spawned."""

from __future__ import annotations

import contextlib
import ctypes
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from distributed_eg.errors import ExpertGateError, told
from distributed_eg.runtime import messages
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.runtime.messages import Done, Epoch, Raised, Request, Result, WorkerSetup
from distributed_eg.runtime.worker import evaluation, stages
from distributed_eg.runtime.worker.causes import cause_of, ends_process, is_ours
from distributed_eg.runtime.worker.context import WorkerContext
from distributed_eg.schedule.events import Cause
from distributed_eg.types import derive_seed

_STAGES: dict[type, Callable[[WorkerContext, Any], Result]] = {
    messages.FeaturesRequest: stages.extract_features,
    messages.ReferenceRequest: stages.fit_reference,
    messages.AutoencoderRequest: stages.fit_task_autoencoder,
    messages.RelateRequest: stages.relate_task,
    messages.ExpertRequest: stages.train_expert,
    messages.EvaluateRequest: evaluation.evaluate,
    messages.DropRequest: stages.drop_features,
}

_WAIT_FOR_MEMORY_S = 5.0
_SWALLOWED = (
    "The card had no memory left for a moment, and what computed went on: cuDNN does so by another algorithm, whose "
    "sums are others, and keeps to it. Its result is not used. Give the workers more of the card, or take smaller "
    "batches; a plugin that catches such errors cannot be used."
)


class TaskWorker:
    """Runs one request at a time, each under its own seed and the run's threads; ``tell`` hears of epochs."""

    def __init__(
        self, setup: WorkerSetup, fetch: Callable[[Any], Any], device: torch.device, tell: Callable[[Epoch], None]
    ) -> None:
        with reproducible(setup.method.seed, setup.cluster.threads, device):
            self._context = WorkerContext(setup, fetch, device, tell)
        self._num_raised = 0
        """Times that a card had no memory and a stage failed by it."""

    def run(self, request: Request) -> Done | Raised:
        """Carry out a request; an exception becomes a value, for not every exception can cross a process border."""
        began_s, started = time.time(), time.perf_counter()
        setup = self._context.setup
        try:
            with _undisturbed(self._context.device, _seed(request, setup.method.seed), setup.cluster.threads):
                result = _STAGES[type(request)](self._context, request)
        except BaseException as error:
            if ends_process(error):
                raise
            ours = error if isinstance(error, ExpertGateError) and is_ours(error) else None
            message = told(error) if ours is None else str(error)
            took_s = time.perf_counter() - started
            raised = Raised(ours, message, traceback.format_exc(), took_s, cause_of(error))
            _forget_frames(error)
            if raised.cause is Cause.OUT_OF_MEMORY:
                self._num_raised += _is_of_card(error)
                self._make_room()
            return raised
        finally:
            _give_memory_back(self._context.device, setup.cluster.gpus_per_worker)
        took_s = time.perf_counter() - started
        if num_failed(self._context.device) > self._num_raised:
            return Raised(None, _SWALLOWED, _SWALLOWED, took_s, Cause.ACCELERATOR)
        return Done(result, took_s, began_s)

    def _make_room(self) -> None:
        """Before a stage that found no memory is tried again: let go of what is kept for later, and, on a card that
        others may share, wait a moment for theirs."""
        self._context.let_go()
        if self._context.device.type != "cpu":
            torch.cuda.empty_cache()
            self._context.stopping.wait(_WAIT_FOR_MEMORY_S)

    def close(self) -> None:
        """Have what runs end at its next batch, and remove the scratch folder."""
        self._context.close()


@contextlib.contextmanager
def _undisturbed(device: torch.device, seed: int, threads: int) -> Iterator[None]:
    """``reproducible``, and no mode of autograd's that an inline caller is in."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        with reproducible(seed, threads, device):
            yield


def num_failed(device: torch.device) -> int:
    """How often torch found no memory on a card since this process began, whoever caught the error."""
    return 0 if device.type != "cuda" else torch.cuda.memory_stats(device).get("num_ooms", 0)


def _is_of_card(error: BaseException) -> bool:
    return any(isinstance(part, torch.OutOfMemoryError) for part in (error, error.__cause__))


def _give_memory_back(device: torch.device, share: float | None) -> None:
    """What a stage has freed goes back: to the system, where glibc would keep a tenth of an expert and more, and on a
    shared card to the neighbours."""
    if device.type == "cuda" and share is not None and share < 1:
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what a failed stage had in hand: networks and data live in the frames of its traceback."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            _ = frame.f_locals  # whoever asked for them before left a copy, which this brings up to date
        error = error.__cause__ or error.__context__


def _seed(request: Request, run_seed: int) -> int:
    task = getattr(request, "input", None)
    return derive_seed(run_seed, -1 if task is None else task.record.task, type(request).__name__)
