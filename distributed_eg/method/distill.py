"""Learning without forgetting (Li & Hoiem, ECCV 2016): the parent's old head and answers steer the new expert."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distributed_eg.method.expert import logits_of


class Distillation:
    """Keeps the parent's old head beside a student's new one while the student trains.

    The student's layers stay what they are, and it answers with its new head alone: in each forward pass both heads'
    outputs go side by side through what follows the head, and the old one's stay here until ``loss`` is asked for.

    Args:
        student: the network in training; it has hooks of this until ``detach``.
        teacher: the parent's network; it is put in eval mode.
        head: name of both networks' head.
        weight: λ, 1 in Li & Hoiem.
        temp: temperature of the soft targets, 2 in the paper.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, head: str, *, weight: float, temp: float) -> None:
        self.teacher = teacher.eval()
        self.weight = weight
        self.temp = temp
        self.head = student.get_submodule(head)
        self.old_head = copy.deepcopy(teacher.get_submodule(head)).requires_grad_(True)
        self._num_new = len(self.head.get_parameter("weight"))
        self._old_logits: Tensor | None = None
        self._both: RemovableHandle | None = None
        # The first hook after the forward pass, so that others see the new head's outputs only.
        self._hooks = [
            student.register_forward_pre_hook(self._begin),
            student.register_forward_hook(self._split, prepend=True),
        ]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The old head's parameters, which train beside the student's."""
        return self.old_head.parameters()

    def loss(self, images: Tensor) -> Tensor:
        """λ · distillation loss of the student's last forward pass, which must have been on ``images``."""
        assert self._old_logits is not None, "the student has made no forward pass with gradients"
        with torch.no_grad():
            targets = logits_of(self.teacher, images)
        loss = self.weight * distillation_loss(self._old_logits, targets, self.temp)
        self._old_logits = None
        return loss

    def detach(self) -> None:
        """Leave the student."""
        for hook in self._hooks:
            hook.remove()
        self._end()

    def __getstate__(self) -> dict[str, object]:
        """Without the last pass's outputs: a student that is copied in training takes this along through its hooks."""
        return {**self.__dict__, "_old_logits": None}

    def _begin(self, _module: nn.Module, _inputs: object) -> None:
        self._end()  # of a pass that failed
        # The head's last hook, so that those of others see the new head's outputs only.
        self._both = self.head.register_forward_hook(self._side_by_side)

    def _end(self) -> None:
        if self._both is not None:
            self._both.remove()
            self._both = None

    def _side_by_side(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output, self.old_head.train(self.head.training)(*inputs)], dim=1)

    def _split(self, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        self._end()
        if torch.is_grad_enabled():
            self._old_logits = output[:, self._num_new :].float()
        return output[:, : self._num_new]


def distillation_loss(logits: Tensor, targets: Tensor, temp: float) -> Tensor:
    """Cross-entropy between the tempered answers of teacher (``targets``) and student (``logits``), both (n, classes)
    logits: equation 2 of Li & Hoiem. Its least value is the targets' entropy, so it is positive."""
    soft = torch.softmax(targets / temp, dim=1)
    return -(soft * F.log_softmax(logits / temp, dim=1)).sum(1).mean()
