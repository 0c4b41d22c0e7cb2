"""Avalanche's training loop over one experience, as it runs in a worker on its copy of the user's strategy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from torch import Tensor

from distributed_eg.strategy import checks
from distributed_eg.strategy.avalanche_types import Template
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
        """Avalanche's training loop over one experience; called on a worker, on that worker's copy."""
        weight = getattr(self._criterion, "weight", None)
        if isinstance(weight, Tensor):
            model.width = max(model.width, len(weight))
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

    def criterion(self) -> Tensor:
        """Loss of the current mini-batch; a criterion that is no plain cross-entropy gets local logits and targets.

        Raises:
            InputError: it is not one number.
        """
        model = self.model
        if isinstance(model, SingleExpert) and self.is_training and not checks.takes_infinities(self._criterion):
            classes = torch.tensor(model.classes, device=self.mb_y.device)
            loss = self._criterion(self.mb_output[:, classes], torch.searchsorted(classes, self.mb_y))
        else:
            loss = super().criterion()
        return checks.one_number(loss)
