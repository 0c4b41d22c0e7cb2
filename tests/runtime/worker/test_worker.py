"""The worker's door: what it does where memory or an accelerator fails, and what it does not take from its caller."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_eg import ClusterConfig
from distributed_eg.errors import TaskFailedError, WorkerLostError
from distributed_eg.runtime import inline
from distributed_eg.runtime.worker import stages, worker
from distributed_eg.runtime.worker.context import WorkerContext
from distributed_eg.schedule.events import Cause
from distributed_eg.store.experts import ExpertReader
from tests.helpers import SETTINGS, hashes, tiny_benchmark, tiny_strategy


def fail(patch: pytest.MonkeyPatch, error: Exception, times: int = 1) -> None:
    """Have relating raise so often."""
    relate, left = stages._validation_errors, [error] * times

    def failing(*args: Any) -> Any:
        if left:
            raise left.pop()
        return relate(*args)

    patch.setattr(stages, "_validation_errors", failing)


def stored(path: Path, **options: Any) -> ClusterConfig:
    return ClusterConfig(engine="inline", storage=str(path / "run"), **options)


def test_a_broken_accelerator_stops_an_inline_run_which_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's own process cannot go on with it: later tasks would all fail by it."""
    stream = tiny_benchmark((0, 1, 2)).train_stream
    with tiny_strategy() as undisturbed:
        undisturbed.train(stream)
        expected = hashes(undisturbed)
    with monkeypatch.context() as patch, tiny_strategy(stored(tmp_path)) as strategy:
        fail(patch, torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
        with pytest.raises(WorkerLostError, match="nothing more can be computed in this process") as caught:
            strategy.train(stream)
    assert "illegal memory access" in str(caught.value)
    with tiny_strategy(stored(tmp_path, resume=True)) as resumed:
        resumed.train(stream)
        assert hashes(resumed) == expected


def test_without_memory_what_is_kept_goes_before_the_stage_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[int] = []
    clear = ExpertReader.clear

    def noted(reader: ExpertReader) -> None:
        clear(reader)
        cleared.append(len(reader._experts) + len(reader._groups) + (reader._gate is not None))

    monkeypatch.setattr(ExpertReader, "clear", noted)
    fail(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    with tiny_strategy() as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
    assert cleared == [0]


def test_on_a_card_a_worker_waits_for_its_neighbours_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    emptied: list[bool] = []

    class Stopping:
        def is_set(self) -> bool:
            return False

        def wait(self, seconds: float) -> None:
            waited.append(seconds)

    class Context(WorkerContext):
        def __init__(self) -> None:
            self.device = torch.device("cuda:0")
            self.stopping = Stopping()  # type: ignore[assignment]
            self.reader = type("Reader", (), {"clear": lambda _self: None})()

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    of_card = worker.TaskWorker.__new__(worker.TaskWorker)
    of_card._context = Context()
    of_card._make_room()
    assert emptied == [True]
    assert waited == [worker._WAIT_FOR_MEMORY_S]


class FullCard:
    """Counts as a card that has no memory for a moment, whenever it is told so; somebody catches the error."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.num_failed = 0
        patch.setattr(worker, "num_failed", lambda _device: self.num_failed)

    def is_full_in(self, patch: pytest.MonkeyPatch, stage: str, *, error: Exception | None = None) -> None:
        """So often as ``stage`` is carried out next, once; the stage itself raises ``error`` where there is one."""
        carry_out, left = getattr(stages, stage), [True]

        def short(context: Any, request: Any) -> Any:
            if left:
                left.pop()
                self.num_failed += 1
                if error is not None:
                    raise error
            return carry_out(context, request)

        kind = next(kind for kind, function in worker._STAGES.items() if function is carry_out)
        patch.setitem(worker._STAGES, kind, short)


def test_what_went_on_after_a_card_had_no_memory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes another algorithm then, without a word, and keeps to it: other bytes, for as long as the process."""
    stream = tiny_benchmark((0, 1)).train_stream
    with tiny_strategy() as undisturbed:
        undisturbed.train(stream)
        expected = hashes(undisturbed)
    card = FullCard(monkeypatch)
    with monkeypatch.context() as patch, tiny_strategy(stored(tmp_path)) as strategy:
        card.is_full_in(patch, "train_expert")
        with pytest.raises(WorkerLostError, match="no memory left for a moment"):
            strategy.train(stream)
    card.num_failed = 0  # another process
    with tiny_strategy(stored(tmp_path, resume=True)) as resumed:
        resumed.train(stream)
        assert hashes(resumed) == expected


def test_a_stage_that_failed_for_want_of_memory_is_only_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody caught that error, so nothing went on with other sums."""
    FullCard(monkeypatch).is_full_in(monkeypatch, "train_expert", error=torch.OutOfMemoryError("CUDA out of memory"))
    with tiny_strategy() as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
        assert len(strategy.registry) == 2


def test_modes_and_flags_of_the_caller_do_not_reach_a_stage() -> None:
    """Under another default type, precision or mode of autograd an inline run gives the bytes that workers give, and
    the same answers."""
    benchmark = tiny_benchmark((0, 1))
    stream, tested = benchmark.train_stream, benchmark.test_stream
    with tiny_strategy(**SETTINGS) as plain:
        plain.train(stream)
        expected = hashes(plain)
        answers = dict(plain.eval(tested))
    try:
        with tiny_strategy(**SETTINGS) as strategy, torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            torch.set_float32_matmul_precision("medium")  # bfloat16 on CPUs that have it
            torch.use_deterministic_algorithms(True)
            torch.set_default_dtype(torch.float64)
            strategy.train(stream)
            assert hashes(strategy) == expected
            assert dict(strategy.eval(tested)) == answers
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)


def test_what_a_worker_computes_on_is_kept_and_another_kind_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = tiny_benchmark((0, 1)).train_stream
    monkeypatch.setattr(inline, "told_of", lambda _device: "Tesla T4 (7.5), CUDA 12.8, cuDNN 91002")
    with monkeypatch.context() as patch, tiny_strategy(stored(tmp_path, on_task_failure="stop")) as strategy:
        relate = stages.relate_task
        refuse = lambda context, request: (  # noqa: E731
            relate(context, request) if request.input.record.task == 0 else 1 / 0
        )
        patch.setitem(worker._STAGES, stages.messages.RelateRequest, refuse)
        with pytest.raises(TaskFailedError):
            strategy.train(stream)
    for told, warns in (("Tesla T4 (7.5), CUDA 12.8, cuDNN 91002", False), ("NVIDIA H100 (9.0), CUDA 12.8", True)):
        monkeypatch.setattr(inline, "told_of", lambda _device, told=told: told)
        caplog.clear()
        with caplog.at_level(logging.WARNING), tiny_strategy(stored(tmp_path, resume=True)) as strategy:
            strategy.train(stream)
            timings = strategy._driver.registry.timings
        begun = "The run was begun on Tesla T4 (7.5), CUDA 12.8, cuDNN 91002 and goes on with NVIDIA H100"
        assert (begun in caplog.text) == warns
        assert {stage.device for stage in timings[0].stages} == {"Tesla T4 (7.5), CUDA 12.8, cuDNN 91002"}


def test_every_cause_has_a_budget() -> None:
    from distributed_eg.schedule.retry import RETRIES

    assert set(RETRIES) == set(Cause)
