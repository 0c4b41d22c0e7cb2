"""Training one expert on a worker with the user's own strategy: Avalanche's loop, hooks, plugins and metrics."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training.plugins.clock import Clock
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from distributed_eg.errors import DivergedError, HookError, InputError, StoppedError
from distributed_eg.method.distill import Distillation
from distributed_eg.runtime.messages import Epoch, ExpertJob, TrainedExpert
from distributed_eg.runtime.worker.causes import ends_process, is_ours, users_error
from distributed_eg.strategy.avalanche_types import Plugin, Template
from distributed_eg.strategy.tasks.worker_experience import WorkerExperience
from distributed_eg.strategy.training.checkpoint import Checkpointing
from distributed_eg.strategy.training.expert_loop import ExpertLoop
from distributed_eg.strategy.training.packing import PackedStrategy, unpack
from distributed_eg.strategy.training.recording import RecordingLogger
from distributed_eg.strategy.training.single_expert import SingleExpert

logger = logging.getLogger(__name__)

_LOWER = "lower the learning rate, clip the gradients, or see whether the criterion's gradient is finite itself"
_TAME = 1e6
"""Above, outputs show a training that runs away, even if they are finite still."""
_READ_TOGETHER = 16
"""Batches whose losses are read together: each reading waits for the card."""


@dataclass(frozen=True)
class StrategyTrainer:
    """Trains experts with a packed strategy; ``loader_args`` are what the user gave to ``train``."""

    packed: PackedStrategy
    loader_args: dict[str, object]

    def train(self, job: ExpertJob) -> TrainedExpert:
        """Run the strategy's training loop over one experience.

        Raises:
            DivergedError: the loss, or a weight, is not finite.
            HookError: the user's code raised: a dataset, a plugin, a metric, a criterion, a method.
            InputError: a batch cannot be used, or no optimizer step was taken.
        """
        width = max(job.classes) + 1
        model = SingleExpert(job.network, job.classes, width, freeze_norm=job.method.freeze_norm)
        # Its clock starts at 0: how many iterations the tasks before it take may not be known yet, and plugins that
        # remember would look for what they kept of those.
        strategy, recorder = unpack(self.packed, model, job.network, Clock())
        try:
            return self._train(job, model, strategy, recorder)
        finally:
            # Plugins, loops and schedulers refer to each other: what was trained would stay until that is collected.
            for part in (vars(strategy).get("optimizer"), strategy):
                vars(part).clear()
            job.network.zero_grad(set_to_none=True)

    def _train(
        self, job: ExpertJob, model: SingleExpert, strategy: ExpertLoop, recorder: RecordingLogger
    ) -> TrainedExpert:
        recorder.evaluations = {(i.stream, i.index): at for at, (i, _) in enumerate(job.data.evaluations)}
        distillation = _begin_distillation(job, strategy.optimizer)
        strategy.optimizer.state.clear()
        rules = _ExpertRules(job, distillation, strategy._criterion, strategy.train_epochs)
        strategy.plugins = [rules, *strategy.plugins]
        if job.checkpoints is not None:
            strategy._checkpointing = Checkpointing(job.checkpoints, job, strategy, recorder)
        strategy.device = job.device
        if isinstance(strategy._criterion, nn.Module):
            strategy._criterion.to(job.device)
        counting = register_optimizer_step_post_hook(rules.count_step)
        try:
            with warnings.catch_warnings():
                # A scheduler misses the mark that it set on the driver's optimizer; the order of steps is right.
                warnings.filterwarnings("ignore", message="Seems like `optimizer.step")
                strategy.train_expert(
                    model,
                    WorkerExperience(job.experience, job.data.train),
                    [WorkerExperience(info, dataset) for info, dataset in job.data.evaluations],
                    self.loader_args,
                )
        except BaseException as error:
            if is_ours(error) or ends_process(error):
                raise
            rules.require_finite()  # what raised may only be the first to stumble over it
            raise _hook_error(error, job, strategy._checkpointing) from error
        finally:
            counting.remove()
            if distillation is not None:
                distillation.detach()
        rules.require_finite()
        _require_finite(job, is_trained=rules.num_steps > 0)
        if not rules.num_steps and _is_untouched(job):
            _refuse_unlearnt(job, strategy, self.loader_args)
        written = 0 if strategy._checkpointing is None else strategy._checkpointing.num_written
        return TrainedExpert(job.network, rules.mean_distillation, recorder.records, written)


@dataclass(frozen=True)
class _Batch:
    """What is known of a batch that has been computed; tensors are read later, and lie where they were computed."""

    loss: Tensor
    has_tame_outputs: Tensor
    epoch: int
    place: int
    """Within its epoch."""
    rates: tuple[float, ...]


class _ExpertRules(Plugin):
    """The method's own part of the loop: the distillation term, and no loss that is not finite."""

    def __init__(self, job: ExpertJob, distillation: Distillation | None, criterion: object, num_epochs: int) -> None:
        super().__init__()
        self._job = job
        self._distillation = distillation
        self._criterion = getattr(criterion, "__name__", type(criterion).__name__)
        self._total = torch.zeros((), dtype=torch.float64)
        self._count = 0
        self._classes = torch.tensor(job.classes, device=job.device)
        self._unread: list[_Batch] = []
        self._num_epochs = num_epochs
        self.num_steps = 0
        """Steps of an optimizer that holds parameters of the expert with a gradient. An ``optimizer_step`` or
        ``backward`` of the user's own counts as one: what it does is theirs to decide."""

    def count_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Told of every step of every torch optimizer, whoever made it."""
        own = {id(parameter) for parameter in self._job.network.parameters() if parameter.grad is not None}
        self.num_steps += any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    @property
    def mean_distillation(self) -> float | None:
        """Mean distillation term over the iterations; None without LwF."""
        return None if self._distillation is None else float(self._total) / max(1, self._count)

    def state_dict(self) -> dict[str, Any]:
        """The running totals, and the old head, which learns, too."""
        old_head = {} if self._distillation is None else self._distillation.old_head.state_dict()
        return {"total": float(self._total), "count": self._count, "steps": self.num_steps, "old head": old_head}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from those."""
        self._total = torch.tensor(state["total"], dtype=torch.float64)
        self._count, self.num_steps = int(state["count"]), int(state["steps"])
        if self._distillation is not None:
            self._distillation.old_head.load_state_dict(state["old head"])

    def before_backward(self, strategy: Template, *_: object, **__: object) -> None:
        """Add the distillation term, as Avalanche's own LwF plugin does."""
        if self._distillation is not None:
            term = self._distillation.loss(strategy.mb_x)
            strategy.loss = strategy.loss + term
            self._total = self._total.to(term.device) + term.detach()  # read at the end: each reading waits for a card
            self._count += 1

    def before_update(self, strategy: Template, *_: object, **__: object) -> None:
        """Refuse to step on losses that are not finite, or once the driver was told to stop."""
        kind = type(strategy)
        self.num_steps += (kind.optimizer_step, kind.backward) != (ExpertLoop.optimizer_step, ExpertLoop.backward)
        if self._job.is_stopping():
            raise StoppedError(f"Task {self._job.task} ended early: its driver was told to stop.")
        outputs, clock = strategy.mb_output, strategy.clock
        loss, is_tame = strategy.loss.detach().sum(), torch.tensor(False)
        if isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] > max(self._job.classes):
            is_tame = (outputs.detach().index_select(1, self._classes).abs() < _TAME).all()
        rates = tuple(float(group["lr"]) for group in strategy.optimizer.param_groups)
        place = clock.train_epoch_iterations
        self._unread.append(_Batch(loss, is_tame, clock.train_exp_epochs, place, rates))
        if len(self._unread) == _READ_TOGETHER:
            self.require_finite()

    def after_training_epoch(self, *_: object, **__: object) -> None:
        """No checkpoint of a training that diverged."""
        self.require_finite()

    def require_finite(self) -> None:
        """Read the losses of the batches since the last reading, and tell of them.

        Raises:
            DivergedError: one is not finite.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        losses = torch.stack([batch.loss for batch in unread]).tolist()
        for batch, loss in zip(unread, losses, strict=True):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"The loss of task {self._job.task} (label {self._job.label}) is {loss} in epoch {batch.epoch}, "
                    f"batch {batch.place}, at learning rate "
                    f"{batch.rates[0] if len(batch.rates) == 1 else list(batch.rates)}; {self._advice(batch)}."
                )
        self._job.tell(Epoch(self._job.task, unread[-1].epoch + 1, self._num_epochs, sum(losses) / len(losses)))

    def _advice(self, batch: _Batch) -> str:
        """What to do about a loss that is not finite, by what it was made of."""
        if batch.has_tame_outputs:
            makers = [f"the criterion {self._criterion}"]
            makers += ["the distillation term"] if self._distillation is not None else []
            return (
                f"the network's outputs are finite, so it comes from {' or '.join(makers)}, or from what changes the "
                "loss after it: look there, whatever the learning rate"
            )
        if batch.epoch == batch.place == 0:
            return "no step was taken yet: look for extreme values in the weights that it starts from, or in the images"
        return _LOWER


def _begin_distillation(job: ExpertJob, optimizer: torch.optim.Optimizer) -> Distillation | None:
    """Set LwF up where there is a teacher: the old head trains in the parameter group of the head that it stands
    beside."""
    if job.teacher is None:
        return None
    head = next(job.network.get_submodule(job.head).parameters())
    weight, temp = job.method.distillation_weight, job.method.distillation_temp
    distillation = Distillation(job.network, job.teacher, job.head, weight=weight, temp=temp)
    groups = optimizer.param_groups
    group = next((g for g in groups if any(p is head for p in g["params"])), groups[0])
    group["params"].extend(distillation.parameters())
    return distillation


def _hook_error(error: BaseException, job: ExpertJob, checkpointing: Checkpointing | None) -> HookError:
    note = ""
    if checkpointing is not None and (epochs := checkpointing.resumed_after):
        path = "" if job.checkpoints is None else job.checkpoints.path
        note = f"It went on from its checkpoint after {epochs} epochs; if that is why, delete {path!r}.\n"
    return users_error(error, f"Training the expert of task {job.task} (label {job.label})", note=note)


def _is_untouched(job: ExpertJob) -> bool:
    """Whether nobody moved a parameter, be it by hand."""
    pairs = zip(job.network.parameters(), job.derive().parameters(), strict=True)
    return all(torch.equal(after.cpu(), before.cpu()) for after, before in pairs)


def _refuse_unlearnt(job: ExpertJob, strategy: Template, loader_args: Mapping[str, object]) -> None:
    """An expert that learnt nothing is its parent with a random head: no answer, unless no epochs were asked for."""
    if strategy.train_epochs == 0:
        logger.warning("The expert of task %d (label %d) is not trained: train_epochs=0.", job.task, job.label)
        return
    raise InputError(
        f"The expert of task {job.task} (label {job.label}) learnt nothing: no optimizer step moved a parameter of it "
        f"in {strategy.train_epochs} epochs over {len(job.data.train)} training samples with train_mb_size="
        f"{strategy.train_mb_size} and {dict(loader_args)}. Likely causes: drop_last with fewer samples than a batch, "
        "a sampler that yields nothing, a plugin that stops training before its first step, a method of the loop that "
        "does nothing, or an optimizer that no longer holds the expert's parameters."
    )


def _require_finite(job: ExpertJob, *, is_trained: bool) -> None:
    for name, tensor in job.network.state_dict().items():
        # One pass without a copy; whatever is not finite shows in the least or the greatest value.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            says = f"The weights {name!r} of task {job.task} (label {job.label}) are not finite"
            if not is_trained:
                raise DivergedError(f"{says}, and it took no step: look at the weights that it starts from.")
            raise DivergedError(f"{says} after training; {_LOWER}.")
