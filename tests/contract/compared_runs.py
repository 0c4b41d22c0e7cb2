"""The runs that ``compare_runs.py`` makes with two checkouts; each is made by a process of its own, which this file is.

    PYTHONPATH=CHECKOUT python tests/contract/compared_runs.py NAME run|prepare FOLDER LEFT DATA

FOLDER is where the run is made, LEFT a copy of what its preparation left. Nothing is used but the public interface, and
where a run directory has its weights and tables.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

SHAPE = (3, 16, 16)
LEVELS = {"epoch": True, "experience": True, "stream": True}
EPOCHS = 3
STEPS_PER_EPOCH = 4
"""54 of 60 images train, 16 at a time."""
NEWER_COLUMNS = {"lwf_accuracy", "finetune_accuracy", "shared_distance", "known_share"}
"""Of the tables, which the first versions did not write."""

Steps = tuple[tuple[int, int, tuple[int, ...]], ...]
"""A stream: label, domain of the images and class ids of each step."""
PLAIN: Steps = ((0, 0, (0, 1)), (1, 1, (2, 3)), (2, 0, (4, 5)), (3, 2, (6, 7)))
"""With ``rel_thresh=0.5`` step 2, which is of step 0's domain, learns without forgetting."""
REPEAT: Steps = ((7, 0, (0, 1)), (3, 1, (2, 3)), (7, 0, (1, 4)), (5, 0, (5, 6)))


@dataclass(frozen=True)
class Made:
    """What one run came to: sha256 by what it is of, and a note for people."""

    hashes: dict[str, str] = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Place:
    """Where a run is made; ``left`` holds a copy of what its preparation left, ``data`` torchvision's datasets."""

    folder: Path
    left: Path
    data: Path


# What the runs are made of


def small_net() -> nn.Module:
    """Convolutions, batch normalisation, dropout and a head; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = [
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
        ]
        return nn.Sequential(
            *features, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(48, 7)
        )


def task_images(domain: int, count: int, seed: int, num_classes: int = 2) -> tuple[Tensor, Tensor]:
    """Images of a domain (a coloured pattern) whose classes differ in where a bright bar stands."""
    base = torch.rand(SHAPE, generator=torch.Generator().manual_seed(domain)) * 2 - 1
    noise = torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(1000 * domain + seed))
    images, positions = base + 0.3 * noise, torch.arange(count) % num_classes
    for i, position in enumerate(positions.tolist()):
        images[i, :, :, 4 * position : 4 * position + 4] += 1.5
    return images, positions


def benchmark_of(steps: Steps) -> Any:
    """A scenario with 60 training and 24 test images a step."""
    from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
    from avalanche.benchmarks.utils import DataAttribute, as_classification_dataset
    from avalanche.benchmarks.utils.flat_data import ConstantSequence
    from torch.utils.data import TensorDataset

    def dataset(step: tuple[int, int, tuple[int, ...]], count: int, seed: int) -> Any:
        label, domain, classes = step
        images, positions = task_images(domain, count, seed, len(classes))
        targets = torch.tensor(classes)[positions]
        leaf = TensorDataset(images, targets)
        leaf.targets = targets.tolist()  # type: ignore[attr-defined]
        labels = DataAttribute(ConstantSequence(label, count), name="targets_task_labels", use_in_getitem=True)
        return as_classification_dataset(leaf).update_data_attribute("targets_task_labels", labels)

    train = [dataset(step, 60, 1 + position) for position, step in enumerate(steps)]
    test = [dataset(step, 24, 51 + position) for position, step in enumerate(steps)]
    return with_task_labels(benchmark_from_datasets(train=train, test=test))


def strategy_of(storage: Path, *, cluster: dict[str, Any] | None = None, **overrides: Any) -> Any:
    """A strategy over a small network."""
    from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
    from avalanche.training.plugins import EvaluationPlugin

    from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy

    model = overrides.pop("model", None) or ExpertGate(SHAPE, arch=small_net(), autoencoder="linear")
    settings: dict[str, Any] = {
        "optimizer": torch.optim.SGD(model.expert.parameters(), lr=0.05, momentum=0.9),
        "train_mb_size": 16,
        "train_epochs": EPOCHS,
        "eval_mb_size": 16,
        "ae_latent_dim": 8,
        "rel_thresh": 0.5,
        "evaluator": EvaluationPlugin(accuracy_metrics(**LEVELS), loss_metrics(**LEVELS), loggers=[]),
        "cluster": ClusterConfig(**{"engine": "inline", "storage": str(storage), "resume": True, **(cluster or {})}),
        **overrides,
    }
    return ExpertGateStrategy(model=model, **settings)


def sha256(value: Any) -> str:
    """Of bytes, or of any other value as JSON."""
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, default=float).encode()
    return hashlib.sha256(value).hexdigest()


def compared(table: Any, passing: Set[str] = frozenset()) -> list[str]:
    """The columns that all versions write, but for those that are another in each run."""
    return [name for name in table.column_names if name not in NEWER_COLUMNS | passing]


def hashes_of(run: Path, registry: Any, relatedness: Any, metrics: Any) -> dict[str, str]:
    """sha256 of the weights, those of tasks' earlier versions too, of both tables and of the evaluation's metrics."""
    metrics = {name: value for name, value in metrics.items() if "/train_phase/" not in name}
    files = sorted(path for kind in ("autoencoder", "expert") for path in run.glob(f"tasks/*/{kind}-*.safetensors"))
    weights: dict[str, list[bytes]] = {}
    for path in files:
        weights.setdefault(f"{path.name.partition('-')[0]} {int(path.parent.name)}", []).append(path.read_bytes())
    return {
        **{what: sha256(b"".join(contents)) for what, contents in weights.items()},
        "registry": sha256(registry.select(compared(registry, passing={"train_s", "worker"})).to_pylist()),
        "relatedness": sha256(relatedness.select(compared(relatedness)).to_pylist()),
        "metrics": sha256(metrics),
    }


def trained(folder: Path, benchmark: Any, **settings: Any) -> Made:
    """Train and evaluate; the note tells the tasks' transfers and how many nodes had workers."""
    run = folder / "run"
    with strategy_of(run, **settings) as strategy:
        strategy.train(benchmark.train_stream)
        training_metrics = sha256(strategy.evaluator.get_all_metrics())
        metrics = strategy.eval(benchmark.test_stream)
        hashes = hashes_of(run, strategy.registry, strategy.relatedness, metrics)
        nodes = {worker.node for worker in strategy.workers()}
        note = f"{' '.join(strategy.registry['transfer'].to_pylist())}, by {len(nodes)} node(s)"
        return Made({**hashes, "training metrics": training_metrics}, note)


class StepCount:
    """Counts the steps of every optimizer in this process; ends it, as a kill would, at step ``end_at``."""

    def __init__(self, end_at: int = -1) -> None:
        self.steps = 0
        self._end_at = end_at
        register_optimizer_step_post_hook(self._step)

    def _step(self, *_: Any) -> None:
        self.steps += 1
        if self.steps == self._end_at:
            os._exit(0)


# The runs


def embedded(at: Place, **cluster: Any) -> Made:
    """The command's own sequence and network."""
    from distributed_eg import ExpertGate, make_benchmark

    benchmark = make_benchmark("embedded", train_per_task=48, test_per_task=24)
    model = ExpertGate(benchmark.shape, arch="efficientnet_lite0", autoencoder="linear")
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=1e-3, momentum=0.9)
    settings = {"model": model, "optimizer": optimizer, "train_epochs": 1, "ae_latent_dim": 50, "rel_thresh": 0.7}
    return trained(at.folder, benchmark.scenario, cluster=cluster, **settings)


def embedded_ray(at: Place) -> Made:
    """The same by two workers."""
    return embedded(at, engine="ray", num_workers=2)


def split_mnist_sgd(at: Place) -> Made:
    """The paper's autoencoder on images that are read from files."""
    from distributed_eg import ExpertGate, make_benchmark

    benchmark = make_benchmark("split-mnist", data=str(at.data), image_size=32, train_per_task=60, test_per_task=40)
    model = ExpertGate(benchmark.shape, arch=small_net(), autoencoder="sgd")
    return trained(at.folder, benchmark.scenario, model=model)


def repeat(at: Place) -> Made:
    """A label that comes again, in both ways."""
    found, notes = {}, []
    for way in ("continue", "new_expert"):
        made = trained(at.folder / way, benchmark_of(REPEAT), on_repeat=way)
        found |= {f"{way}: {what}": value for what, value in made.hashes.items()}
        notes.append(made.note)
    return Made(found, "; ".join(notes))


def lwf(at: Place) -> Made:
    """Learning without forgetting is chosen."""
    made = trained(at.folder, benchmark_of(PLAIN))
    assert " lwf " in made.note, made.note
    return made


def eval_every(at: Place) -> Made:
    """Metrics after every epoch, a scheduler, and an expert that stops early."""
    from avalanche.training.plugins import EarlyStoppingPlugin, LRSchedulerPlugin

    from distributed_eg import ExpertGate

    model = ExpertGate(SHAPE, arch=small_net(), autoencoder="linear")
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.05, momentum=0.9)
    plugins = [
        LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)),
        EarlyStoppingPlugin(
            patience=2, val_stream_name="valid_stream", metric_name="Loss_Stream", mode="min", margin=0.02
        ),
    ]
    settings = {"model": model, "optimizer": optimizer, "plugins": plugins}
    count, whole = StepCount(), 6 * STEPS_PER_EPOCH * len(PLAIN)
    made = trained(at.folder, benchmark_of(PLAIN), eval_every=1, train_epochs=6, **settings)
    assert 0 < count.steps < whole, "no expert stopped early"
    return Made(made.hashes, f"{count.steps} of {whole} steps")


def two_nodes(at: Place) -> Made:
    """A worker on each of two nodes: it holds all of a node's CPU, and half of a GPU that is only declared."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1, num_gpus=1)
        cluster = {"engine": "ray", "address": nodes.address, "num_workers": 2, "gpus_per_worker": 0.5}
        made = trained(at.folder, benchmark_of(PLAIN), cluster=cluster)
        assert "by 2 node(s)" in made.note, made.note
        return made
    finally:
        nodes.shutdown()


def interrupted(folder: Path) -> None:
    """A run that ends in the last epoch of its third task, after a checkpoint."""
    StepCount(end_at=2 * EPOCHS * STEPS_PER_EPOCH + 2 * STEPS_PER_EPOCH + 2)
    trained(folder, benchmark_of(PLAIN), cluster={"checkpoint_every_s": 0})
    raise AssertionError("nothing interrupted it")


def resumed(at: Place) -> Made:
    """What the other checkout began and did not end is gone on with, to the bytes of a run that nothing disturbed."""
    from distributed_eg.errors import RunInUseError

    sealed = sorted(at.left.glob("run/tasks/*/expert-*.safetensors"))
    assert len(sealed) == 2, f"{len(sealed)} experts were sealed when it ended"
    assert list(at.left.glob("run/tasks/00002/checkpoint-*")), "it left no checkpoint"
    count, before = StepCount(), [path.read_bytes() for path in sealed]
    # A driver of a version that holds no lock counts as alive until its lease has expired, a minute after its end.
    found = None
    deadline_s = time.monotonic() + 90
    while found is None:
        try:
            found = trained(at.left, benchmark_of(PLAIN), cluster={"checkpoint_every_s": 0}).hashes
        except RunInUseError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(1)
    note = f"{count.steps} of {EPOCHS * STEPS_PER_EPOCH * len(PLAIN)} steps were left"
    assert before == [path.read_bytes() for path in sealed], "what was sealed has changed"
    undisturbed = trained(at.folder, benchmark_of(PLAIN)).hashes
    # What metrics were while another driver trained is not kept.
    other = [what for what in undisturbed if what != "training metrics" and found.get(what) != undisturbed[what]]
    assert not other, f"resumed, these are not what an undisturbed run gives: {other}"
    return Made(found, note)


def finished(folder: Path) -> None:
    """A run that came to its end, and what its model says."""
    benchmark = benchmark_of(REPEAT)
    with strategy_of(folder / "run") as strategy:
        strategy.train(benchmark.train_stream)
        (folder / "predictions").write_text(predictions(strategy.model.eval()))


def predictions(model: Any) -> str:
    """sha256 of what a model answers for images of every domain, and of where its gate sends them."""
    images = torch.cat([task_images(domain, 12, 99)[0] for domain in (0, 1)])
    routing = model.gate(images)
    return sha256([model(images).tolist(), routing.tasks.tolist(), routing.confidences.tolist()])


def opened(at: Place) -> Made:
    """What the other checkout left finished is intact, predicts the same, and has nothing left to train."""
    from distributed_eg import ExpertGate

    run = at.left / "run"
    command = [sys.executable, "-m", "distributed_eg", "verify", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = predictions(ExpertGate.load(str(run), arch=small_net()))
    assert found == (at.left / "predictions").read_text(), "it predicts otherwise than when it was trained"
    count = StepCount()
    made = trained(at.left, benchmark_of(REPEAT))
    assert count.steps == 0, f"{count.steps} steps were trained again"
    return Made({**made.hashes, "predictions": found}, done.stdout.strip())


RUNS: dict[str, tuple[Callable[[Place], Made], Callable[[Path], None] | None]] = {
    "embedded": (embedded, None),
    "embedded-ray": (embedded_ray, None),
    "split-mnist-sgd": (split_mnist_sgd, None),
    "repeat": (repeat, None),
    "lwf": (lwf, None),
    "eval-every": (eval_every, None),
    "two-nodes": (two_nodes, None),
    "resumed": (resumed, interrupted),
    "opened": (opened, finished),
}
"""Each run by its name, and its preparation, which the other checkout makes for both."""


def main(name: str, part: str, folder: str, left: str, data: str) -> None:
    """One run, or its preparation, in this process."""
    import distributed_eg

    torch.set_num_threads(1)
    assert Path(distributed_eg.__file__).parents[1] == Path(os.environ["PYTHONPATH"]), distributed_eg.__file__
    run, prepare = RUNS[name]
    if part == "prepare" and prepare is not None:
        prepare(Path(folder))
    else:
        made = run(Place(Path(folder), Path(left), Path(data)))
        (Path(folder) / "made.json").write_text(json.dumps(asdict(made)))


if __name__ == "__main__":
    main(*sys.argv[1:])
