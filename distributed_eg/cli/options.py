"""Options that several commands share: which tasks, and where the work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from distributed_eg import given
from distributed_eg.benchmarks import make_benchmark
from distributed_eg.benchmarks.names import parts_of_name
from distributed_eg.config import ClusterConfig, Engine, Resume
from distributed_eg.errors import InputError

if TYPE_CHECKING:
    from avalanche.training.plugins import EvaluationPlugin

    from distributed_eg.benchmarks import Benchmark
    from distributed_eg.strategy.strategy import ExpertGateStrategy


def optional(metavar: str) -> Any:
    """How the help shows an option that need not be given: by this word, and no default of None."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=lambda value: "" if value == "None" else f"({value})")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """A task sequence, or a part of one."""

    source: Annotated[tyro.conf.Positional[str | None], optional("[FILE.py:FUNCTION]")] = None
    """Your own tasks: a function without arguments that returns an Avalanche benchmark, or this package's."""
    benchmark: str = "embedded"
    """Task sequence: embedded (real images that come inside installed packages), split-mnist, … (`distributed-eg
    benchmarks` lists all); folder:PATH (image files, a folder a class), hf:PATH; permuted:NAME, rotated:NAME,
    pairs:NAME; or several, chained as in a+b+c."""
    data: Annotated[str | None, optional("DIR")] = None
    """Folder of torchvision's, MedMNIST's and the paper's datasets."""
    download: bool = False
    """Download a missing dataset into --data."""
    train_per_task: Annotated[int | None, optional("N")] = None
    """Training images a task; all there are, or 240 for embedded."""
    test_per_task: Annotated[int | None, optional("N")] = None
    """Test images a task; all there are, or 120 for embedded."""
    classes_per_task: Annotated[int | None, optional("N")] = None
    """Classes a task; 2, or 10 of more than 26, for split-…; otherwise a dataset is one task."""
    order_seed: Annotated[int | None, optional("N")] = None
    """Seed of an order in which a dataset's classes come; in their own where not given."""
    tasks: Annotated[tuple[int, ...] | None, optional("K...")] = None
    """Only the tasks at these positions, from 0; FILE.py:FUNCTION comes before them."""
    first_label: int = 0
    """Task label of the sequence's first task; the others follow. A run knows a task by its label."""
    first_class: int = 0
    """Class id of the sequence's first class; the others follow."""

    @property
    def name(self) -> str:
        """What a run over it is called where nobody says so."""
        return self.benchmark if self.source is None else PurePath(self.source.rpartition(":")[0]).stem

    def check(self) -> None:
        """Refuse what is known to be wrong before anything heavy is loaded.

        Raises:
            InputError: there is no such benchmark, a folder has no name, or is not there, or an option beside a
                benchmark of the user's own is not read.
        """
        if self.data is not None:
            given.text(self.data, "--data")
        parts_of_name(given.text(self.benchmark, "--benchmark"))
        if self.source is not None:
            unread = ["benchmark", "data", "download", "train_per_task", "test_per_task"]
            unread += ["classes_per_task", "order_seed"]
            default = BenchmarkOptions()
            said = [f"--{name.replace('_', '-')}" for name in unread if getattr(self, name) != getattr(default, name)]
            if said:
                raise InputError(f"{', '.join(said)} is not read where {self.source} makes the tasks: leave it out.")

    def make(self, image_size: int | None, seed: int) -> Benchmark:
        """The tasks; ``InputError`` where they cannot be had."""
        from distributed_eg.benchmarks.benchmark import part_of

        if self.source is not None:
            from distributed_eg.cli.own_benchmark import own_benchmark

            return part_of(own_benchmark(self.source), self.tasks, self.first_label, self.first_class)
        benchmark = make_benchmark(
            self.benchmark,
            data=self.data,
            download=self.download,
            image_size=image_size,
            train_per_task=self.train_per_task,
            test_per_task=self.test_per_task,
            seed=seed,
            classes_per_task=self.classes_per_task,
            order_seed=self.order_seed,
        )
        return part_of(benchmark, self.tasks, self.first_label, self.first_class)


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Where the work is done."""

    engine: Engine = "ray"
    """ray (worker actors) or inline (this process)."""
    address: Annotated[str | None, optional("ADDRESS")] = None
    """Ray cluster to attach to; else RAY_ADDRESS; else Ray is started here and stopped at the end."""
    num_workers: Annotated[int | Literal["auto"], tyro.conf.arg(metavar="N|auto")] = "auto"
    """Worker actors; auto is one per GPU, else one per CPU, and more when nodes join."""
    gpus_per_worker: Annotated[float | None, optional("SHARE")] = None
    """GPUs that each worker holds, fractions allowed."""

    def cluster(self, storage: str, resume: Resume, threads: int, **others: object) -> ClusterConfig:
        """The configuration; ``InputError`` where it cannot be used."""
        if self.address is not None:
            given.text(self.address, "--address")
        return ClusterConfig(
            engine=self.engine,
            address=self.address,
            num_workers=self.num_workers,
            gpus_per_worker=self.gpus_per_worker,
            threads=threads,
            storage=storage,
            resume=resume,
            **others,  # type: ignore[arg-type]
        )


def open_run(run: str, where: WorkerOptions) -> ExpertGateStrategy:
    """A strategy that asks the run at this place, as it was made.

    Raises:
        ExpertGateError: there is none, its network was a module of the user's own, or a file is damaged.
    """
    import torch

    from distributed_eg.store.registry import read_run_record
    from distributed_eg.store.storage import Storage
    from distributed_eg.strategy.model import ExpertGate
    from distributed_eg.strategy.strategy import ExpertGateStrategy

    record = read_run_record(Storage(run))
    model = ExpertGate.load(run)
    method = dict(record.method)
    autoencoder = dict(method.pop("autoencoder"))
    method.pop("gate_score", None)  # the model has it
    names = {"latent_dim": "ae_latent_dim"}
    if autoencoder.pop("kind") == "sgd":
        names |= {"lr": "ae_lr", "epochs": "ae_train_epochs", "batch_size": "ae_train_mb_size"}
        names |= {"optimizer": "ae_optimizer"}
    method |= {names[name]: value for name, value in autoencoder.items() if name in names}
    return ExpertGateStrategy(
        model=model,
        optimizer=torch.optim.SGD(model.expert.parameters(), lr=0.0),
        eval_mb_size=method.pop("feature_batch_size"),
        evaluator=silent_evaluator,
        cluster=where.cluster(run, "append", record.threads),
        **method,
    )


def silent_evaluator() -> EvaluationPlugin:
    """An evaluator without loggers: a command shows its own progress."""
    import warnings

    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        return EvaluationPlugin()


def folder_name(class_name: str) -> str:
    """What a folder of a class's images is called."""
    return class_name.replace("/", "-").strip()
