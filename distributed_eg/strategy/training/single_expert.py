"""The network that a strategy's hooks see while an expert trains: its outputs stand for dataset class ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distributed_eg.method.expert import freeze_norm, logits_of, scatter_logits
from distributed_eg.method.gate import ABSENT_LOG_PROBABILITY


class SingleExpert(nn.Module):
    """The expert in training, as a strategy's hooks see it on a worker: ``strategy.model.expert``.

    Its outputs stand for dataset class ids: in training mode logits with −inf at other tasks' classes (cross-entropy
    and its gradient are those of local logits), in eval mode finite log-probabilities.
    """

    def __init__(self, expert: nn.Module, classes: tuple[int, ...], width: int, *, freeze_norm: bool) -> None:
        super().__init__()
        self.expert = expert
        self.classes = classes
        self.width = width
        self._freeze_norm = freeze_norm

    def train(self, mode: bool = True) -> SingleExpert:
        """As in torch; normalisation statistics stay frozen where the run says so."""
        super().train(mode)
        if mode and self._freeze_norm:
            freeze_norm(self.expert)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (n, width) for images (n, channels, height, width)."""
        logits = logits_of(self.expert, x)
        if self.training:
            return scatter_logits(logits, self.classes, self.width)
        output = logits.new_full((len(logits), self.width), ABSENT_LOG_PROBABILITY)
        output[:, list(self.classes)] = torch.log_softmax(logits, dim=1)
        return output
