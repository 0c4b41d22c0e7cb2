"""What crosses the border between driver and worker: frozen values, ids and references; never a live network."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from distributed_eg.config import ClusterConfig, MethodConfig
from distributed_eg.errors import ExpertGateError
from distributed_eg.runtime.shipping import Shipped
from distributed_eg.schedule.events import Cause, Stage
from distributed_eg.store.checkpoints import CheckpointSlot
from distributed_eg.store.records import AutoencoderRecord, Contest, RelatednessRecord, StatisticsRecord, TaskRecord
from distributed_eg.store.registry import ExpertRef, GateRef
from distributed_eg.store.storage import Artifact
from distributed_eg.types import TaskId, Transfer, TransferChoice


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker is made from.

    ``root`` ships the root network without its parameters, which are in the sealed file ``root_weights``; ``head`` is
    the name of its head, ``feature_layer`` and ``shape`` cut the backbone off it. ``run_id`` and ``generation``, the
    driver's number in the run's lease, name this driver's scratch folder on each node.
    """

    storage_uri: str = field(repr=False)
    """May hold secrets; ``cluster`` shows it without them."""
    run_id: str
    generation: int
    root: Shipped
    root_weights: Artifact
    head: str
    feature_layer: str
    shape: tuple[int, int, int]
    method: MethodConfig
    cluster: ClusterConfig
    device: str | None
    """None: the GPU that the worker was given, else the CPU."""

    @property
    def scratch_folder(self) -> Path:
        """This driver's folder for features, on whichever node it is asked for."""
        return self.scratch_of_run / f"{self.generation:05d}"

    @property
    def scratch_of_run(self) -> Path:
        """The folder that holds those of all the run's drivers."""
        return Path(self.cluster.scratch or tempfile.gettempdir()) / f"distributed-eg-{self.run_id}"


@dataclass(frozen=True)
class ExperienceInfo:
    """What a worker makes an experience again from, beside its data."""

    index: int
    stream: str
    attributes: dict[str, Any] = field(default_factory=dict)
    """``task_label``, ``task_labels``, ``classes_in_this_experience`` and their like, where the experience has them."""
    stream_indices: Sequence[int] | None = None
    """Of its stream's experiences, a range where that is no slice; None where the stream cannot tell how many."""
    added: dict[str, bytes] = field(default_factory=dict)
    """What else the user gave the experience, pickled."""
    left: dict[str, str] = field(default_factory=dict)
    """What else it has on the driver, and why a worker has not."""


@dataclass(frozen=True)
class TaskData:
    """One task's datasets, as they are shipped.

    ``gate_train`` and ``gate_valid`` have evaluation transforms, for the autoencoder; ``train`` is the same training
    part as the expert sees it; ``evaluations`` are what the expert is measured on while it trains.
    """

    gate_train: Any
    gate_valid: Any
    train: Any
    evaluations: tuple[tuple[ExperienceInfo, Any], ...] = ()


@dataclass(frozen=True)
class TaskInput:
    """One task of a stream, ready to be worked on: what arrived, and its data as they are shipped.

    ``key`` names its feature files: a number may be used again after a failure, for other data.
    """

    record: TaskRecord
    data: Shipped
    experience: ExperienceInfo
    key: str


@dataclass(frozen=True, slots=True)
class Epoch:
    """How far the training of a task's expert is: in which epoch, from 1, of how many, and the mean loss of the batches
    that were looked at last."""

    task: TaskId
    number: int
    total: int
    loss: float


@dataclass(frozen=True)
class ExpertJob:
    """What a trainer is given on the worker.

    ``network`` is the expert to train, as ``derive`` gives it once more, ``head`` the name of its head, ``teacher`` the
    parent's network where it learns without forgetting. ``is_stopping`` tells, between batches, whether the driver was
    told to stop, and ``tell`` is called now and then with how far it is. ``checkpoints`` is where its training is kept
    every ``checkpoint_every_s``; None: nowhere.
    """

    task: TaskId
    label: int
    classes: tuple[int, ...]
    network: nn.Module
    derive: Callable[[], nn.Module]
    head: str
    teacher: nn.Module | None
    data: TaskData
    experience: ExperienceInfo
    method: MethodConfig
    device: torch.device
    is_stopping: Callable[[], bool] = bool
    tell: Callable[[Epoch], None] = lambda _: None
    checkpoints: CheckpointSlot | None = None
    checkpoint_every_s: float = 60.0


@dataclass(frozen=True)
class TrainedExpert:
    """What a trainer gives back: the network, the mean distillation term (None without LwF), its log, and how many
    checkpoints it wrote."""

    network: nn.Module
    distillation: float | None
    log: Any
    num_checkpoints: int = 0


class ExpertTrainer(Protocol):
    """Trains one task's expert on a worker; shipped once for all tasks of a call."""

    def train(self, job: ExpertJob) -> TrainedExpert:
        """Train ``job.network``; torch's seed and threads are set already."""


@dataclass(frozen=True)
class FeaturesRequest:
    """Extract a task's features; on the run's first task, compute the statistics too."""

    input: TaskInput
    with_statistics: bool


@dataclass(frozen=True)
class ReferenceRequest:
    """Statistics, and the root's autoencoder, from a reference dataset."""

    data: Shipped


@dataclass(frozen=True)
class AutoencoderRequest:
    """Fit a task's autoencoder; ``start`` is the earlier version's where it continues one."""

    input: TaskInput
    statistics: StatisticsRecord
    start: AutoencoderRecord | None = None


@dataclass(frozen=True)
class RelateRequest:
    """Relate a task to the candidates, None standing for the root.

    ``limits`` are the candidates', above which an image is strange to them, None where that is not known. ``summaries``
    are its own and those of the candidates, but for the root, where the gate goes by the shared score.
    """

    input: TaskInput
    statistics: StatisticsRecord
    own: Artifact
    candidates: tuple[tuple[TaskId | None, Artifact], ...]
    limits: tuple[float | None, ...] = ()
    summaries: tuple[Artifact, ...] = ()


@dataclass(frozen=True)
class ExpertRequest:
    """Train a task's expert; ``parent`` is None for the root."""

    input: TaskInput
    choice: TransferChoice
    parent: ExpertRef | None
    trainer: Shipped


@dataclass(frozen=True)
class GateAndExperts:
    """Where everything is that routing and predicting need."""

    gate: GateRef
    experts: dict[TaskId, ExpertRef]


@dataclass(frozen=True)
class EvaluatePart:
    """Samples [first, last) of an evaluation dataset, and for each the task that it belongs to, −1 where no expert
    knows it."""

    data: Shipped
    first: int
    last: int
    right_tasks: tuple[int, ...]


@dataclass(frozen=True)
class EvaluateRequest:
    """Route and predict parts of evaluation datasets, ``batch_size`` samples at a time.

    ``gate_and_experts`` ships one ``GateAndExperts`` for every request of a stream.
    """

    parts: tuple[EvaluatePart, ...]
    batch_size: int
    gate_and_experts: Shipped


@dataclass(frozen=True)
class DropRequest:
    """Remove a task's features from the node."""

    key: str


StageRequest: TypeAlias = FeaturesRequest | AutoencoderRequest | RelateRequest | ExpertRequest
Request: TypeAlias = StageRequest | ReferenceRequest | EvaluateRequest | DropRequest


@dataclass(frozen=True)
class ExpertResult:
    """A sealed expert, how it learnt, and the log of its training; ``contest`` tells where that was the better way."""

    expert: Artifact
    transfer: Transfer
    distillation: float | None
    log: Any
    contest: Contest | None = None
    num_checkpoints: int = 0


@dataclass(frozen=True)
class PartAnswer:
    """Answers for consecutive samples, one row a sample, on the CPU.

    ``log_probabilities`` (n, len(classes)) are over the dataset class ids ``classes``, those of all experts that
    answered. ``expert_predictions`` are the class ids that the right task's expert predicts, −1 where there is none;
    ``heard`` says whether it took part in the answer.
    """

    targets: Tensor
    tasks: Tensor
    confidences: Tensor
    strangeness: Tensor
    heard: Tensor
    classes: Tensor
    log_probabilities: Tensor
    expert_predictions: Tensor


@dataclass(frozen=True)
class EvaluateResult:
    """An answer for each part of a request, in their order."""

    parts: tuple[PartAnswer, ...]


Result: TypeAlias = StatisticsRecord | AutoencoderRecord | RelatednessRecord | ExpertResult | EvaluateResult | None


@dataclass(frozen=True)
class Done:
    """A call ended well."""

    result: Result
    seconds: float
    started_s: float
    """When it began by this node's clock, in seconds since 1970."""


@dataclass(frozen=True)
class Raised:
    """A call raised. ``error`` is one of ours; a foreign one is told as text, for it may not cross a process border."""

    error: ExpertGateError | None
    message: str
    traceback: str
    seconds: float
    cause: Cause = Cause.RAISED


State: TypeAlias = Literal["started", "training", "finished", "failed", "kept"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Something that a person who waits wants to know; "training": an expert has come as far as ``epoch``; "kept": an
    earlier driver left the stage's result. ``num_checkpoints`` were written by the attempt that finished."""

    task: TaskId
    label: int
    stage: Stage
    state: State
    worker: str
    seconds: float = 0.0
    parent: TaskId | None = None
    """Once RELATE is there: the task that the expert starts from, None for the root."""
    num_checkpoints: int = 0
    epoch: Epoch | None = None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation has routed its samples, and how long the driver waited for that."""

    num_samples: int
    seconds: float


Observer: TypeAlias = Callable[[Progress], None]
