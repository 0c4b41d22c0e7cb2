"""Learning without forgetting (Li & Hoiem, ECCV 2016): the parent's old head and answers steer the new expert."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_eg.method.expert import find_head, get_head, set_head


class Distillation:
    """Keeps the parent's old head beside a student's new one while the student trains.

    The student still answers with its new head alone; the old head's outputs of the last forward pass with gradients
    stay here until ``loss`` is asked for.

    Args:
        student: the network in training; changed in place until ``detach``.
        teacher: the parent's network, frozen; it is put in eval mode.
        weight: λ, 1 in Li & Hoiem.
        temp: temperature of the soft targets, 2 in the paper.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, weight: float, temp: float) -> None:
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight
        self.temp = temp
        self.head_name = find_head(student)
        self.head = get_head(student, self.head_name)
        self.old_head = copy.deepcopy(get_head(teacher, self.head_name)).requires_grad_(True)
        self._num_new = len(self.head.weight)
        self._old_logits: Tensor | None = None
        set_head(student, self.head_name, _TwoHeads(self.head, self.old_head))
        self._hook = student.register_forward_hook(self._split)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The old head's parameters, which train beside the student's."""
        return self.old_head.parameters()

    def loss(self, images: Tensor) -> Tensor:
        """λ · distillation loss of the student's last forward pass, which must have been on ``images``."""
        assert self._old_logits is not None, "the student has made no forward pass with gradients"
        with torch.no_grad():
            targets = self.teacher(images)
        loss = self.weight * distillation_loss(self._old_logits, targets, self.temp)
        self._old_logits = None
        return loss

    def detach(self) -> None:
        """Give the student its single head back."""
        self._hook.remove()
        set_head(self.student, self.head_name, self.head)

    def __getstate__(self) -> dict[str, object]:
        """Without the last pass's outputs: a student that is copied in training takes this along through its hook."""
        return {**self.__dict__, "_old_logits": None}

    def _split(self, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._old_logits = output[:, self._num_new :]
        return output[:, : self._num_new]


class _TwoHeads(nn.Module):
    """Both heads on the same input, outputs side by side, so that whatever follows the head acts on both."""

    def __init__(self, new: nn.Module, old: nn.Module) -> None:
        super().__init__()
        self.new = new
        self.old = old

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.new(inputs), self.old(inputs)], dim=1)


def distillation_loss(logits: Tensor, targets: Tensor, temp: float) -> Tensor:
    """Cross-entropy between the tempered answers of teacher (``targets``) and student (``logits``), both (n, classes)
    logits: equation 2 of Li & Hoiem. Its least value is the targets' entropy, so it is positive."""
    soft = torch.softmax(targets / temp, dim=1)
    return -(soft * F.log_softmax(logits / temp, dim=1)).sum(1).mean()
