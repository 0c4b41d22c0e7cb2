"""Runs that an earlier version of this package left, kept so that later ones are held to reading them; and their maker.

    PYTHONPATH=CHECKOUT python tests/store/old_runs/make.py

``finished/`` and ``interrupted/`` beside this file were made so with commit 5c9cdbe, and ``answers.json`` with them:
what ``ExpertGate.load`` then said of each. They are not made anew. ``finished`` holds three tasks, the third of which
continues the first; ``interrupted`` ended as by a kill in the last epoch of its third task of four, after a checkpoint.

A driver that resumes a run hashes images and network, and computes the statistics of the first task's features again.
All of these are multiples of 1/16, and 32 of 40 images train: sums and means are exact, whatever CPU they are made by.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import CLScenario, benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import DataAttribute, as_classification_dataset
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy

HERE = Path(__file__).resolve().parent
SHAPE = (3, 8, 8)
STREAMS = {
    "finished": ((7, 0, (0, 1)), (3, 1, (2, 3)), (7, 0, (1, 4))),
    "interrupted": ((0, 0, (0, 1)), (1, 1, (2, 3)), (2, 0, (4, 5)), (3, 2, (6, 7))),
}
"""Label, domain of the images and class ids of each step."""
STEPS_PER_TASK = 12
"""Of the optimizer: three epochs of four batches."""
_END_AT = 2 * STEPS_PER_TASK + 10


def net() -> nn.Module:
    """A small network; its weights before the features do not depend on how a library draws or multiplies."""
    layers = OrderedDict(
        features=nn.Conv2d(3, 4, 3, stride=2, padding=1),
        relu=nn.ReLU(),
        norm=nn.BatchNorm2d(4),
        pool=nn.AdaptiveAvgPool2d(2),
        flat=nn.Flatten(),
        dropout=nn.Dropout(0.1),
        head=nn.Linear(16, 7),
    )
    network, draw = nn.Sequential(layers), np.random.RandomState(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.from_numpy(draw.randint(-3, 4, tuple(parameter.shape)) / 8))
        network.norm.weight.fill_(1)
    return network


def images_of(domain: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of a domain (a pattern), and where a bright bar stands in them: left or right."""
    base = np.random.RandomState(domain).randint(-8, 9, SHAPE)
    images = base + np.random.RandomState(1000 * domain + seed).randint(-2, 3, (count, *SHAPE))
    positions = np.arange(count) % 2
    for i, position in enumerate(positions):
        images[i, :, :, 4 * position : 4 * position + 4] += 6
    return torch.from_numpy(images / 4).float(), torch.from_numpy(positions)


def benchmark(name: str) -> CLScenario:
    """The stream of one of the runs."""

    def dataset(step: tuple[int, int, tuple[int, int]], count: int, seed: int) -> Any:
        label, domain, classes = step
        images, positions = images_of(domain, count, seed)
        targets = torch.tensor(classes)[positions]
        leaf = TensorDataset(images, targets)
        leaf.targets = targets.tolist()  # type: ignore[attr-defined]
        labels = DataAttribute(ConstantSequence(label, count), name="targets_task_labels", use_in_getitem=True)
        return as_classification_dataset(leaf).update_data_attribute("targets_task_labels", labels)

    train = [dataset(step, 40, 1 + position) for position, step in enumerate(STREAMS[name])]
    return with_task_labels(benchmark_from_datasets(train=train))


def strategy_in(storage: Path) -> ExpertGateStrategy:
    """The strategy of both runs; it goes on with what ``storage`` holds."""
    model = ExpertGate(SHAPE, arch=net(), autoencoder="linear")
    return ExpertGateStrategy(
        model=model,
        optimizer=torch.optim.SGD(model.expert.parameters(), lr=0.05, momentum=0.9),
        train_mb_size=8,
        train_epochs=3,
        ae_latent_dim=4,
        rel_thresh=0.5,
        validation_fraction=0.2,
        evaluator=EvaluationPlugin(loggers=[]),
        cluster=ClusterConfig(engine="inline", storage=str(storage), resume=True, checkpoint_every_s=0),
    )


def answers_of(run: Path) -> dict[str, Any]:
    """What the model of a run says of images of each domain: log-probabilities, and tasks by its gate."""
    model = ExpertGate.load(str(run), arch=net())
    images = torch.cat([images_of(domain, 4, 99)[0] for domain in range(3)])
    return {"outputs": model(images).tolist(), "tasks": model.gate(images).tasks.tolist()}


def _set_aside(session: Path) -> None:
    """Let the run's driver have been on another machine, long ago: clocks differ."""
    record = json.loads(session.read_text())
    del record["sha256"]
    record["holder"] |= {"host": "elsewhere", "boot_id": ""}
    record["renewed_at"] = 0.0
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    session.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Make both runs, ``interrupted`` in a process that ends as by a kill."""
    answers = {}
    for name in STREAMS:
        run = HERE / name
        shutil.rmtree(run, ignore_errors=True)
        child = os.fork()
        if child == 0:
            steps = 0

            def step(*_: Any) -> None:
                nonlocal steps
                steps += 1
                if steps == _END_AT and name == "interrupted":  # noqa: B023
                    os._exit(0)

            register_optimizer_step_post_hook(step)
            with strategy_in(run) as strategy:
                strategy.train(benchmark(name).train_stream)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(f"{name} was not made")
        _set_aside(run / "sessions" / "00001.json")
        answers[name] = answers_of(run)
    (HERE / "answers.json").write_text(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
