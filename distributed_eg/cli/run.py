"""``distributed-eg run``: train a task sequence, evaluate it, say how it went."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from distributed_eg import given
from distributed_eg.cli.config_file import config_text
from distributed_eg.cli.log_json import log_as_json
from distributed_eg.cli.options import BenchmarkOptions, WorkerOptions, optional, silent_evaluator
from distributed_eg.cli.outcome import RunOutcome, outcome_of
from distributed_eg.errors import InputError
from distributed_eg.masking import masked
from distributed_eg.types import AutoencoderKind, GateScore, OnTaskFailure, TransferRule

if TYPE_CHECKING:
    from distributed_eg.benchmarks.benchmark import Benchmark
    from distributed_eg.cli.display import Display
    from distributed_eg.runtime.messages import Observer, Progress


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The network that experts start from, and whose features tell tasks apart."""

    image_size: Annotated[int | None, optional("PIXELS")] = None
    """Side of the images in pixels; 64 for embedded, else 96."""
    arch: str = "efficientnet_lite0"
    """Backbone: efficientnet_lite0 or a torchvision classification model."""
    weights: Annotated[str | None, optional("NAME|FILE")] = None
    """Its weights: a torchvision weights name or the path of a state dict; the default ones otherwise."""
    random_weights: bool = False
    """Random weights instead, drawn from --seed."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Expert Gate: autoencoders, the gate, how experts start."""

    autoencoder: AutoencoderKind = "linear"
    """linear (closed form) or sgd (the paper's, trained by AdaGrad)."""
    latent_dim: int = 50
    """Hidden units of an autoencoder."""
    gate_score: GateScore = "shared"
    """shared (distances to classes under one covariance) or residual (the paper's reconstruction errors)."""
    rel_thresh: float = 0.7
    """Relatedness above which an expert learns without forgetting (the paper: 0.85, rare with linear)."""
    transfer: TransferRule = "threshold"
    """threshold (by --rel-thresh) or best (both ways are trained, and the better on the held-out part is kept)."""
    seed: int = 0
    """Seed of everything that is drawn."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How each expert trains."""

    epochs: int = 5
    """Epochs of each expert's training."""
    batch_size: int = 16
    """Mini-batch size of training."""
    lr: float = 1.5e-3
    """Learning rate of an expert's first epoch (SGD, momentum 0.9); it falls by the same amount with each."""
    threads: int = 1
    """Torch threads of every stage; another number gives other bytes."""
    on_task_failure: OnTaskFailure = "continue"
    """continue: train what does not need a failed task; stop: begin nothing new."""
    checkpoint_every_s: float = 60.0
    """Seconds of an expert's training that a lost worker may cost, and one epoch; 0 is every epoch."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where the run is kept, and what is said."""

    storage: Annotated[str | None, optional("RUN")] = None
    """Run directory, a path or pyarrow.fs URI, else runs/<benchmark>-<time>; the run that it holds is resumed."""
    append: bool = False
    """Add tasks to the run in --storage; labels and class ids must be new (--first-label, --first-class, --tasks)."""
    config: Annotated[str | None, optional("FILE.yaml")] = None
    """Options in YAML, under their names here; the command line wins. Each run keeps its own as config.yaml."""
    print_config: bool = False
    """Print the options as such a file, and do nothing else."""
    json: bool = False
    """Print one JSON object as the last line of stdout; what people read goes to stderr."""
    log_json: bool = False
    """Log every stage as JSON, an object a line, on stderr; with --json in place of what people read there."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command trains, how, and where."""

    data: BenchmarkOptions = field(default_factory=BenchmarkOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    cluster: WorkerOptions = field(default_factory=WorkerOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def check(self) -> None:
        """Refuse what is known to be wrong before anything heavy is loaded.

        Raises:
            InputError: a value cannot be used, or two options contradict each other.
        """
        training, model, output = self.training, self.model, self.output
        given.whole(training.epochs, "--epochs", 0)
        given.whole(training.batch_size, "--batch-size", 1)
        given.number(training.lr, "--lr", "be at least 0, and finite", lambda value: 0 <= value < math.inf)
        for name, value in (("storage", output.storage), ("weights", model.weights)):
            if value is not None:
                given.text(value, f"--{name}")
        if model.weights is not None and model.random_weights:
            raise InputError("--weights and --random-weights exclude each other: leave one of them out.")
        if output.append and output.storage is None:
            raise InputError("--append needs --storage, the run directory to add to.")
        if self.data.source is not None and model.image_size is not None:
            raise InputError("--image-size is not read where FILE.py:FUNCTION makes the images: leave it out.")
        self.data.check()


def run(options: Annotated[RunOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")] = RunOptions()) -> None:
    """Train a sequence of image tasks on worker actors, then route unseen images to the right expert."""
    from distributed_eg.cli.display import Display
    from distributed_eg.store import layout
    from distributed_eg.store.storage import Storage

    options.check()
    output = options.output
    if output.print_config:
        print(config_text(options), end="")
        return
    name = re.sub(r"[^\w+.-]+", "-", options.data.name)
    storage = output.storage or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if output.log_json:
        log_as_json(masked(storage))
    display = Display(to_stderr=output.json, quiet=output.json and output.log_json)
    if output.append and not Storage(storage).exists(layout.RUN):
        display.say(f"There is no run at {masked(storage)} yet: it begins here.")
    try:
        outcome = _train_and_evaluate(options, storage, display)
    except (KeyboardInterrupt, SystemExit):
        display.interrupted(storage)
        raise
    display.table(outcome)
    if output.json:
        print(json.dumps(asdict(outcome)))


def _train_and_evaluate(options: RunOptions, storage: str, display: Display) -> RunOutcome:
    import torch
    from avalanche.training.plugins import LRSchedulerPlugin

    from distributed_eg.strategy.model import ExpertGate
    from distributed_eg.strategy.strategy import ExpertGateStrategy

    model_options, method, training, append = options.model, options.method, options.training, options.output.append
    benchmark = options.data.make(model_options.image_size, method.seed)
    if append:
        _refuse_known(benchmark, storage)
    model = ExpertGate(
        shape=benchmark.shape,
        arch=model_options.arch,
        pretrained_flag=not model_options.random_weights,
        weights=model_options.weights,
        autoencoder=method.autoencoder,
        gate_score=method.gate_score,
        seed=method.seed,
    )
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=training.lr, momentum=0.9)
    # A constant rate leaves small tasks where the last few steps happen to.
    epochs = max(1, training.epochs)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / epochs, max(1, epochs - 1))
    # The authors' sample code: AdaGrad 1e-2, batch 12.
    paper: dict[str, Any] = {"ae_optimizer": "adagrad", "ae_lr": 1e-2, "ae_train_mb_size": 12, "ae_train_epochs": 20}
    with ExpertGateStrategy(
        model=model,
        optimizer=optimizer,
        plugins=[LRSchedulerPlugin(falling)],
        train_mb_size=training.batch_size,
        train_epochs=training.epochs,
        eval_mb_size=32,
        evaluator=silent_evaluator,
        ae_latent_dim=method.latent_dim,
        rel_thresh=method.rel_thresh,
        transfer=method.transfer,
        seed=method.seed,
        observer=_observer(options, storage, display),
        class_names={c: name for c, name in benchmark.class_names.items() if name is not None},
        transform=benchmark.transform,
        cluster=options.cluster.cluster(
            storage,
            "append" if append else True,
            training.threads,
            on_task_failure=training.on_task_failure,
            checkpoint_every_s=training.checkpoint_every_s,
        ),
        **(paper if method.autoencoder == "sgd" else {}),
    ) as strategy:
        started = time.perf_counter()
        with display.training(dict(zip(benchmark.labels, benchmark.task_names, strict=True))):
            strategy.train(benchmark.scenario.streams["train"])
        trained = time.perf_counter()
        with display.evaluating():
            metrics = strategy.eval(benchmark.scenario.streams["test"])
        evaluated = time.perf_counter()
        return outcome_of(strategy, metrics, benchmark, trained - started, evaluated - trained)


def _observer(options: RunOptions, storage: str, display: Display) -> Observer:
    """Shows the progress, and leaves the options in the directory of a run that begins, once it is a run. Its own place
    is left out: another run by the same options is to lie elsewhere."""
    from distributed_eg.store import layout
    from distributed_eg.store.storage import Storage

    place = Storage(storage)
    begins = not options.output.append or not place.exists(layout.RUN)

    @cache
    def keep_options() -> None:
        if begins and not place.exists(layout.CONFIG):
            place.write(layout.CONFIG, config_text(options, left_out=("storage",)).encode())

    def observe(progress: Progress) -> None:
        keep_options()
        display.progress(progress)

    return observe


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
