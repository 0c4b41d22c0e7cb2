"""The central promise: the same bytes from one process, one worker, two workers, two nodes, or step by step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_eg import ClusterConfig, ExpertGate
from tests.helpers import (
    DOMAINS,
    INLINE,
    SETTINGS,
    SHAPE,
    outcome,
    shared_model,
    tiny_benchmark,
    tiny_net,
    tiny_strategy,
)


def run(cluster: ClusterConfig, *, stepwise: bool = False, **overrides: Any) -> dict[str, Any]:
    """Train and evaluate; return everything that must be equal."""
    benchmark = tiny_benchmark(DOMAINS)
    with tiny_strategy(cluster, **{**SETTINGS, "model": shared_model(), **overrides}) as strategy:
        if stepwise:
            for experience in benchmark.train_stream:
                strategy.train(experience)
        else:
            strategy.train(benchmark.train_stream)
        return outcome(strategy, strategy.eval(benchmark.test_stream))


@pytest.fixture(scope="module")
def inline() -> dict[str, Any]:
    """The inline engine's outcome, which every other one is held against."""
    return run(INLINE)


def test_the_reference_run_has_every_kind_of_transfer(inline: dict[str, Any]) -> None:
    assert [row["transfer"] for row in inline["registry"]] == ["fresh", "finetune", "lwf", "finetune"]
    assert [row["parent"] for row in inline["registry"]] == [None, 0, 0, 0]


def test_the_callers_generator_and_threads_neither_matter_nor_change(inline: dict[str, Any]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(123)
    try:
        benchmark = tiny_benchmark(DOMAINS)
        with tiny_strategy(INLINE, model=shared_model(), **SETTINGS) as strategy:
            state = torch.get_rng_state()
            strategy.train(benchmark.train_stream)
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.get_num_threads() == 2
            assert outcome(strategy, strategy.eval(benchmark.test_stream)) == inline
    finally:
        torch.set_num_threads(threads)


def test_experience_by_experience(inline: dict[str, Any]) -> None:
    assert run(INLINE, stepwise=True) == inline


def test_another_seed_gives_other_bytes(inline: dict[str, Any]) -> None:
    assert run(INLINE, seed=1)["registry"] != inline["registry"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_ray(inline: dict[str, Any], num_workers: int) -> None:
    cluster = ClusterConfig(num_workers=num_workers, gpus_per_worker=0.5)
    assert run(cluster) == inline


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_by_the_score_of_the_paper(inline: dict[str, Any]) -> None:
    """What is trained is the same, and so is the routing, on workers and step by step."""

    def by_residuals(cluster: ClusterConfig, *, stepwise: bool = False) -> dict[str, Any]:
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        return run(cluster, stepwise=stepwise, model=model)

    expected = by_residuals(INLINE)
    assert expected["registry"] == inline["registry"]
    assert expected["routed"] != inline["routed"]
    assert by_residuals(INLINE, stepwise=True) == expected
    assert by_residuals(ClusterConfig(num_workers=2, gpus_per_worker=0.5)) == expected


@pytest.mark.cluster
def test_two_nodes_with_half_a_gpu_each(inline: dict[str, Any], tmp_path: Path) -> None:
    """A worker on each of two nodes; in a process of its own, for this one may hold the suite's Ray."""
    script = Path(__file__).with_name("two_nodes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["nodes"] == 2
    assert answer["outcome"] == json.loads(json.dumps(inline))


@pytest.mark.parametrize(
    "settings",
    [{"autoencoder": "sgd"}, {"confidence_threshold": 0.2}],
    ids=["sgd autoencoder", "several experts answer"],
)
def test_step_by_step_with_other_settings(settings: dict[str, Any], sgd_model: Callable[[], Any]) -> None:
    overrides = dict(settings)
    makes_model = overrides.pop("autoencoder", None) == "sgd"

    def again(**more: Any) -> dict[str, Any]:
        return run(INLINE, **overrides, **({"model": sgd_model()} if makes_model else {}), **more)

    assert again() == again(stepwise=True)


@pytest.fixture
def sgd_model() -> Callable[[], Any]:
    """Makes models with the paper's autoencoder."""
    from distributed_eg import ExpertGate
    from tests.helpers import SHAPE, tiny_net

    return lambda: ExpertGate(SHAPE, arch=tiny_net(), autoencoder="sgd")
