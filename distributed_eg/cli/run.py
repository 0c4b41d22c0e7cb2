"""``distributed-eg run``: train a task sequence, evaluate it, say how it went."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from distributed_eg import given
from distributed_eg.cli.options import BenchmarkOptions, WorkerOptions, silent_evaluator
from distributed_eg.cli.outcome import RunOutcome, outcome_of
from distributed_eg.errors import InputError
from distributed_eg.types import AutoencoderKind, GateScore, OnTaskFailure, TransferRule

if TYPE_CHECKING:
    from distributed_eg.benchmarks.benchmark import Benchmark
    from distributed_eg.cli.display import Display


@dataclass(frozen=True, kw_only=True)
class RunOptions(WorkerOptions, BenchmarkOptions):
    """Train a sequence of image tasks on worker actors, then route unseen images to the right expert."""

    image_size: int | None = None
    """Side of the images in pixels; 64 for embedded, else 96."""

    arch: str = "efficientnet_lite0"
    """Backbone: efficientnet_lite0 or a torchvision classification model."""
    weights: str | None = None
    """Its weights: a torchvision weights name or the path of a state dict; the default ones otherwise."""
    random_weights: bool = False
    """Random weights instead, drawn from --seed."""
    autoencoder: AutoencoderKind = "linear"
    """linear (closed form) or sgd (the paper's, trained by AdaGrad)."""
    latent_dim: int = 50
    """Hidden units of an autoencoder."""
    gate_score: GateScore = "shared"
    """shared (distances to classes under one covariance) or residual (the paper's reconstruction errors)."""
    rel_thresh: float = 0.7
    """Relatedness above which an expert learns without forgetting; the paper's 0.85 is seldom reached in the linear
    autoencoder's unit."""
    transfer: TransferRule = "threshold"
    """threshold (by --rel-thresh) or best (both ways are trained, and the better on the held-out part is kept)."""
    epochs: int = 3
    """Epochs of each expert's training."""
    batch_size: int = 16
    """Mini-batch size of training."""
    lr: float = 1e-3
    """Learning rate of each expert's training (SGD, momentum 0.9)."""
    seed: int = 0
    """Seed of everything that is drawn."""

    threads: int = 1
    """Torch threads of every stage; another number gives other bytes."""
    storage: str | None = None
    """Run directory: a path, or any pyarrow.fs URI; runs/<benchmark>-<time> where not given. One that holds a run is
    gone on with: the same command resumes what was interrupted."""
    append: bool = False
    """Add the tasks to the run that --storage holds; those before them are not asked for. Their labels, and their
    class ids, must be new: see --first-label, --first-class and --tasks."""
    on_task_failure: OnTaskFailure = "continue"
    """continue: train what does not need a failed task; stop: begin nothing new."""
    checkpoint_every_s: float = 60
    """Seconds of an expert's training that a lost worker may cost, and one epoch; 0 is every epoch."""

    json: bool = False
    """Print one JSON object as the last line of stdout; what people read goes to stderr."""


def run(options: Annotated[RunOptions, tyro.conf.OmitArgPrefixes]) -> None:
    """Train a sequence of image tasks on worker actors, then route unseen images to the right expert."""
    from distributed_eg.cli.display import Display

    for name, least in (("epochs", 0), ("batch_size", 1)):
        given.whole(getattr(options, name), f"--{name.replace('_', '-')}", least)
    given.number(options.lr, "--lr", "be at least 0, and finite", lambda value: 0 <= value < math.inf)
    for name in ("storage", "weights"):
        if getattr(options, name) is not None:
            given.text(getattr(options, name), f"--{name}")
    if options.weights is not None and options.random_weights:
        raise InputError("--weights and --random-weights exclude each other: leave one of them out.")
    if options.append and options.storage is None:
        raise InputError("--append needs --storage, the run directory to add to.")
    options.check()
    name = re.sub(r"[^\w+.-]+", "-", options.benchmark)
    storage = options.storage or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    display = Display(to_stderr=options.json)
    try:
        outcome = _train_and_evaluate(options, storage, display)
    except (KeyboardInterrupt, SystemExit):
        display.interrupted(storage)
        raise
    display.table(outcome)
    if options.json:
        print(json.dumps(asdict(outcome)))


def _train_and_evaluate(options: RunOptions, storage: str, display: Display) -> RunOutcome:
    import torch

    from distributed_eg.strategy.model import ExpertGate
    from distributed_eg.strategy.strategy import ExpertGateStrategy

    benchmark = options.make(options.image_size, options.seed)
    if options.append:
        _refuse_known(benchmark, storage)
    model = ExpertGate(
        shape=benchmark.shape,
        arch=options.arch,
        pretrained_flag=not options.random_weights,
        weights=options.weights,
        autoencoder=options.autoencoder,
        gate_score=options.gate_score,
        seed=options.seed,
    )
    # The authors' sample code: AdaGrad 1e-2, batch 12.
    paper: dict[str, Any] = {"ae_optimizer": "adagrad", "ae_lr": 1e-2, "ae_train_mb_size": 12, "ae_train_epochs": 20}
    with ExpertGateStrategy(
        model=model,
        optimizer=torch.optim.SGD(model.expert.parameters(), lr=options.lr, momentum=0.9),
        train_mb_size=options.batch_size,
        train_epochs=options.epochs,
        eval_mb_size=32,
        evaluator=silent_evaluator,
        ae_latent_dim=options.latent_dim,
        rel_thresh=options.rel_thresh,
        transfer=options.transfer,
        seed=options.seed,
        observer=display.progress,
        class_names=benchmark.class_names,
        transform=benchmark.transform,
        cluster=options.cluster(
            storage,
            "append" if options.append else True,
            options.threads,
            on_task_failure=options.on_task_failure,
            checkpoint_every_s=options.checkpoint_every_s,
        ),
        **(paper if options.autoencoder == "sgd" else {}),
    ) as strategy:
        started = time.perf_counter()
        with display.training(dict(zip(benchmark.labels, benchmark.task_names, strict=True))):
            strategy.train(benchmark.scenario.streams["train"])
        trained = time.perf_counter()
        with display.evaluating():
            metrics = strategy.eval(benchmark.scenario.streams["test"])
        evaluated = time.perf_counter()
        return outcome_of(strategy, metrics, benchmark, trained - started, evaluated - trained)


def _refuse_known(benchmark: Benchmark, storage: str) -> None:
    """A sequence holds each label and each class id once: one that the run has is another task's, or another class's.

    Raises:
        InputError: the run has one, and no command that was cut off brought it.
    """
    from distributed_eg.store.registry import Registry
    from distributed_eg.store.storage import Storage

    registry = Registry.read(Storage(storage), without_damaged=True)
    ended = [manifest for manifest in registry.newest.values() if manifest.task < registry.num_ended]
    labels = {manifest.label for manifest in ended} & set(benchmark.labels)
    classes = {c for manifest in ended for c in manifest.classes} & benchmark.class_names.keys()
    for what, known, option in (("labels", labels, "first-label"), ("class ids", classes, "first-class")):
        if known:
            raise InputError(
                f"The run has the {what} {sorted(known)} already: choose other tasks (--tasks), or have theirs start "
                f"higher (--{option})."
            )
