"""On one real card: the same bytes every time and from every engine, failures that only a card has, moving about.

pytest -m gpu tests/gpu -s        # under 8 minutes on one card; prints throughput as ratios
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.config import AutoencoderConfig
from distributed_eg.errors import WorkerLostError
from distributed_eg.method.gate import Routing
from distributed_eg.method.sgd_autoencoder import fit_sgd
from distributed_eg.runtime.worker import worker
from tests.faults.chaos import Fault, installed
from tests.helpers import hashes, tiny_benchmark, tiny_strategy
from tests.method.helpers import Rows, subspace_rows

CARD = torch.device("cuda")
INLINE = ClusterConfig(engine="inline")
ROOT = Path(__file__).resolve().parents[2]


def alexnet_strategy(
    cluster: ClusterConfig = INLINE, *, autoencoder: Any = "linear", gate_score: Any = "residual", **overrides: Any
) -> ExpertGateStrategy:
    """AlexNet at 96×96, whose pooling is not to 1×1, with dropout, which draws on the card."""
    torch.manual_seed(0)
    network = torchvision.models.alexnet(num_classes=10)
    model = ExpertGate((3, 96, 96), arch=network, autoencoder=autoencoder, gate_score=gate_score)
    settings: dict[str, Any] = {"train_mb_size": 16, "train_epochs": 2, "eval_mb_size": 16, "ae_latent_dim": 8}
    settings |= {"evaluator": EvaluationPlugin(loggers=[]), "rel_thresh": 0.3, **overrides}
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=1e-3, momentum=0.9)
    return ExpertGateStrategy(model=model, optimizer=optimizer, cluster=cluster, **settings)


def big_benchmark(domains: tuple[int, ...] = (0, 1, 0)) -> Any:
    return tiny_benchmark(domains, train=48, test=16, side=96)


def trained(cluster: ClusterConfig = INLINE, **overrides: Any) -> tuple[list[tuple[str, str]], list[float]]:
    """Hashes of a training on the card, and what its evaluation says."""
    benchmark = big_benchmark()
    with alexnet_strategy(cluster, **overrides) as strategy:
        strategy.train(benchmark.train_stream)
        metrics = strategy.eval(benchmark.test_stream)
        devices = {s.device for of in strategy._driver.registry.timings.values() for s in of.stages}
        assert all("CUDA" in device for device in devices), devices
        return hashes(strategy), sorted(float(v) for k, v in metrics.items() if k.startswith(("Gate", "EndToEnd")))


@pytest.fixture(scope="module")
def expected() -> tuple[list[tuple[str, str]], list[float]]:
    return trained()


def test_the_same_bytes_twice(expected: Any) -> None:
    """Under flags that the caller has set otherwise, too."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    try:
        assert trained() == expected
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("autoencoder", ["linear", "sgd"])
def test_the_same_bytes_twice_by_the_other_ways(autoencoder: Any) -> None:
    """Summaries, both ways of transfer, the root for strange images."""
    ways = {"autoencoder": autoencoder, "gate_score": "shared", "transfer": "best", "unknown": "root"}
    assert trained(**ways, rel_thresh=0.7) == trained(**ways, rel_thresh=0.7)


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_same_bytes_from_workers_that_share_the_card(num_workers: int, expected: Any) -> None:
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False)
    try:
        assert trained(ClusterConfig(num_workers=num_workers, gpus_per_worker=1 / num_workers)) == expected
    finally:
        ray.shutdown()


@pytest.mark.parametrize("autoencoder", ["linear", "sgd"])
def test_a_resumed_expert_draws_on_as_if_nothing_had_happened(tmp_path: Path, autoencoder: Any) -> None:
    """Dropout draws from the card's generator, which the checkpoint holds."""
    stream = big_benchmark((0,)).train_stream
    options: dict[str, Any] = {"train_epochs": 4, "autoencoder": autoencoder}
    with alexnet_strategy(**options) as strategy:
        strategy.train(stream)
        expected = hashes(strategy)
    stored = {"engine": "inline", "storage": str(tmp_path / "run"), "checkpoint_every_s": 0}
    with installed(tmp_path / "chaos") as chaos:
        chaos.plan(Fault("iteration 1 of epoch 2 of task 0", "accelerator"))
        with alexnet_strategy(ClusterConfig(**stored), **options) as strategy, pytest.raises(WorkerLostError):
            strategy.train(stream)
        chaos.require_fired()
    with alexnet_strategy(ClusterConfig(**stored, resume=True), **options) as strategy:
        strategy.train(stream)
        assert hashes(strategy) == expected


def test_a_full_card_is_tried_again(monkeypatch: pytest.MonkeyPatch, expected: Any) -> None:
    """Somebody else's memory, which is free by the time that the worker has waited. What is left is enough to begin
    with, and less than weights, gradients and momentum of an AlexNet, 228 MB each."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = [torch.empty(free - 600 * 2**20, dtype=torch.uint8, device=CARD)]
    make_room, tried = worker.TaskWorker._make_room, []

    def wait(self: worker.TaskWorker) -> None:
        tried.append(held.pop().numel())
        torch.cuda.empty_cache()
        make_room(self)

    monkeypatch.setattr(worker, "_WAIT_FOR_MEMORY_S", 0.1)
    monkeypatch.setattr(worker.TaskWorker, "_make_room", wait)
    assert trained() == expected
    assert len(tried) == 1


EARLY = """
import torch
from distributed_eg import ClusterConfig, ExpertGate
from tests.helpers import SHAPE, tiny_benchmark, tiny_net, tiny_strategy

if {first}:
    torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
model = ExpertGate(SHAPE, device="cuda", arch=tiny_net(), autoencoder="linear")
model(torch.rand(2, *SHAPE, device="cuda"))
try:
    with tiny_strategy(ClusterConfig(engine="inline"), model=model) as strategy:
        strategy.train(tiny_benchmark((0,)).train_stream)
    print("trained")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(("first", "says"), [(False, "trained"), (True, "InputError This process has multiplied on")])
def test_products_before_the_first_training(first: bool, says: str) -> None:
    """torch asks once whether cuBLAS sums in one order: the model has settled it, or an error says who came before."""
    script = EARLY.replace("{first}", str(first))
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.stdout.startswith(says), said.stdout + said.stderr[-2000:]


BROKEN = """
import sys, torch
from distributed_eg import ClusterConfig
from tests.helpers import tiny_benchmark, tiny_strategy

def criterion(outputs, targets):
    return torch.nn.functional.nll_loss(outputs, targets + 1000)

with tiny_strategy(ClusterConfig(engine="inline"), criterion=criterion) as strategy:
    try:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
    except Exception as error:
        print(type(error).__name__, str(error)[:300])
"""


def test_a_device_side_assert_ends_the_process_not_every_later_task() -> None:
    said = subprocess.run([sys.executable, "-c", BROKEN], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.stdout.startswith("WorkerLostError The accelerator failed"), said.stdout + said.stderr[-2000:]


def test_a_model_moves_between_trainings() -> None:
    benchmark = tiny_benchmark((0, 1))
    images = torch.rand(4, *benchmark.train_stream[0].dataset[0][0].shape)
    with tiny_strategy() as strategy:
        model = strategy.model
        strategy.train(benchmark.train_stream[0])
        on_cpu = model.gate(images)
        model.to(CARD)
        on_card = model.gate(images)
        assert on_card.errors.device.type == "cuda"
        # Sums of some thousand products in another order.
        assert torch.allclose(on_card.errors.cpu(), on_cpu.errors, rtol=1e-3, atol=1e-3)
        strategy.train(benchmark.train_stream[1])
        strategy.eval(benchmark.test_stream)
        assert model.device.type == "cuda"
        assert model.gate(images).errors.shape == (4, 2)
        assert len(model.predict(images)) == 4
        buffer = io.BytesIO()
        torch.save(model, buffer)
    buffer.seek(0)
    loaded: ExpertGate = torch.load(buffer, map_location="cpu", weights_only=False)
    routing: Routing = loaded.gate(images)
    assert routing.errors.device.type == loaded.device.type == "cpu"


def test_the_callers_generator_on_the_card_is_left_alone() -> None:
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    trained()
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_the_gradient_autoencoder_does_not_wait_for_the_card() -> None:
    """Not in each batch: reads of losses are few."""
    rows = Rows(subspace_rows(400, 64, domain=0, seed=0).to(CARD))
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            fit_sgd(AutoencoderConfig(latent_dim=5, epochs=2, batch_size=1), rows, 0)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert len(waits) < 40, "of 800 batches"


def seconds(run: Any, times: int = 5) -> float:
    """The median time of a call, without the first."""
    run()
    taken = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1000)
    return sorted(taken)[times // 2]


def test_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not asserted: a task on the card against a bare loop over the same batches."""
    benchmark = tiny_benchmark((0,), train=1024, test=64, side=224)
    images = torch.stack([benchmark.train_stream[0].dataset[i][0] for i in range(920)])
    targets = torch.tensor([benchmark.train_stream[0].dataset[i][1] for i in range(920)])

    def bare() -> None:
        network = torchvision.models.alexnet(num_classes=2).to(CARD).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        for first in range(0, 920, 64):
            optimizer.zero_grad()
            answers = network(images[first : first + 64].to(CARD))
            nn.functional.cross_entropy(answers, targets[first : first + 64].to(CARD)).backward()
            optimizer.step()

    def bare_features() -> None:
        network = torchvision.models.alexnet(num_classes=2).to(CARD).eval()
        with torch.inference_mode():
            for first in range(0, 920, 64):
                network.features(images[first : first + 64].to(CARD)).cpu()

    torch.manual_seed(0)
    model = ExpertGate((3, 224, 224), arch=torchvision.models.alexnet(num_classes=10), autoencoder="linear")
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=1e-3, momentum=0.9)
    with ExpertGateStrategy(
        model=model,
        optimizer=optimizer,
        cluster=INLINE,
        train_mb_size=64,
        train_epochs=1,
        eval_mb_size=64,
        evaluator=EvaluationPlugin(loggers=[]),
    ) as strategy:
        strategy.train(benchmark.train_stream)
        ours = {stage.stage: stage.seconds for stage in strategy._driver.registry.timings[0].stages}
    figures = {
        "card": torch.cuda.get_device_name(),
        "stages_s": {name: round(value, 3) for name, value in ours.items()},
        "expert ÷ bare loop": round(ours["expert"] / seconds(bare, 3), 2),
        "features ÷ bare pass": round(ours["features"] / seconds(bare_features, 3), 2),
    }
    with capsys.disabled():
        print("\n" + json.dumps(figures, ensure_ascii=False))
        command = [sys.executable, "tests/performance/gate_throughput.py", "--device", "cuda", "--tasks", "10", "100"]
        subprocess.run(command, cwd=ROOT, check=True)
