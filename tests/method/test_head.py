"""Heads: found by what the network does, not by where a layer stands; fresh ones are of their kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_eg.errors import BackboneError
from distributed_eg.method.backbone import Backbone
from distributed_eg.method.expert import derive_expert, logits_of
from distributed_eg.method.head import find_head, new_head, require_copies, set_head
from tests.method.helpers import IMAGE, digest, images, net


@pytest.fixture(autouse=True)
def draws() -> Iterator[None]:
    """Networks here draw their weights from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        yield


class Cosine(nn.Module):
    """A head of somebody's own: rows and inputs of length 1, and a scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.scale = nn.Parameter(torch.tensor([16.0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))


class CosineLinear(nn.Linear):
    """The same as a kind of linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(x), F.normalize(self.weight))


class Layers(nn.Module):
    """Named layers and a forward pass over them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward_of = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward_of(self, x.flatten(2).mean(2))


def lin(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs)


FOUND: dict[str, Callable[[], nn.Module]] = {
    "defined first": lambda: Layers(lambda m, x: m.head(m.body(x)), head=lin(8, 8), body=lin(3, 8)),
    "before a layer that nobody calls": lambda: Layers(lambda m, x: m.head(x), head=lin(3, 4), projector=lin(4, 4)),
    "before a side task's layer, called after it": lambda: Layers(
        lambda m, x: (m.head(x), m.rotation(x))[0], head=lin(3, 4), rotation=lin(3, 4)
    ),
    "before what has no weights": lambda: Layers(lambda m, x: m.scale(m.head(x)) / 2, head=lin(3, 4), scale=nn.Tanh()),
    "inside another module": lambda: Layers(lambda m, x: m.a(x), a=nn.Sequential(nn.BatchNorm1d(3), lin(3, 4))),
    "of a network of convolutions with a linear gate": lambda: Layers(
        lambda m, x: m.head((x * m.gate(x).sigmoid())[:, :, None, None]).mean((2, 3)),
        head=nn.Conv2d(3, 4, 1),
        gate=lin(3, 3),
    ),
    "a cosine head": lambda: Layers(lambda m, x: m.head(m.body(x)), head=Cosine(8, 4), body=lin(3, 8)),
    "a kind of linear layer": lambda: Layers(lambda m, x: m.head(m.body(x)), head=CosineLinear(8, 4), body=lin(3, 8)),
    "without bias, of 2 classes": lambda: Layers(lambda m, x: m.head(x), head=nn.Linear(3, 2, bias=False)),
    "over positions": lambda: Layers(
        lambda m, x: m.head(x[:, None].expand(-1, 5, -1)).mean(1), head=lin(3, 4), other=lin(3, 4)
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_it_is_found_and_its_expert_answers_for_the_tasks_classes(what: str) -> None:
    network = FOUND[what]().eval()
    before = digest(network.state_dict())
    name = find_head(network, IMAGE)
    assert name.split(".")[0] in ("head", "a")
    expert = derive_expert(network, name, 5, seed=1).eval()
    assert expert(images(4)).shape == (4, 5)
    assert type(expert.get_submodule(name)) is type(network.get_submodule(name))
    assert digest(network.state_dict()) == before
    assert not any(module._forward_hooks for module in network.modules())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "normalisation behind it": (
        lambda: Layers(lambda m, x: m.norm(m.head(x)), head=lin(3, 4), norm=nn.BatchNorm1d(4)),
        r"no head that can be made anew .*tried: head",
    ),
    "a vector of classes behind it": (
        lambda: Layers(lambda m, x: m.head(x) + torch.zeros(4), head=lin(3, 4)),
        "no head that can be made anew",
    ),
    "two layers side by side": (
        lambda: Layers(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=lin(3, 4), b=lin(3, 4)),
        "no head that can be made anew",
    ),
    "none at all": (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), "no head .*none with a weight of a row a class"),
    "a tuple": (lambda: Layers(lambda m, x: (m.head(x), x), head=lin(3, 4)), "logits .*not tuple"),
    "a dict": (lambda: Layers(lambda m, x: {"logits": m.head(x)}, head=lin(3, 4)), "logits .*not dict"),
    "positions": (lambda: Layers(lambda m, x: m.head(x)[:, :, None], head=lin(3, 4)), r"not a tensor \(1, 4, 1\)"),
    "class ids": (lambda: Layers(lambda m, x: m.head(x).argmax(1), head=lin(3, 4)), r"not a tensor \(1,\)"),
    "a second argument": (
        lambda: Layers(lambda m, x: m.head(x, 0), head=lin(3, 4)),
        "cannot take images of shape .*positional argument",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_network_without_such_a_head_is_refused(what: str) -> None:
    make, message = REFUSED[what]
    network = make().train()
    with pytest.raises(BackboneError, match=message):
        find_head(network, IMAGE)
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_the_users_name_for_it() -> None:
    network = FOUND["before a side task's layer, called after it"]()
    assert find_head(network, IMAGE, "head") == "head"
    for wrong, message in {"rotation": "tried: rotation", "fc": "no layer", "": "tried"}.items():
        with pytest.raises(BackboneError, match=message):
            find_head(network, IMAGE, wrong)


def test_heads_keep_their_kind_and_what_was_set_on_them() -> None:
    calls: list[int] = []
    before = nn.Conv2d(6, 10, 3, stride=2, padding=2, dilation=2, bias=False, padding_mode="reflect").double()
    before.register_forward_hook(lambda *_: calls.append(1))
    before.note = "mine"  # type: ignore[assignment]
    fresh = new_head(before.requires_grad_(False), 4)
    assert (
        fresh(torch.zeros(1, 6, 9, 9, dtype=torch.double)).shape
        == before(torch.zeros(1, 6, 9, 9).double())[:, :4].shape
    )
    assert len(calls) == 2
    assert (fresh.note, fresh.out_channels, fresh.bias) == ("mine", 4, None)
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    assert before.out_channels == len(before.weight) == 10
    cosine = new_head(Cosine(6, 10), 4)
    assert [tuple(parameter.shape) for parameter in cosine.parameters()] == [(4, 6), (1,)]


def test_set_head_keeps_the_order_of_names() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2), nn.ReLU()), nn.BatchNorm1d(2))
    names = list(network.state_dict())
    set_head(network, "1.0", nn.Linear(3, 2))
    assert list(network.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_of_another_type_take_the_same_images(dtype: torch.dtype) -> None:
    network = net(0).to(dtype)
    name = find_head(network, IMAGE)
    assert Backbone(network, "body", IMAGE)(images(2)).dtype == torch.float32
    expert = derive_expert(network, name, 3, seed=1)
    assert {parameter.dtype for parameter in expert.parameters()} == {dtype}
    logits = logits_of(expert.eval(), images(2))
    assert (logits.dtype, tuple(logits.shape)) == (torch.float32, (2, 3))
    assert bool(torch.isfinite(logits).all())


def test_lazy_layers_get_their_shape() -> None:
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(6))
    assert find_head(network, IMAGE) == "2"
    require_copies(network, IMAGE)
    unused = Layers(lambda m, x: m.head(x), head=lin(3, 4), other=nn.LazyLinear(3))
    find_head(unused, IMAGE)
    with pytest.raises(BackboneError, match=r"never uses the lazy layer of 'other\.weight'"):
        require_copies(unused, IMAGE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("wrap", [torch.jit.script, torch.compile, nn.DataParallel])
def test_what_stands_around_a_network_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(BackboneError, match="give the plain module that it was made from"):
        find_head(wrap(nn.Sequential(nn.Flatten(), nn.Linear(432, 3))), IMAGE)


def test_what_cannot_be_sent_is_refused() -> None:
    network = net()
    torch.nn.utils.parametrizations.spectral_norm(network.body[3])
    assert find_head(network, IMAGE) == "head"
    with pytest.raises(BackboneError, match=r"layer 'body\.3' is parametrized"):
        require_copies(network, IMAGE)


def _failing_copy() -> nn.Module:
    network = net()
    network.lines = open(__file__)
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_failing_copy, "cannot be copied .*TextIOWrapper"),
        (
            lambda: Layers(lambda m, x: (m.head(x), x) if m.training else m.head(x), head=lin(3, 4)),
            "in training mode, too",
        ),
        (
            lambda: Layers(lambda m, x: m.head(x, m.training) if m.training else m.head(x), head=lin(3, 4)),
            "training mode",
        ),
    ],
)
def test_a_network_that_no_expert_can_be_made_of(make: Callable[[], nn.Module], message: str) -> None:
    network = make().eval()
    find_head(network, IMAGE)
    with pytest.raises(BackboneError, match=message):
        require_copies(network, IMAGE)


def test_trying_a_copy_in_training_changes_nothing() -> None:
    network = net(0, dropout=0.5)
    before, state = digest(network.state_dict()), torch.get_rng_state()
    require_copies(network, IMAGE)
    assert digest(network.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training


def test_spectral_norm_is_kept() -> None:
    network = net(0)
    torch.nn.utils.spectral_norm(network.body[3])
    expert = derive_expert(network.eval(), find_head(network, IMAGE), 3, seed=1)
    assert list(expert.state_dict()) == list(network.state_dict())
    assert torch.equal(expert.eval().body(images(2)), network.body(images(2)))
