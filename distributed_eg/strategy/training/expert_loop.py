"""Avalanche's training loop over one experience, as it runs in a worker on its copy of the user's strategy."""

from __future__ import annotations

from collections.abc import Sequence, Sized

from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from distributed_eg.errors import HookError, InputError
from distributed_eg.runtime.worker.contract import conform, conform_targets
from distributed_eg.strategy.avalanche_types import Template
from distributed_eg.strategy.training import losses
from distributed_eg.strategy.training.checkpoint import Checkpointing
from distributed_eg.strategy.training.single_expert import SingleExpert


class ExpertLoop(Template):
    """The part of the strategy that trains one expert: epochs that go on from a checkpoint, losses over its classes."""

    _checkpointing: Checkpointing | None = None
    """None on the driver."""

    def train_expert(
        self,
        model: SingleExpert,
        experience: CLExperience,
        evaluations: Sequence[CLExperience],
        loader_args: dict[str, object],
    ) -> None:
        """Avalanche's training loop over one experience; called on a worker, on that worker's copy.

        Raises:
            InputError: the criterion's weights are not over all classes.
        """
        model.width = max(model.width, losses.check_weights(self._criterion, model.classes))
        streams: dict[str, list[CLExperience]] = {}  # together, as ``eval`` wants them
        for measured in evaluations if self.eval_every > -1 else ():
            streams.setdefault(measured.origin_stream.name, []).append(measured)
        super().train([experience], eval_streams=list(streams.values()), **loader_args)

    def _train_exp(self, experience: CLExperience, eval_streams: object = None, **kwargs: object) -> None:
        """Avalanche's loop over the epochs, from where a checkpoint left off; on a worker only."""
        run = self._checkpointing
        for epoch in range(self.train_epochs)[0 if run is None else run.begin() :]:
            self._before_training_epoch(**kwargs)
            if self._stop_training:
                self._stop_training = False
                break
            self.training_epoch(**kwargs)
            self._after_training_epoch(**kwargs)
            if run is not None:
                run.epoch_ended(epoch + 1)

    def training_epoch(self, **kwargs: object) -> None:
        """Avalanche's loop over the batches of an epoch.

        Raises:
            HookError: the loader ended early, as it does where a dataset raises ``StopIteration``.
        """
        first = self.clock.train_epoch_iterations
        super().training_epoch(**kwargs)
        expected, done = _num_batches(self.dataloader), self.clock.train_epoch_iterations - first
        if expected is not None and done < expected and not self._stop_training:
            raise HookError(
                f"The data loader ended after {done} of {expected} batches: the dataset, a transform or the collate "
                "function raised StopIteration, which ends a loop without a word."
            )

    def _unpack_minibatch(self) -> None:
        """Avalanche's, for batches by the contract; what follows images and targets may be no tensor.

        Raises:
            InputError: the batch holds no images and targets.
        """
        try:
            batch = conform(self.mbatch, "soft" if self.is_training else "ids")
        except InputError as error:
            where = f"batch {self.clock.train_epoch_iterations} of a training" if self.is_training else "an evaluation"
            raise InputError(f"The data of {where} epoch cannot be used: {error}.") from None
        self.mbatch = [part.to(self.device, non_blocking=True) if isinstance(part, Tensor) else part for part in batch]

    def criterion(self) -> Tensor:
        """Loss of the current mini-batch; a criterion that is no plain cross-entropy gets local logits and targets, and
        so does any criterion where targets are soft.

        Raises:
            InputError: it is not one number, or the targets are none for this criterion or task.
        """
        model, criterion, targets = self.model, self._criterion, self.mb_y
        classes = model.classes if isinstance(model, SingleExpert) and self.is_training else None
        if classes is not None:
            targets = conform_targets(targets, soft=True)  # a plugin may have changed them
        losses.check_targets(criterion, targets, classes)
        if classes is not None and (targets.is_floating_point() or not losses.takes_infinities(criterion)):
            return losses.one_number(losses.local_loss(criterion, self.mb_output, targets, classes))
        if self.is_training:
            return losses.one_number(criterion(self.mb_output, targets))
        output = losses.widened(criterion, self.mb_output)
        device = losses.device_of(criterion, output.device)  # its weights lie where the user has them
        return losses.one_number(criterion(output.to(device), targets.to(device)))


def _num_batches(loader: object) -> int | None:
    """How many batches a loader gives, by samplers of torch's own; None: by a user's, which may give fewer."""
    if isinstance(loader, DataLoader):
        own = type(loader.batch_sampler) is BatchSampler
        return len(loader) if own and isinstance(loader.sampler, RandomSampler | SequentialSampler) else None
    users = getattr(loader, "loader_kwargs", ("sampler",))
    return len(loader) if isinstance(loader, Sized) and {"sampler", "batch_sampler"}.isdisjoint(users) else None
