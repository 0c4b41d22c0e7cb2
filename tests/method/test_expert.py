"""Experts: a copy of the parent with a fresh head, and outputs at the dataset's class ids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_eg.method.expert import continue_expert, derive_expert, freeze_norm, scatter_logits, train_as
from distributed_eg.method.head import find_head
from tests.method.helpers import digest, images, net, network_of

HEADS = {
    "resnet18": "fc",
    "mobilenet_v3_small": "classifier.3",
    "squeezenet1_1": "classifier.1",
    "densenet121": "classifier",
    "vit_b_16": "heads.head",
}
SIDES = {"vit_b_16": 224}


@pytest.mark.parametrize("arch", HEADS)
def test_expert_has_a_fresh_head_of_the_right_size_on_the_parent_s_body(arch: str) -> None:
    parent = network_of(arch)
    name = HEADS[arch]
    assert find_head(parent, (3, SIDES.get(arch, 40), SIDES.get(arch, 40))) == name
    expert = derive_expert(parent, name, 3, seed=1)
    side = SIDES.get(arch, 40)
    with torch.no_grad():
        assert expert(torch.zeros(2, 3, side, side)).shape == (2, 3)
    before, after = parent.state_dict(), expert.state_dict()
    assert list(before) == list(after)
    for key, tensor in before.items():
        if key.startswith(f"{name}."):
            assert after[key].shape == (3, *tensor.shape[1:])
            assert float(after[key].abs().max()) > 0
        else:
            assert torch.equal(after[key], tensor), key
            assert after[key].data_ptr() != tensor.data_ptr() or tensor.numel() == 0, f"{key} is shared"


def test_head_depends_on_the_seed_only() -> None:
    parent = net(0)
    first, again, other = (derive_expert(parent, "head", 4, seed).state_dict() for seed in (1, 1, 2))
    assert digest(first) == digest(again)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert torch.equal(first["body.0.weight"], other["body.0.weight"])


def test_head_is_initialised_as_torch_does() -> None:
    """Uniform in ±1/√inputs: neither zeros nor the parent's rows."""
    parent = net(0, num_classes=200)
    head = derive_expert(parent, "head", 200, seed=1).state_dict()["head.weight"]
    bound = 8**-0.5
    assert 0.95 * bound < float(head.abs().max()) <= bound
    # 1600 uniform draws: the mean's standard error is 0.577 · bound / 40.
    assert abs(float(head.mean())) < 4 * 0.577 * bound / 40
    assert not torch.equal(head, parent.state_dict()["head.weight"])


def test_deriving_changes_nothing_in_the_parent_and_all_of_the_expert_trains() -> None:
    parent = net(0).requires_grad_(False)
    before = digest(parent.state_dict())
    expert = derive_expert(parent, "head", 3, seed=1)
    assert all(parameter.requires_grad for parameter in expert.parameters())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(1)
    assert digest(parent.state_dict()) == before


def test_stored_weights_of_an_expert_fit_into_the_root_with_that_head() -> None:
    root = net(0)
    expert = derive_expert(root, "head", 3, seed=1)
    with torch.no_grad():
        expert.get_parameter("head.weight").mul_(2)
    loaded = derive_expert(root, "head", 3, seed=0)
    loaded.load_state_dict(expert.state_dict())
    assert torch.equal(loaded(images(2)), expert(images(2)))


def test_parameters_learn_where_the_user_lets_the_roots_learn_and_the_head_always() -> None:
    root = net(0)
    root.requires_grad_(False)
    root.body[3].requires_grad_(True)
    expert = derive_expert(net(1), "head", 3, seed=1)
    train_as(expert, root, "head")
    learning = [name for name, parameter in expert.named_parameters() if parameter.requires_grad]
    assert learning == ["body.3.weight", "body.3.bias", "head.weight", "head.bias"]


def test_a_continued_expert_keeps_its_rows() -> None:
    before = derive_expert(net(0), "head", 2, seed=1)
    after = continue_expert(before, "head", (3, 7), (1, 3, 5, 7), seed=2)
    fresh = derive_expert(before, "head", 4, seed=2)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(after.get_parameter(name)[[1, 3]], before.get_parameter(name))
        assert torch.equal(after.get_parameter(name)[[0, 2]], fresh.get_parameter(name)[[0, 2]])


def test_frozen_normalisation_keeps_its_statistics_and_nothing_else_freezes() -> None:
    network = net(dropout=0.5).train()
    freeze_norm(network)
    before = {name: tensor.clone() for name, tensor in network.body[1].named_buffers()}
    with torch.random.fork_rng(devices=[]):
        network(images(6)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.body[1].named_buffers())
    assert network.body[1].weight.grad is not None, "scale and shift still learn"
    assert network.drop.training
    assert network.training


def test_normalisation_moves_where_it_is_not_frozen() -> None:
    """The comparison that gives the test above its meaning."""
    network = net().train()
    before = network.body[1].running_mean.clone()
    network(images(6))
    assert not torch.equal(network.body[1].running_mean, before)


def local_and_scattered(classes: list[int], width: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient) of the same logits: local, and at their class ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(16, len(classes), generator=generator)
    targets = torch.randint(0, len(classes), (16,), generator=generator)
    results = []
    for scattered in (False, True):
        leaf = logits.clone().requires_grad_()
        output = scatter_logits(leaf, classes, width) if scattered else leaf
        loss = F.cross_entropy(output, torch.tensor(classes)[targets] if scattered else targets)
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    return results


def classes_of(count: int, width: int) -> list[int]:
    """``count`` class ids spread over ``width``, in ascending order."""
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(count))[:count]
    return chosen.sort().values.tolist()


@pytest.mark.parametrize(("count", "width"), [(2, 2), (2, 10), (2, 100)])
def test_scattered_cross_entropy_and_gradient_of_two_classes_equal_local_ones_bit_for_bit(
    count: int, width: int
) -> None:
    classes = classes_of(count, width)
    for seed in range(20):
        (loss, gradient), (scattered_loss, scattered_gradient) = local_and_scattered(classes, width, seed)
        assert torch.equal(loss, scattered_loss)
        assert torch.equal(gradient, scattered_gradient)


@pytest.mark.parametrize(("count", "width"), [(3, 30), (10, 100), (100, 1000)])
def test_scattered_cross_entropy_and_gradient_are_those_of_local_logits(count: int, width: int) -> None:
    """Whatever the order of a sum: a few float32 roundings of losses around 4 and gradients below 1/16."""
    for seed in range(5):
        (loss, gradient), (scattered_loss, scattered) = local_and_scattered(classes_of(count, width), width, seed)
        torch.testing.assert_close(scattered_loss, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(scattered, gradient, rtol=1e-5, atol=1e-8)


def test_scattered_logits_stand_at_their_class_ids() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = torch.full((2, 6), -torch.inf)
    expected[:, 4], expected[:, 1] = logits[:, 1], logits[:, 0]
    assert torch.equal(scatter_logits(logits, (1, 4), 6), expected)
    assert scatter_logits(torch.zeros(0, 2), (1, 4), 6).shape == (0, 6)
