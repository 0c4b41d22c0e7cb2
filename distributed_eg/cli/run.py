"""``distributed-eg run``: train a task sequence, evaluate it, say how it went."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from distributed_eg import given
from distributed_eg.benchmarks import BENCHMARKS, make_benchmark
from distributed_eg.cli.outcome import RunOutcome, outcome_of
from distributed_eg.config import ClusterConfig, Engine
from distributed_eg.errors import InputError
from distributed_eg.types import AutoencoderKind, OnTaskFailure

if TYPE_CHECKING:
    from avalanche.training.plugins import EvaluationPlugin

    from distributed_eg.cli.display import Display


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Train a sequence of image tasks on worker actors, then route unseen images to the right expert."""

    benchmark: str = "embedded"
    """Task sequence: embedded (real images that come inside installed packages), split-mnist, split-fashion-mnist,
    split-mnist+fashion or split-cifar10."""
    data: str | None = None
    """Folder of the torchvision datasets."""
    download: bool = False
    """Download a missing dataset into --data."""
    image_size: int | None = None
    """Side of the images in pixels; 64 for embedded, else 96."""
    train_per_task: int | None = None
    """Training images a task; all there are, or 240 for embedded."""
    test_per_task: int | None = None
    """Test images a task; all there are, or 120 for embedded."""

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
    rel_thresh: float = 0.7
    """Relatedness above which an expert learns without forgetting; the paper's 0.85 is seldom reached in the linear
    autoencoder's unit."""
    epochs: int = 3
    """Epochs of each expert's training."""
    batch_size: int = 16
    """Mini-batch size of training."""
    lr: float = 1e-3
    """Learning rate of each expert's training (SGD, momentum 0.9)."""
    seed: int = 0
    """Seed of everything that is drawn."""

    engine: Engine = "ray"
    """ray (worker actors) or inline (this process)."""
    address: str | None = None
    """Ray cluster to attach to; else RAY_ADDRESS; else Ray is started here and stopped at the end."""
    num_workers: int | Literal["auto"] = "auto"
    """Worker actors; auto is one per GPU, else one per CPU, and more when nodes join."""
    gpus_per_worker: float | None = None
    """GPUs that each worker holds, fractions allowed."""
    threads: int = 1
    """Torch threads of every stage; another number gives other bytes."""
    storage: str | None = None
    """Run directory: a path, or any pyarrow.fs URI; runs/<benchmark>-<time> where not given. One that holds a run is
    gone on with: the same command resumes what was interrupted."""
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
    for name in ("storage", "weights", "data", "address"):
        if getattr(options, name) is not None:
            given.text(getattr(options, name), f"--{name}")
    if options.weights is not None and options.random_weights:
        raise InputError("--weights and --random-weights exclude each other: leave one of them out.")
    if options.benchmark not in BENCHMARKS:
        make_benchmark(options.benchmark)  # says which names there are
    storage = options.storage or f"runs/{options.benchmark}-{time.strftime('%Y%m%d-%H%M%S')}"
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

    benchmark = make_benchmark(
        options.benchmark,
        data=options.data,
        download=options.download,
        image_size=options.image_size,
        train_per_task=options.train_per_task,
        test_per_task=options.test_per_task,
        seed=options.seed,
    )
    model = ExpertGate(
        shape=benchmark.shape,
        arch=options.arch,
        pretrained_flag=not options.random_weights,
        weights=options.weights,
        autoencoder=options.autoencoder,
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
        evaluator=_silent_evaluator(),
        ae_latent_dim=options.latent_dim,
        rel_thresh=options.rel_thresh,
        seed=options.seed,
        observer=display.progress,
        cluster=ClusterConfig(
            engine=options.engine,
            address=options.address,
            num_workers=options.num_workers,
            gpus_per_worker=options.gpus_per_worker,
            threads=options.threads,
            storage=storage,
            resume=True,
            on_task_failure=options.on_task_failure,
            checkpoint_every_s=options.checkpoint_every_s,
        ),
        **(paper if options.autoencoder == "sgd" else {}),
    ) as strategy:
        started = time.perf_counter()
        with display.training(benchmark.task_names):
            strategy.train(benchmark.scenario.streams["train"])
        trained = time.perf_counter()
        with display.evaluating():
            metrics = strategy.eval(benchmark.scenario.streams["test"])
        evaluated = time.perf_counter()
        return outcome_of(strategy, metrics, benchmark, trained - started, evaluated - trained)


def _silent_evaluator() -> EvaluationPlugin:
    import warnings

    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        # The command shows its own progress: no logger is what we want.
        warnings.filterwarnings("ignore", message="No loggers specified")
        return EvaluationPlugin()
