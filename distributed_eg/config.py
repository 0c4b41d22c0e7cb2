"""What users set: one frozen dataclass per concern, checked when it is made."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from distributed_eg import given
from distributed_eg.errors import InputError
from distributed_eg.masking import masked
from distributed_eg.types import AutoencoderKind, GateScore, OnTaskFailure, TransferRule, Unknown

Engine = Literal["ray", "inline"]
Resume = Literal["append"] | bool
AutoencoderOptimizer = Literal["sgd", "adagrad", "adam"]

Rule = tuple[str, Callable[[float], bool]]
"""What a number must do, as words behind "it must", and as a test."""

_POSITIVE: Rule = ("be positive", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE: Rule = ("not be negative", lambda value: 0 <= value < math.inf)
_LEAST_SHARE = 0.0001
_CLUSTER_NUMBERS: dict[str, Rule] = {
    "cpus_per_worker": _NOT_NEGATIVE,
    "gpus_per_worker": _NOT_NEGATIVE,
    "startup_timeout_s": ("not be negative", lambda value: value >= 0),
    "stage_timeout_s": ("be positive, or None", lambda value: value > 0),
    "checkpoint_every_s": ("not be negative", lambda value: value >= 0),
}
"""Numbers of ``ClusterConfig``; an infinite time stands for no limit."""
_RAY_ONLY = ("address", "num_workers", "cpus_per_worker", "gpus_per_worker", "startup_timeout_s", "stage_timeout_s")
"""What says nothing to the engine "inline", which has one worker."""
_METHOD_NUMBERS: dict[str, Rule] = {
    "temp": _POSITIVE,
    "distillation_temp": _POSITIVE,
    "rel_thresh": ("be a number, such as the paper's 0.85", lambda value: not math.isnan(value)),
    "confidence_threshold": ("lie in (0, 1], or be None", lambda value: 0 < value <= 1),
    "unknown_quantile": ("lie in (0, 1]", lambda value: 0 < value <= 1),
    "distillation_weight": _NOT_NEGATIVE,
    "validation_fraction": ("lie between 0 and 1", lambda value: 0 < value < 1),
}
"""Numbers of ``MethodConfig``; an infinite ``rel_thresh`` stands for always or never learning without forgetting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where the stages run and where the run is kept."""

    engine: Engine = "ray"
    """``"ray"``: worker actors. ``"inline"``: the same stages in this process, without Ray."""
    address: str | None = None
    """A Ray cluster to attach to (host:port, or "auto"); else RAY_ADDRESS where set; else Ray is started on this
    machine, and stopped when the last strategy of this process that uses it is closed. Ray Client is refused."""
    num_workers: int | Literal["auto"] = "auto"
    """Worker actors. "auto": one per GPU share that the cluster has, else one per CPU share, at most one a task; nodes
    that join later bring more."""
    cpus_per_worker: float = 1
    gpus_per_worker: float | None = None
    """The GPU that each worker holds, or its part of one: 0.5 lets two workers share a card. None: 1 where the cluster
    has GPUs and ``device`` does not say otherwise, else 0."""
    threads: int = 1
    """Torch threads of every stage, the same in every engine: another number gives other bytes."""
    storage: str | os.PathLike[str] | None = None
    """Run directory: a local path or any pyarrow.fs URI (s3://…, gs://…) that all nodes see. None: a temporary folder
    that lives as long as the model. Better than in a URI are credentials in the environment; those in a URI are masked
    wherever it is shown."""
    scratch: str | os.PathLike[str] | None = None
    """Folder on each node for features while they are needed; made absolute here. None: the node's temporary folder."""
    max_resident_experts: int = 2
    """Experts that one process holds in memory at a time; the least recently used one goes first."""
    startup_timeout_s: float = 120
    """How long to wait for a cluster to answer; and, without any worker, for room that it has but that is taken."""
    resume: Resume = False
    """Go on with the run that ``storage`` holds, where it holds one. True: ``train`` is given the same stream again;
    what is sealed is kept, other settings or data are refused. "append": ``train`` is given what follows, and earlier
    tasks' data are not asked for; how experts train may differ from before, but backbone, method and threads may not.
    A call that was cut off is given again: what it had sealed is kept."""
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
        values: dict[str, object] = {
            "engine": given.word(self.engine, "ClusterConfig.engine", get_args(Engine)),
            "on_task_failure": given.word(
                self.on_task_failure, "ClusterConfig.on_task_failure", get_args(OnTaskFailure)
            ),
            "resume": _resume(self.resume),
        }
        read = {"storage": given.location, "scratch": given.path, "address": given.text}
        for name in (name for name in read if getattr(self, name) is not None):
            values[name] = read[name](getattr(self, name), f"ClusterConfig.{name}")
        if "scratch" in values:
            values["scratch"] = os.path.abspath(str(values["scratch"]))
        for name in ("num_workers", "threads", "max_resident_experts"):
            if not (name == "num_workers" and isinstance(self.num_workers, str) and self.num_workers == "auto"):
                values[name] = given.whole(getattr(self, name), f"ClusterConfig.{name}", least=1)
        for name, (rule, fits) in _CLUSTER_NUMBERS.items():
            if getattr(self, name) is not None or name not in ("gpus_per_worker", "stage_timeout_s"):
                values[name] = given.number(getattr(self, name), f"ClusterConfig.{name}", rule, fits)
        _settle(self, values)
        if self.engine == "inline":
            one = {field.name: (field.default,) for field in fields(self)} | {"num_workers": ("auto", 1)}
            if said := [name for name in _RAY_ONLY if getattr(self, name) not in one[name]]:
                raise InputError(
                    f"ClusterConfig(engine='inline') runs in this process and reads no {', '.join(said)}: leave it out."
                )
        shares = (self.cpus_per_worker, self.gpus_per_worker or 0)
        if any(0 < share < _LEAST_SHARE for share in shares) or shares[1] > 1:
            raise InputError(
                f"ClusterConfig has cpus_per_worker={shares[0]} and gpus_per_worker={shares[1]}; Ray gives no shares "
                f"below {_LEAST_SHARE}, and a worker computes on one GPU, or on a part of one."
            )
        if self.resume and self.storage is None:
            raise InputError(f"ClusterConfig(resume={self.resume!r}) needs storage=…, the run directory to go on with.")

    @property
    def way_on(self) -> str:
        """What is left to a run that an error ends, as a clause."""
        if self.storage is not None:
            return "the run can be resumed"
        return "without ClusterConfig(storage=…) what is sealed lives as long as the model, and no longer"

    def __repr__(self) -> str:
        """As any dataclass's, but without what a URI keeps secret."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = {name: masked(value) if isinstance(value, str) else value for name, value in values.items()}
        return f"ClusterConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _resume(value: object) -> Resume:
    if isinstance(value, str) and value != "append":
        raise InputError(f"ClusterConfig.resume is {given.shown(value)}; it must be True or False, or 'append'.")
    return "append" if isinstance(value, str) else given.flag(value, "ClusterConfig.resume")


def _settle(config: object, values: dict[str, object]) -> None:
    """Put checked values into a frozen dataclass that is being made."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


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
        values: dict[str, object] = {
            "kind": given.word(self.kind, "autoencoder", get_args(AutoencoderKind)),
            "optimizer": given.word(self.optimizer, "ae_optimizer", get_args(AutoencoderOptimizer)),
            "lr": given.number(self.lr, "ae_lr", *_POSITIVE),
        }
        for name in ("latent_dim", "epochs", "batch_size"):
            values[name] = given.whole(getattr(self, name), f"The autoencoder's {name}", least=1)
        _settle(self, values)


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """The method's numbers, the same for every task of a run."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    """How each task's autoencoder is made."""
    gate_score: GateScore = "residual"
    """``"residual"``: the paper's reconstruction errors. ``"shared"``: distances to classes under one covariance."""
    temp: float | None = None
    """Temperature of the gate's softmax over errors, positive; the paper's is 2. None: fitted to held-out images."""
    unknown: Unknown = "expert"
    """Who answers for an image that is stranger than ``unknown_quantile`` of every task's held-out images."""
    unknown_quantile: float = 0.99
    """Share of its own held-out images, in (0, 1], that a task is to know."""
    rel_thresh: float = 0.85
    """Relatedness, at most 1, above which an expert learns without forgetting from its parent; the paper's 0.85."""
    confidence_threshold: float | None = None
    """Experts that are at least this confident, in (0, 1], answer together. None: the best alone, as in the paper."""
    transfer: TransferRule = "threshold"
    """``"threshold"``: an expert learns by ``rel_thresh``. ``"best"``: both ways, and the better on the held-out part
    is kept."""
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
        values: dict[str, object] = {
            "freeze_norm": given.flag(self.freeze_norm, "freeze_norm"),
            "feature_batch_size": given.whole(self.feature_batch_size, "feature_batch_size", least=1),
            "seed": given.seed(self.seed),
            "gate_score": given.word(self.gate_score, "gate_score", get_args(GateScore)),
            "unknown": given.word(self.unknown, "unknown", get_args(Unknown)),
            "transfer": given.word(self.transfer, "transfer", get_args(TransferRule)),
        }
        for name, (rule, fits) in _METHOD_NUMBERS.items():
            if name not in ("confidence_threshold", "temp") or getattr(self, name) is not None:
                values[name] = given.number(getattr(self, name), name, rule, fits)
        _settle(self, values)
