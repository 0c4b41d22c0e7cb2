"""Learning without forgetting: the distillation term acts, on the right tensors, and leaves no trace."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_eg.method.distill import Distillation, distillation_loss
from distributed_eg.method.expert import derive_expert
from tests.method.helpers import digest, float64, images, net, network_of


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def cross_entropy(student: np.ndarray, teacher: np.ndarray, temp: float) -> float:
    """Equation 2 of Li & Hoiem, written out: −Σ_classes p_teacher · log p_student, averaged over samples."""
    return float(-(softmax(teacher / temp) * np.log(softmax(student / temp))).sum(1).mean())


def parent_and_student(num_new: int = 3) -> tuple[nn.Module, nn.Module]:
    """A parent of 5 classes and an expert of its own, whose body has already moved away from the parent's."""
    parent = net(1)
    student = derive_expert(parent, "head", num_new, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.startswith("body"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return parent, student


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temp", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_loss_equals_the_hand_computation(temp: float, weight: float) -> None:
    """The old head is the parent's, on the student's own body."""
    parent, student = parent_and_student()
    x = images(6)
    with torch.no_grad():
        targets = float64(parent(x))
        with_old_head = copy.deepcopy(student)
        with_old_head.head = copy.deepcopy(parent.head)
        answers = float64(with_old_head(x))
    assert np.abs(answers - targets).max() > 0.1, "the student has not moved: the test would show nothing"
    distillation = Distillation(student, parent, "head", weight=weight, temp=temp)
    student(x)
    loss = distillation.loss(x)
    # float32 logits of size 1 against float64.
    assert loss.item() == pytest.approx(weight * cross_entropy(answers, targets, temp), rel=1e-5)
    assert loss.item() > 0


def test_loss_of_a_student_that_still_is_the_parent_is_the_targets_entropy() -> None:
    """Its least value, above zero; and there the gradient is zero."""
    parent = net(1)
    student = derive_expert(parent, "head", 3, seed=2)
    distillation = Distillation(student, parent, "head", weight=1.0, temp=2.0)
    x = images(6)
    student(x)
    loss = distillation.loss(x)
    targets = softmax(float64(parent(x)) / 2)
    assert loss.item() == pytest.approx(float(-(targets * np.log(targets)).sum(1).mean()), rel=1e-5)
    loss.backward()
    # Differences of float32 probabilities, through weights of size 1.
    assert max(float(gradient.abs().max()) for gradient in gradients(student).values()) < 1e-6


def test_loss_function_agrees_with_torch_on_random_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 7, 4, generator=generator) * 4
    expected = F.cross_entropy(logits / 2, torch.softmax(targets / 2, 1))
    torch.testing.assert_close(distillation_loss(logits, targets, 2.0), expected, rtol=1e-5, atol=0)
    extreme = distillation_loss(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]), 2.0)
    assert bool(torch.isfinite(extreme)), "log of a softmax that rounds to zero"


def test_body_and_old_head_learn_from_the_term_and_the_teacher_does_not() -> None:
    parent, student = parent_and_student()
    x = images(6)
    before = digest(parent.state_dict())
    distillation = Distillation(student, parent, "head", weight=1.0, temp=2.0)
    new_head = student.get_submodule("head")
    student(x)
    distillation.loss(x).backward()
    old = list(distillation.parameters())
    assert len(old) == 2
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in old)
    assert float(student.body[0].weight.grad.abs().max()) > 0
    for parameter in distillation.head.parameters():
        assert parameter.grad is None or not bool(parameter.grad.any()), "the new head has no part in the term"
    optimizer = torch.optim.SGD([*student.parameters(), *old], lr=0.1)
    kept = [p.detach().clone() for p in old]
    optimizer.step()
    assert all(not torch.equal(p, before_step) for p, before_step in zip(old, kept, strict=True))
    assert digest(parent.state_dict()) == before
    assert all(p.grad is None for p in parent.parameters())
    assert new_head is student.get_submodule("head")


def test_teacher_answers_in_eval_mode_and_keeps_its_statistics() -> None:
    """Dropout and batch statistics would blur the targets; a parent that was left in training mode must not drift."""
    parent = net(1, dropout=0.5).train()
    student = derive_expert(parent, "head", 3, seed=2).eval()
    before = digest(parent.state_dict())
    distillation = Distillation(student, parent, "head", weight=1.0, temp=2.0)
    x = images(6)
    losses = []
    for _ in range(2):
        student(x)
        losses.append(distillation.loss(x).item())
    assert losses[0] == losses[1]
    assert digest(parent.state_dict()) == before


def test_teacher_s_head_steers_the_student() -> None:
    """Targets come from the teacher as it is, not from the old head that trains."""
    results = []
    for shift in (0.0, 2.0):
        parent, student = parent_and_student()
        distillation = Distillation(student, parent, "head", weight=1.0, temp=2.0)
        with torch.no_grad():
            parent.head.bias[0] += shift
        x = images(6)
        student(x)
        distillation.loss(x).backward()
        results.append(gradients(student)["body.0.weight"])
    assert not torch.allclose(results[0], results[1], rtol=0.01)


def test_the_new_task_s_gradient_is_unchanged_at_weight_zero() -> None:
    """The term is added to the cross-entropy on the new head, and nothing else of the training changes."""
    x, y = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    _, plain = parent_and_student()
    F.cross_entropy(plain(x), y).backward()
    parent, student = parent_and_student()
    distillation = Distillation(student, parent, "head", weight=0.0, temp=2.0)
    (F.cross_entropy(student(x), y) + distillation.loss(x)).backward()
    distillation.detach()
    with_term = gradients(student)
    assert list(with_term) == list(gradients(plain))
    for name, gradient in gradients(plain).items():
        # The two heads are one product more: float32 rounding.
        torch.testing.assert_close(with_term[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_keep_the_new_head_s_width_and_values(training: bool) -> None:
    parent, student = parent_and_student()
    plain = copy.deepcopy(student).train(training)
    Distillation(student, parent, "head", weight=1.0, temp=2.0)
    student.train(training)
    x = images(6)
    expected = plain(x)
    assert expected.shape == (6, 3)
    torch.testing.assert_close(student(x), expected)
    with torch.no_grad():
        assert student(x).shape == (6, 3)


def test_a_forward_pass_without_gradients_in_between_does_not_disturb() -> None:
    """A metric or a plugin may evaluate the model between the training forward pass and the loss."""
    parent, student = parent_and_student()
    distillation = Distillation(student, parent, "head", weight=1.0, temp=2.0)
    x = images(6)
    student(x)
    expected = distillation.loss(x).item()
    student(x)
    with torch.no_grad():
        student(images(2, seed=9))
    assert distillation.loss(x).item() == expected


@pytest.mark.parametrize("arch", ["linear", "conv"])
def test_detach_gives_the_single_head_back(arch: str) -> None:
    """Same names in the same order, same head object with what it learnt, no hook; the old head is gone."""
    parent = net(1) if arch == "linear" else copy.deepcopy(network_of("squeezenet1_1"))
    name = "head" if arch == "linear" else "classifier.1"
    student = derive_expert(parent, name, 3, seed=2)
    names, layers = list(student.state_dict()), list(student.named_modules())
    x = images(2) if arch == "linear" else images(2, shape=(3, 40, 40))
    before = student(x).detach()
    distillation = Distillation(student, parent, name, weight=1.0, temp=2.0)
    during = student(x).detach()
    assert list(student.state_dict()) == names, "the layers are the student's own all the time"
    assert list(student.named_modules()) == layers
    distillation.detach()
    assert list(student.state_dict()) == names
    assert torch.equal(student(x), before)
    torch.testing.assert_close(during, before)
    assert not any(module._forward_hooks for module in student.modules())


def test_what_the_new_head_learnt_stays_after_detach() -> None:
    parent, student = parent_and_student()
    distillation = Distillation(student, parent, "head", weight=1.0, temp=2.0)
    with torch.no_grad():
        distillation.head.weight.fill_(0.5)
    distillation.detach()
    assert bool((student.state_dict()["head.weight"] == 0.5).all())


def test_a_convolution_as_head() -> None:
    """SqueezeNet: what follows the head (ReLU, pooling) acts on both heads' outputs."""
    parent = copy.deepcopy(network_of("squeezenet1_1"))
    student = derive_expert(parent, "classifier.1", 3, seed=2)
    x = images(2, shape=(3, 40, 40))
    distillation = Distillation(student, parent, "classifier.1", weight=1.0, temp=2.0)
    output = student(x)
    assert output.shape == (2, 3)
    loss = distillation.loss(x)
    with torch.no_grad():
        targets = float64(parent(x))
    # The body is still the parent's, so the old head's answers are the targets.
    assert loss.item() == pytest.approx(cross_entropy(targets, targets, 2.0), rel=1e-5)
    with torch.no_grad():
        parent.get_parameter("classifier.1.bias").add_(torch.linspace(-1, 1, 1000))
    student(x)
    distillation.loss(x).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in distillation.parameters())


def test_the_parent_s_head_is_copied_not_shared() -> None:
    parent, student = parent_and_student()
    distillation = Distillation(student, parent, "head", weight=1.0, temp=2.0)
    with torch.no_grad():
        for parameter in distillation.parameters():
            parameter.add_(1)
    assert torch.equal(parent.state_dict()["head.weight"], net(1).state_dict()["head.weight"])


def test_a_copy_of_a_detached_student_stands_alone() -> None:
    parent, student = parent_and_student()
    distillation = Distillation(student, parent, "head", weight=1.0, temp=2.0)
    student(images(2))
    distillation.detach()
    twin = copy.deepcopy(student)
    assert not any(module._forward_hooks for module in twin.modules())
    assert torch.equal(twin(images(2)), student(images(2)))


def test_hooks_of_others_see_the_new_head_alone() -> None:
    """Whether they were there before or come while the student trains."""
    parent, student = parent_and_student()
    seen: list[tuple[int, ...]] = []

    def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.append(tuple(output.shape))

    student.get_submodule("head").register_forward_hook(note)
    student.register_forward_hook(note)
    Distillation(student, parent, "head", weight=1.0, temp=2.0)
    student.get_submodule("head").register_forward_hook(note)
    student.register_forward_hook(note)
    student(images(6))
    assert seen == [(6, 3)] * 4


def test_a_failed_pass_leaves_the_next_one_as_it_is() -> None:
    parent, student = parent_and_student()
    distillation = Distillation(student, parent, "head", weight=1.0, temp=2.0)
    with pytest.raises(RuntimeError, match="channels"):
        student(torch.zeros(2, 5, 12, 12))
    handle = student.get_submodule("head").register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        student(images(2))
    handle.remove()
    assert student(images(2)).shape == (2, 3)
    distillation.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
