"""Tensors as sealed files: the same tensors give the same bytes under the same name, whatever their layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed_eg.errors import StorageError
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import load_tensors, save_tensors


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


TENSORS = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "bias": torch.tensor([-0.0, float("inf"), 1e-45]),
    "num_batches_tracked": torch.tensor(7),
    "half": torch.ones(2, dtype=torch.float16),
    "bfloat": torch.ones(2, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 5),
}


def test_every_kind_of_tensor_comes_back_as_it_was(storage: Storage) -> None:
    loaded = load_tensors(storage, save_tensors(storage, "w", TENSORS))
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)
    assert torch.signbit(loaded["bias"][0]), "a negative zero stays one"


def test_nan_keeps_its_bits(storage: Storage) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001], dtype=torch.int32)
    loaded = load_tensors(storage, save_tensors(storage, "w", {"x": bits.view(torch.float32)}))
    assert torch.equal(loaded["x"].view(torch.int32), bits)


def test_another_order_of_names_gives_the_same_file(storage: Storage) -> None:
    backwards = dict(reversed(TENSORS.items()))
    assert list(backwards) != list(TENSORS)
    assert save_tensors(storage, "w", TENSORS) == save_tensors(storage, "w", backwards)
    assert len(storage.walk()) == 1


def test_a_name_carries_the_hash_of_the_content(storage: Storage) -> None:
    artifact = save_tensors(storage, "tasks/00001/expert", TENSORS)
    other = save_tensors(storage, "tasks/00001/expert", {**TENSORS, "weight": TENSORS["weight"] + 1})
    assert artifact.path == f"tasks/00001/expert-{artifact.sha256[:16]}.safetensors"
    assert other.path != artifact.path
    assert torch.equal(load_tensors(storage, artifact)["weight"], TENSORS["weight"]), "a later version hides no earlier"


def test_tensors_that_share_memory_are_stored_each(storage: Storage) -> None:
    """Tied weights, and a view of another tensor."""
    tied = torch.arange(6.0)
    shared = {"a": tied, "b": tied, "c": tied.view(2, 3), "d": tied[2:4]}
    apart = {name: tensor.clone() for name, tensor in shared.items()}
    artifact = save_tensors(storage, "w", shared)
    assert artifact == save_tensors(storage, "w", apart)
    assert all(torch.equal(tensor, shared[name]) for name, tensor in load_tensors(storage, artifact).items())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(12.0)[::2],
        torch.ones(1).expand(4),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "expanded", "channels last"],
)
def test_the_layout_in_memory_does_not_show(storage: Storage, tensor: torch.Tensor) -> None:
    artifact = save_tensors(storage, "w", {"x": tensor})
    assert artifact == save_tensors(storage, "w", {"x": tensor.clone(memory_format=torch.contiguous_format)})
    assert torch.equal(load_tensors(storage, artifact)["x"], tensor)


def test_a_scalar_stays_a_scalar(storage: Storage) -> None:
    loaded = load_tensors(storage, save_tensors(storage, "w", {"n": torch.tensor(5)}))
    assert loaded["n"].shape == ()
    assert loaded["n"].item() == 5


def test_parameters_are_stored_without_their_graph_and_left_alone(storage: Storage) -> None:
    layer = torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    artifact = save_tensors(storage, "w", dict(layer.named_parameters()))
    loaded = load_tensors(storage, artifact)
    assert not any(tensor.requires_grad for tensor in loaded.values())
    assert all(torch.equal(loaded[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_what_is_loaded_may_be_changed_in_place(storage: Storage) -> None:
    artifact = save_tensors(storage, "w", {"x": torch.zeros(3)})
    loaded = load_tensors(storage, artifact)
    loaded["x"] += 1
    assert torch.equal(load_tensors(storage, artifact)["x"], torch.zeros(3))


@pytest.mark.parametrize("data", [b"", b"no tensors", b"\xff" * 64])
def test_a_whole_file_without_tensors_is_named(storage: Storage, data: bytes) -> None:
    artifact = storage.write("w.safetensors", data)
    with pytest.raises(StorageError, match=r"w\.safetensors"):
        load_tensors(storage, artifact)


def test_damaged_weights_are_named_before_they_are_parsed(storage: Storage, tmp_path: Path) -> None:
    artifact = save_tensors(storage, "w", {"x": torch.zeros(100)})
    file = tmp_path / "run" / artifact.path
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(StorageError, match="damaged") as caught:
        load_tensors(storage, artifact)
    assert artifact.path in str(caught.value)
