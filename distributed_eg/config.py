"""What users set: one frozen dataclass per concern, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distributed_eg.errors import InputError
from distributed_eg.types import AutoencoderKind, OnTaskFailure

Engine = Literal["ray", "inline"]
AutoencoderOptimizer = Literal["sgd", "adagrad", "adam"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where the stages run and where the run is kept."""

    engine: Engine = "ray"
    """``"ray"``: worker actors. ``"inline"``: the same stages in this process, without Ray."""
    address: str | None = None
    """A Ray cluster to attach to; else RAY_ADDRESS where set; else Ray is started on this machine and stopped at
    close()."""
    num_workers: int | Literal["auto"] = "auto"
    """Worker actors. "auto": one per GPU share that the cluster has, else one per CPU share, at most one a task; nodes
    that join later bring more."""
    cpus_per_worker: float = 1
    gpus_per_worker: float | None = None
    """GPUs (fractions allowed) that each worker holds. None: 1 where the cluster has GPUs, else 0."""
    threads: int = 1
    """Torch threads of every stage, the same in every engine: another number gives other bytes."""
    storage: str | None = None
    """Run directory: a local path or any pyarrow.fs URI (s3://…, gs://…) that all nodes see. None: a temporary folder
    that lives as long as the model."""
    scratch: str | None = None
    """Folder on each node for features while they are needed. None: the node's temporary folder."""
    max_resident_experts: int = 4
    """Experts that one process holds in memory at a time; the least recently used one goes first."""
    startup_timeout_s: float = 120
    """How long to wait, without any worker, for room that the cluster has but that is taken."""
    resume: bool = False
    """Go on with the run that ``storage`` holds, where it holds one: give ``train`` the same stream again. What is
    sealed is kept; other settings, data or another backbone are refused."""
    on_task_failure: OnTaskFailure = "continue"
    """``"continue"``: tasks that do not need a failed one are trained. ``"stop"``: what runs is finished, nothing new
    is begun. Either way ``train`` raises at the end, and the run can be resumed. A storage that does not take what is
    written stops the run in any case, for every task would fail by it."""
    stage_timeout_s: float | None = None
    """Longest that one stage of one task may take; its worker is ended then, and the stage tried once more. None: no
    limit, for only you know how long an expert trains."""
    checkpoint_every_s: float = 60
    """How much of an expert's training may be lost when its worker is: its state is kept in the run directory at the
    first end of an epoch after this time, and a retried expert goes on from there. 0: after every epoch. Longer where
    the storage is so slow that checkpoints would take more than a fiftieth of the time."""

    def __post_init__(self) -> None:
        if self.engine not in ("ray", "inline"):
            raise InputError(f"ClusterConfig.engine is {self.engine!r}; it must be 'ray' or 'inline'.")
        if self.on_task_failure not in ("continue", "stop"):
            raise InputError(
                f"ClusterConfig.on_task_failure is {self.on_task_failure!r}; it must be 'continue' or 'stop'."
            )
        if self.resume and self.storage is None:
            raise InputError("ClusterConfig(resume=True) needs storage=…, the run directory to go on with.")
        if self.engine == "inline" and (self.address is not None or self.num_workers not in ("auto", 1)):
            raise InputError("ClusterConfig(engine='inline') runs in this process: leave address and num_workers out.")
        for name in ("num_workers", "threads", "max_resident_experts"):
            value = getattr(self, name)
            if not (value == "auto" and name == "num_workers") and not (isinstance(value, int) and value >= 1):
                raise InputError(f"ClusterConfig.{name} is {value!r}; it must be at least 1.")
        if self.stage_timeout_s is not None and self.stage_timeout_s <= 0:
            raise InputError(f"ClusterConfig.stage_timeout_s is {self.stage_timeout_s}; it must be positive, or None.")
        for name in ("cpus_per_worker", "gpus_per_worker", "checkpoint_every_s"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"ClusterConfig.{name} is {value}; it must not be negative.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """How a task's autoencoder is made; ``lr``, ``epochs``, ``batch_size`` and ``optimizer`` are "sgd"'s only."""

    kind: AutoencoderKind = "sgd"
    """``"sgd"``: the paper's, trained by gradients. ``"linear"``: closed form."""
    latent_dim: int = 100
    """Hidden units, at least 1; the paper's 100."""
    lr: float = 1e-3
    """Learning rate, positive; the authors' sample code has 1e-2, with AdaGrad."""
    epochs: int = 2
    """Passes over the task's training features, at least 1; the authors' sample code has 100."""
    batch_size: int = 1
    """Samples a step, at least 1; the authors' sample code has 12."""
    optimizer: AutoencoderOptimizer = "sgd"
    """``"sgd"`` (momentum 0.9), ``"adagrad"`` (the authors' sample code) or ``"adam"``."""

    def __post_init__(self) -> None:
        if self.kind not in ("sgd", "linear"):
            raise InputError(f"autoencoder is {self.kind!r}; it must be 'sgd' or 'linear'.")
        if self.optimizer not in ("sgd", "adagrad", "adam"):
            raise InputError(f"ae_optimizer is {self.optimizer!r}; it must be 'sgd', 'adagrad' or 'adam'.")
        for name in ("latent_dim", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"The autoencoder's {name} is {getattr(self, name)}; it must be at least 1.")
        if not self.lr > 0:
            raise InputError(f"ae_lr is {self.lr}; it must be positive.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """The method's numbers, the same for every task of a run."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    """How each task's autoencoder is made."""
    temp: float = 2.0
    """Temperature of the gate's softmax over reconstruction errors, positive; the paper's 2."""
    rel_thresh: float = 0.85
    """Relatedness, at most 1, above which an expert learns without forgetting from its parent; the paper's 0.85."""
    confidence_threshold: float | None = None
    """Experts that are at least this confident, in (0, 1], answer together. None: the best alone, as in the paper."""
    distillation_weight: float = 1.0
    """Weight λ of the distillation term of learning without forgetting, not negative; 1 in Li & Hoiem."""
    distillation_temp: float = 2.0
    """Temperature of its soft targets, positive; 2 in the paper."""
    freeze_norm: bool = True
    """Whether an expert keeps the running statistics of its parent's batch normalisation."""
    validation_fraction: float = 0.1
    """Share of a task's samples, in (0, 1), that relatedness is measured on where no validation part is given."""
    feature_batch_size: int = 32
    """Images that pass the backbone at a time, at least 1."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        if not self.temp > 0 or not self.distillation_temp > 0:
            raise InputError(
                f"Temperatures must be positive; temp is {self.temp}, distillation_temp {self.distillation_temp}."
            )
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.")
        if self.confidence_threshold is not None and not 0 < self.confidence_threshold <= 1:
            raise InputError(f"confidence_threshold is {self.confidence_threshold}; it must lie in (0, 1], or be None.")
        if not self.distillation_weight >= 0:
            raise InputError(f"distillation_weight is {self.distillation_weight}; it must not be negative.")
        if math.isnan(self.rel_thresh):
            raise InputError("rel_thresh is nan; it must be a number, such as the paper's 0.85.")
        if self.feature_batch_size < 1:
            raise InputError(f"feature_batch_size is {self.feature_batch_size}; it must be at least 1.")
