"""An evaluation as workers do it: experts are loaded once for many batches, and how it is cut changes no byte."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import pytest

from distributed_eg import ClusterConfig, ExpertGateStrategy
from distributed_eg.runtime.worker import evaluation
from distributed_eg.store.experts import ExpertReader
from distributed_eg.store.registry import ExpertRef
from distributed_eg.strategy import answers
from tests.helpers import DOMAINS, SETTINGS, tiny_benchmark, tiny_strategy

BENCHMARK = tiny_benchmark(DOMAINS)


@pytest.fixture(scope="module")
def trained() -> Any:
    """An inline run over four tasks, still open, that holds one expert at a time."""
    with tiny_strategy(ClusterConfig(engine="inline", max_resident_experts=1), **SETTINGS) as strategy:
        strategy.train(BENCHMARK.train_stream)
        yield strategy


def answered(strategy: ExpertGateStrategy, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Counter[ExpertRef]]:
    """A hash of all that an evaluation of small batches gives, and how often it built each expert."""
    digest, built, keep, take = hashlib.sha256(), Counter[ExpertRef](), ExpertReader.keep, answers.Answers.take

    def noted(reader: ExpertReader, ref: ExpertRef, tensors: Any) -> Any:
        built[ref] += 1
        return keep(reader, ref, tensors)

    def hashed(own: answers.Answers, targets: Any) -> Any:
        outputs, routed = take(own, targets)
        for tensor in (outputs, *routed):
            digest.update(tensor.numpy().tobytes())
        return outputs, routed

    with monkeypatch.context() as patch:
        patch.setattr(ExpertReader, "keep", noted)
        patch.setattr(answers.Answers, "take", hashed)
        strategy.eval([*BENCHMARK.test_stream, *BENCHMARK.test_stream])
    return digest.hexdigest(), built


def test_each_expert_is_loaded_once_for_all_batches_that_wait(
    trained: ExpertGateStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.eval_mb_size = 3
    _, built = answered(trained, monkeypatch)
    # One expert may lie there from before.
    assert max(built.values()) == 1


@pytest.mark.parametrize("num_bytes", [1, 10_000])
@pytest.mark.parametrize("num_samples", [1, 7, 20])
def test_the_bytes_do_not_depend_on_how_it_is_cut(
    trained: ExpertGateStrategy, monkeypatch: pytest.MonkeyPatch, num_samples: int, num_bytes: int
) -> None:
    trained.eval_mb_size = 3
    whole, _ = answered(trained, monkeypatch)
    monkeypatch.setattr(answers, "_MOST_SAMPLES", num_samples)
    monkeypatch.setattr(evaluation, "_IMAGE_BYTES", num_bytes)
    assert answered(trained, monkeypatch)[0] == whole
