"""Small networks and benchmarks that train in a moment, and what tests compare."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.scenarios import CLScenario
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy

SHAPE = (3, 16, 16)


class TinyNet(nn.Module):
    """A network with a feature layer, batch normalisation, dropout and a head."""

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.dropout(self.pool(torch.relu(self.features(x))).flatten(1)))


def tiny_net(seed: int = 0) -> TinyNet:
    """A TinyNet with weights from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet()


def task_images(domain: int, count: int, seed: int, num_classes: int = 2) -> tuple[Tensor, Tensor]:
    """Images of a domain (a coloured pattern) whose classes differ in where a bright bar stands."""
    generator = torch.Generator().manual_seed(1000 * domain + seed)
    pattern = torch.Generator().manual_seed(domain)
    base = torch.rand(SHAPE, generator=pattern) * 2 - 1
    targets = torch.arange(count) % num_classes
    images = base + 0.3 * torch.randn((count, *SHAPE), generator=generator)
    for i, target in enumerate(targets.tolist()):
        images[i, :, :, 4 * target : 4 * target + 4] += 1.5
    return images, targets


def tiny_benchmark(
    domains: Sequence[int] = (0, 1, 2),
    *,
    train: int = 60,
    test: int = 24,
    labels: bool = True,
    offset: bool = True,
    side: int = SHAPE[1],
) -> CLScenario:
    """A benchmark with one task a domain, two classes each; dataset class ids are 2·task and 2·task + 1. Images are
    ``side`` pixels wide and high."""

    def dataset(task: int, domain: int, count: int, seed: int) -> Any:
        images, targets = task_images(domain, count, seed)
        images = images if side == SHAPE[1] else torch.nn.functional.interpolate(images, size=(side, side))
        targets = targets + (2 * task if offset else 0)
        leaf = TensorDataset(images, targets)
        leaf.targets = targets.tolist()  # type: ignore[attr-defined]
        return as_classification_dataset(leaf)

    scenario = benchmark_from_datasets(
        train=[dataset(task, domain, train, 1 + task) for task, domain in enumerate(domains)],
        test=[dataset(task, domain, test, 100 + task) for task, domain in enumerate(domains)],
    )
    return task_incremental_benchmark(scenario) if labels else scenario


def shared_model() -> ExpertGate:
    """A model whose gate goes by the shared score."""
    return ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear", gate_score="shared")


INLINE = ClusterConfig(engine="inline")


def tiny_strategy(cluster: ClusterConfig = INLINE, **overrides: Any) -> ExpertGateStrategy:
    """A strategy over a TinyNet, quick, with the linear autoencoder and no loggers."""
    overrides = dict(overrides)
    cls = overrides.pop("cls", ExpertGateStrategy)
    model = overrides.pop("model", None) or ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    optimizer = overrides.pop("optimizer", None) or torch.optim.SGD(model.expert.parameters(), lr=0.05, momentum=0.9)
    settings: dict[str, Any] = {
        "train_mb_size": 16,
        "train_epochs": 2,
        "eval_mb_size": 16,
        "ae_latent_dim": 8,
        "evaluator": EvaluationPlugin(loggers=[]),
        **overrides,
    }
    return cls(model=model, optimizer=optimizer, cluster=cluster, **settings)


def hashes(strategy: ExpertGateStrategy) -> list[tuple[str, str]]:
    """sha256 of each task's autoencoder and expert."""
    table = strategy.registry
    return list(zip(table["autoencoder_sha256"].to_pylist(), table["expert_sha256"].to_pylist(), strict=True))


DOMAINS = (0, 1, 0, 2)
"""Task 2 is of task 0's domain: it learns without forgetting; tasks 1 and 3 are fine-tuned."""
SETTINGS: dict[str, Any] = {"rel_thresh": 0.5}


def outcome(strategy: ExpertGateStrategy, metrics: dict[str, Any]) -> dict[str, Any]:
    """Everything that must not depend on where a run ran, as JSON values."""
    registry = strategy.registry.drop_columns(["train_s", "worker"]).to_pylist()
    routing = strategy.model.gate(torch.cat([task_images(domain, 8, 77)[0] for domain in DOMAINS]))
    routed = hashlib.sha256(b"".join(column.numpy().tobytes() for column in routing)).hexdigest()
    tables = {"registry": registry, "relatedness": strategy.relatedness.to_pylist()}
    return {**tables, "routed": routed, "metrics": metrics}


def content(storage: Path) -> dict[str, bytes]:
    """What a run directory holds, but for exports, times, who wrote when, by which command, and what was measured."""
    passing = ("sessions/", "tables/", "evaluations/", "config.yaml")
    files = {str(file.relative_to(storage)): file for file in sorted(storage.rglob("*")) if file.is_file()}
    kept = {path: file for path, file in files.items() if not path.startswith(passing)}
    return {path: file.read_bytes() for path, file in kept.items() if not path.endswith(("timings.json", "run.json"))}


SEED_METHODS = (
    "backward",
    "check_model_and_optimizer",
    "criterion",
    "eval",
    "eval_dataset_adaptation",
    "eval_epoch",
    "forward",
    "make_eval_dataloader",
    "make_optimizer",
    "make_train_dataloader",
    "model_adaptation",
    "optimizer_step",
    "stop_training",
    "train",
    "train_dataset_adaptation",
    "training_epoch",
)
"""The seed's methods, but for ``__init__``."""
