"""The stages: what a worker does for a task. Each takes a request and returns a small record; results are sealed."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import nn

from distributed_eg.config import AutoencoderConfig, MethodConfig
from distributed_eg.errors import DivergedError
from distributed_eg.method.autoencoder import AutoencoderStack, fit_autoencoder, relatedness_unit, stack_autoencoders
from distributed_eg.method.calibration import hold_out, quantiles_of
from distributed_eg.method.expert import continue_expert, derive_expert, logits_of, train_as
from distributed_eg.method.relatedness import TaskErrors, choose_transfer
from distributed_eg.method.shared_score import SharedStack
from distributed_eg.method.standardize import compute_statistics
from distributed_eg.method.summary import fit_summary
from distributed_eg.runtime import messages
from distributed_eg.runtime.determinism import reproducible, told_of
from distributed_eg.runtime.messages import ExpertJob, ExpertTrainer, TaskData
from distributed_eg.runtime.worker.context import WorkerContext
from distributed_eg.runtime.worker.reading import Reader
from distributed_eg.store.checkpoints import CheckpointSlot
from distributed_eg.store.features import FeatureFile, write_features
from distributed_eg.store.layout import task_weights
from distributed_eg.store.records import (
    AutoencoderRecord,
    CheckpointRecord,
    Contest,
    RelatednessRecord,
    RivalCheckpointRecord,
    StatisticsRecord,
    TaskRecord,
)
from distributed_eg.store.reference import save_statistics
from distributed_eg.store.registry import ExpertRef
from distributed_eg.store.storage import Artifact
from distributed_eg.store.weights import save_tensors
from distributed_eg.types import Transfer, TransferChoice, derive_seed

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 256
_SMALL_FIRST_TASK = 50
_HELD_OUT_BYTES = 32 * 2**20
"""Of directions of scatter, where held-out images are asked: a quarter of the gate's, for every task asks anew."""
_LEARNT_SHARE = 0.95
_RIVALS: dict[Transfer, Transfer] = {"lwf": "finetune", "finetune": "lwf"}
_ROOT_TASK = -1
"""Stands for the reference dataset where a seed asks for a task's number."""


def extract_features(context: WorkerContext, request: messages.FeaturesRequest) -> StatisticsRecord | None:
    """Images through the backbone, once; on the run's first task the standardization statistics too."""
    task_input = request.input
    data: TaskData = task_input.data.load(context.fetch)
    num_train = context.extract(task_input, data.gate_train, "train")
    context.extract(task_input, data.gate_valid, "valid")
    if not request.with_statistics:
        return None
    if num_train < _SMALL_FIRST_TASK:
        logger.warning(
            "The first task has only %d training images, and its features set the standardization of the whole "
            "run; give reference= a larger dataset, or begin with a larger task.",
            num_train,
        )
    statistics = compute_statistics(FeatureFile(context.scratch_file(task_input.key, "train")).blocks(_BLOCK_ROWS))
    return StatisticsRecord(save_statistics(context.storage, statistics), statistics.num_samples)


def fit_reference(context: WorkerContext, request: messages.ReferenceRequest) -> StatisticsRecord:
    """Statistics of a reference dataset, and the autoencoder that makes the pretrained root a candidate."""
    reader = Reader(request.data.load(context.fetch), "the reference dataset", labels="any")
    path = context.scratch_file("reference", "train")
    what = "the reference dataset"
    batches = ((context.features(x, what), torch.zeros(len(x), dtype=torch.int64)) for x, _ in context.batches(reader))
    write_features(path, batches)
    statistics = compute_statistics(FeatureFile(path).blocks(_BLOCK_ROWS)).to(context.device)
    method = context.setup.method
    seed = derive_seed(method.seed, _ROOT_TASK, "autoencoder")
    autoencoder = fit_autoencoder(method.autoencoder, FeatureFile(path, statistics, context.device), seed)
    path.unlink()
    root = save_tensors(context.storage, "root-autoencoder", autoencoder.tensors())
    return StatisticsRecord(save_statistics(context.storage, statistics), statistics.num_samples, root)


def fit_task_autoencoder(context: WorkerContext, request: messages.AutoencoderRequest) -> AutoencoderRecord:
    """Fit and seal a task's autoencoder; its training features are not needed any more."""
    task, config = request.input.record.task, context.setup.method.autoencoder
    features = context.feature_file(request.input, "train", request.statistics)
    seed = derive_seed(context.setup.method.seed, task, "autoencoder")
    before = request.start
    start = None if before is None else context.reader.autoencoder(config.kind, before.artifact).to(context.device)
    autoencoder = fit_autoencoder(config, features, seed, start=start)
    artifact = save_tensors(context.storage, task_weights(task, "autoencoder"), autoencoder.tensors())
    num_samples = len(features) + (0 if before is None else before.num_samples)
    summary = None
    if context.setup.method.gate_score == "shared":
        known = None if before is None or before.summary is None else context.reader.summaries([before.summary])[0]
        fitted = fit_summary(features.blocks, features.classes, start=known and known.to(context.device))
        summary = save_tensors(context.storage, task_weights(task, "summary"), fitted.tensors())
    held_out = context.feature_file(request.input, "valid", request.statistics)
    _warn_of_few(request.input.record, len(held_out), context.setup.method)
    quantiles = quantiles_of(_residuals([stack_autoencoders([autoencoder])], held_out)[:, 0])
    context.drop_features(request.input.key, "train")
    label = request.input.record.label
    return AutoencoderRecord(task, label, config.kind, artifact, num_samples, summary, quantiles)


def _warn_of_few(record: TaskRecord, num_held_out: int, method: MethodConfig) -> None:
    """Say where so few images were held out that their highest error, and nothing more, is the limit of what is known:
    of n images as likely to be the highest as any other one, one more exceeds them with a probability of 1/(n + 1)."""
    share = 1 / (num_held_out + 1)
    if method.unknown == "expert" or share < 2 * (1 - method.unknown_quantile):
        return
    logger.warning(
        "Task %d (label %d): %d image(s) were held out to tell what is strange to it, so that %.0f %% of its own "
        "images or more will count as unknown, not %.1f %%, and unknown=%r has no expert answer them. Give it more "
        "images or a larger validation part (validation_fraction), or ask for a lower unknown_quantile.",
        *(record.task, record.label, num_held_out, 100 * share, 100 * (1 - method.unknown_quantile), method.unknown),
    )


def relate_task(context: WorkerContext, request: messages.RelateRequest) -> RelatednessRecord:
    """Errors of every earlier autoencoder on a task's validation features, and the parent that follows."""
    task, method = request.input.record.task, context.setup.method
    kind = method.autoencoder.kind
    features = context.feature_file(request.input, "valid", request.statistics)
    artifacts = [artifact for _, artifact in request.candidates]
    stacks = [*context.reader.stacks(kind, [request.own]), *context.reader.stacks(kind, artifacts)]
    residuals, (own, *rest), variance = _validation_errors(stacks, features)
    candidates = {candidate: error for (candidate, _), error in zip(request.candidates, rest, strict=True)}
    of_tasks = [candidate is not None for candidate in candidates]
    # An earlier version of the task itself may be a parent, but is not there once this one is.
    others = [candidate not in request.input.record.versions for candidate in candidates if candidate is not None]
    unit = relatedness_unit(kind)
    choice = choose_transfer(task, TaskErrors(own, variance, candidates), unit, method.rel_thresh)
    if request.input.record.continues is not None:
        choice = TransferChoice(request.input.record.continues, "continue")
    _warn_if_unlearnt(request.input.record, own, variance, len(features), method.autoencoder)
    scored, distances = residuals[:, [True, *of_tasks]], None
    if request.summaries:
        shared = SharedStack(context.reader.summaries(request.summaries, _HELD_OUT_BYTES), _HELD_OUT_BYTES)
        scored = torch.cat([shared.errors(block) for block in features.blocks(_BLOCK_ROWS)])
        farther = iter((scored[:, 1:] - scored[:, :1]).double().mean(0).tolist())
        distances = tuple(next(farther) if is_task else None for is_task in of_tasks)
    table = hold_out(scored[:, 0], scored[:, 1:][:, others])
    held_out = save_tensors(context.storage, task_weights(task, "held-out"), table.tensors())
    limits = [
        None if c in request.input.record.versions else k for c, k in zip(candidates, request.limits, strict=True)
    ]
    asked = zip(residuals[:, 1:].T, limits, strict=True)
    shares = tuple(None if limit is None else float((e <= limit).double().mean()) for e, limit in asked)
    context.drop_features(request.input.key, "valid")
    errors = tuple(candidates.values())
    return RelatednessRecord(task, choice, own, variance, unit, tuple(candidates), errors, held_out, distances, shares)


def _warn_if_unlearnt(
    record: TaskRecord, own: float, variance: float, num_images: int, config: AutoencoderConfig
) -> None:
    """Say where a task's own autoencoder tells little of its validation images, and what helps in this run."""
    if own <= _LEARNT_SHARE * variance:
        return
    what = "The relatedness of task %d (label %d) means little: "
    if variance == 0:
        says = "its validation part holds %d image(s) without any difference. Give it a larger "
        says += "one, by validation_fraction or in a validation stream."
        logger.warning(what + says, record.task, record.label, num_images)
        return
    remedies = ["more training images of it", "another ae_latent_dim"]
    if config.kind == "sgd":
        remedies = ["autoencoder='linear'", "more ae_train_epochs", "a larger ae_lr"]
        remedies += ["ae_optimizer='adagrad'"] if config.optimizer == "sgd" else []
    logger.warning(
        what + "its autoencoder has hardly learnt, for its validation error %.4g is %.0f %% of the features' variance. "
        "Try %s or %s.",
        *(record.task, record.label, own, 100 * own / variance, ", ".join(remedies[:-1]), remedies[-1]),
    )


def train_expert(context: WorkerContext, request: messages.ExpertRequest) -> messages.ExpertResult:
    """Train a task's expert with the user's own strategy, from its parent, and seal it; where the better of both ways
    of transfer is wanted one after the other, each as if it was the only one.

    Raises:
        DivergedError: no way gave an expert whose weights are finite.
    """
    setup, task, way = context.setup, request.input.record.task, request.choice.transfer
    if setup.method.transfer != "best" or way not in _RIVALS:
        return _train_expert(context, request, CheckpointRecord)
    rival = replace(request, choice=replace(request.choice, transfer=_RIVALS[way]))
    seed = derive_seed(setup.method.seed, task, type(request).__name__)  # the stage's own
    results: list[messages.ExpertResult] = []
    faults: list[DivergedError] = []
    for asked, kind in ((request, CheckpointRecord), (rival, RivalCheckpointRecord)):
        try:
            with reproducible(seed, setup.cluster.threads, context.device):
                results.append(_train_expert(context, asked, kind))
        except DivergedError as error:
            faults.append(error.with_traceback(None))  # whose frames hold its network
    if not results:
        raise faults[0]
    for fault in faults:
        logger.warning("Of both ways of transfer one is left to task %d: %s", task, fault)
    right = {result.transfer: _held_out_accuracy(context, request.input, result.expert) for result in results}
    best = max(results, key=lambda result: right[result.transfer])  # the first of equals: the paper's rule decides
    for other in results:
        if other.expert.path != best.expert.path:
            context.storage.delete(other.expert.path)
    written = sum(result.num_checkpoints for result in results)
    return replace(best, contest=Contest(right.get("lwf"), right.get("finetune")), num_checkpoints=written)


def _held_out_accuracy(context: WorkerContext, task_input: messages.TaskInput, artifact: Artifact) -> float:
    """The share of a task's held-out images that a sealed expert is right about."""
    expert = context.reader.expert(ExpertRef(artifact, task_input.record.classes))
    data: TaskData = task_input.data.load(context.fetch)
    classes = torch.tensor(expert.classes, device=context.device)
    reader, right = Reader(data.gate_valid, f"task {task_input.record.task}"), []
    with torch.no_grad():
        for images, targets in context.batches(reader):
            logits = logits_of(expert.network, images.to(context.device))
            right.append((classes[logits.argmax(1)].cpu() == targets).double())
    return float(torch.cat(right).mean())


def _train_expert(
    context: WorkerContext, request: messages.ExpertRequest, kind: type[CheckpointRecord]
) -> messages.ExpertResult:
    arrived = request.input.record
    context.reader.release(but=request.parent)
    derive = partial(_derive, context, request)
    is_taught = request.choice.transfer == "lwf"
    network = derive().to(context.device)
    if not is_taught:  # its parent has given what it had to give
        context.reader.release()
    job = ExpertJob(
        task=arrived.task,
        label=arrived.label,
        classes=arrived.classes,
        network=network,
        derive=derive,
        head=context.setup.head,
        teacher=_parent(context, request).to(context.device) if is_taught else None,
        data=request.input.data.load(context.fetch),
        experience=request.input.experience,
        method=context.setup.method,
        device=context.device,
        is_stopping=context.stopping.is_set,
        tell=context.tell,
        checkpoints=CheckpointSlot(context.storage, arrived.task, _stage_key(context, request), kind),
        checkpoint_every_s=context.setup.cluster.checkpoint_every_s,
    )
    trainer: ExpertTrainer = request.trainer.load(context.fetch)
    trained = trainer.train(job)
    state = trained.network.state_dict()
    artifact = save_tensors(context.storage, task_weights(arrived.task, "expert"), state)
    context.reader.keep(ExpertRef(artifact, arrived.classes), state)  # a child may train here next
    way, written = request.choice.transfer, trained.num_checkpoints
    return messages.ExpertResult(artifact, way, trained.distillation, trained.log, num_checkpoints=written)


def _parent(context: WorkerContext, request: messages.ExpertRequest) -> nn.Module:
    """The network that an expert starts from."""
    return context.load_root() if request.parent is None else context.reader.expert(request.parent).network


def _derive(context: WorkerContext, request: messages.ExpertRequest) -> nn.Module:
    """An expert as it is before its training, where its parent is."""
    arrived, head, parent = request.input.record, context.setup.head, request.parent
    seed = derive_seed(context.setup.method.seed, arrived.task, "head")
    if request.choice.transfer == "continue" and parent is not None:
        network = continue_expert(_parent(context, request), head, parent.classes, arrived.classes, seed)
    else:
        network = derive_expert(_parent(context, request), head, len(arrived.classes), seed)
    train_as(network, context.root, head)
    return network


def _stage_key(context: WorkerContext, request: messages.ExpertRequest) -> str:
    """A hash of all that an expert is made from: only a stage with the same may go on from its checkpoint."""
    arrived, setup = request.input.record, context.setup
    parent = None if request.parent is None else request.parent.source
    made_from = {
        "task": arrived.task,
        "classes": arrived.classes,
        "choice": asdict(request.choice),
        "parent": parent.sha256 if isinstance(parent, Artifact) else parent,
        "method": asdict(setup.method),
        "threads": setup.cluster.threads,
        "device": told_of(context.device),
        "identity": arrived.identity or request.input.key,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def drop_features(context: WorkerContext, request: messages.DropRequest) -> None:
    """Remove what a task left in this node's scratch folder."""
    for part in ("train", "valid"):
        context.drop_features(request.key, part)


@torch.no_grad()
def _residuals(stacks: list[AutoencoderStack], features: FeatureFile) -> torch.Tensor:
    """Each row's error by each autoencoder."""
    blocks = features.blocks(_BLOCK_ROWS)
    return torch.cat([torch.cat([stack.errors(block) for stack in stacks], dim=1) for block in blocks])


@torch.no_grad()
def _validation_errors(
    stacks: list[AutoencoderStack], features: FeatureFile
) -> tuple[torch.Tensor, list[float], float]:
    """Each row's error by each autoencoder, on the CPU, their means over all rows, and the rows' mean squared distance
    to their mean."""
    rows = _residuals(stacks, features).cpu()
    mean = torch.stack([block.double().sum(0) for block in features.blocks(_BLOCK_ROWS)]).sum(0) / len(features)
    variance = 0.0
    for block in features.blocks(_BLOCK_ROWS):
        variance += float((block.double() - mean).square().sum())
    totals = (part.double().sum(0) for part in rows.split(_BLOCK_ROWS))
    errors = sum(totals, torch.zeros(rows.shape[1], dtype=torch.float64)) / len(features)
    return rows, errors.tolist(), variance / len(features)
