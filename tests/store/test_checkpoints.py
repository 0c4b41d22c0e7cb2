"""Checkpoints in the run directory, and the codec that makes JSON and tensors of any state."""

from __future__ import annotations

import json
import logging
import math
import random
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_eg.errors import DamagedFileError, StorageError
from distributed_eg.store.checkpoints import Checkpoint, CheckpointSlot, decode, delete_checkpoints, encode
from distributed_eg.store.storage import Storage

FOLDER = "tasks/00003"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def checkpoint(epochs: int, key: str = "k") -> Checkpoint:
    """A state of its own for each number of epochs."""
    values, tensors = encode({"weights": torch.full((2, 3), float(epochs)), "epochs": epochs, "nan": math.nan})
    return Checkpoint(key, epochs, values, tensors)


def weights(storage: Storage) -> list[str]:
    """Tensor files of the task."""
    return [name for name in storage.list(FOLDER) if name.endswith(".safetensors")]


def test_the_newest_comes_back_and_is_the_only_one(storage: Storage) -> None:
    assert CheckpointSlot(storage, 3, "k").load() is None
    for epochs in (1, 2, 2):
        CheckpointSlot(storage, 3, "k").save(checkpoint(epochs))
        assert len(weights(storage)) == 1
    found = CheckpointSlot(storage, 3, "k").load()
    assert found is not None
    assert (found.key, found.epochs) == ("k", 2)
    state = decode(found.values, found.tensors)
    assert torch.equal(state["weights"], torch.full((2, 3), 2.0))
    assert math.isnan(state["nan"])


def test_another_stage_s_is_none_and_is_replaced(storage: Storage, caplog: Any) -> None:
    CheckpointSlot(storage, 3, "k").save(checkpoint(4, "other"))
    assert CheckpointSlot(storage, 3, "k").load() is None
    assert not caplog.records
    CheckpointSlot(storage, 3, "k").save(checkpoint(1))
    assert len(weights(storage)) == 1
    assert CheckpointSlot(storage, 3, "other").load() is None


def test_a_writer_killed_between_tensors_and_record_leaves_the_one_before(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    CheckpointSlot(storage, 3, "k").save(checkpoint(1))

    def killed(*_: Any) -> None:
        raise StorageError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_record", killed)
        with pytest.raises(StorageError, match="killed"):
            CheckpointSlot(storage, 3, "k").save(checkpoint(2))
    found = CheckpointSlot(storage, 3, "k").load()
    assert found is not None
    assert found.epochs == 1
    assert len(weights(storage)) == 2
    delete_checkpoints(storage, 3)
    assert storage.list(FOLDER) == []


def test_what_a_record_that_was_tampered_with_names_is_not_deleted(storage: Storage) -> None:
    storage.write("tasks/00000/expert-0.safetensors", b"x")
    body = {"task": 3, "key": "k", "epochs": 1, "values": None}
    named = {"path": "tasks/00000/expert-0.safetensors", "sha256": "", "size_bytes": 1}
    storage.write_record(f"{FOLDER}/checkpoint.json", {**body, "tensors": named})
    CheckpointSlot(storage, 3, "k").save(checkpoint(1))
    CheckpointSlot(storage, 3, "k").delete()
    assert storage.list("tasks/00000") == ["expert-0.safetensors"]


def test_nothing_to_delete(storage: Storage) -> None:
    delete_checkpoints(storage, 3)
    storage.write(f"{FOLDER}/expert-0.safetensors", b"x")
    CheckpointSlot(storage, 3, "k").delete()
    assert storage.list(FOLDER) == ["expert-0.safetensors"]


@pytest.mark.parametrize("damage", ["torn record", "no tensors", "number", "torn weights", "gone"])
def test_a_damaged_one_is_none_with_a_warning(storage: Storage, caplog: Any, damage: str) -> None:
    CheckpointSlot(storage, 3, "k").save(checkpoint(5))
    record = Path(storage.uri) / FOLDER / "checkpoint.json"
    (file,) = (record.parent / name for name in weights(storage))
    content = json.loads(record.read_text())
    if damage == "torn record":
        record.write_bytes(record.read_bytes()[:-10])
    elif damage == "no tensors":
        record.write_text(json.dumps({name: value for name, value in content.items() if name != "tensors"}))
    elif damage == "number":
        record.write_text(json.dumps({**content, "epochs": 4}))
    elif damage == "torn weights":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert CheckpointSlot(storage, 3, "k").load() is None
    assert "The checkpoint of task 3 cannot be used" in caplog.text
    CheckpointSlot(storage, 3, "k").save(checkpoint(1))
    assert CheckpointSlot(storage, 3, "k").load() is not None


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


VALUES: dict[str, Any] = {
    "scalars": [None, True, False, 0, -1, 2**200, "ä\n\ud800", ""],
    "floats": [0.1, -0.0, 5e-324, 1e308, math.inf, -math.inf, math.nan, 1.0],
    "containers": {
        "b": [],
        "a": (),
        3: {},
        "3": ((1, [2.5]),),
        -1: OrderedDict([("z", 1), ("y", (None,))]),
        7: Counter([3, 1, 3]),
    },
    "tags": {"tuple": [1], "float": "nan", "tensor": "0", "dict": [[1, 2]], "array": 1},
    "tensors": [
        torch.tensor(1.5),
        torch.tensor([math.nan, -0.0, math.inf]),
        torch.randn(3, 4).t(),
        torch.randn(4, 4)[::2, 1:],
        torch.zeros(0, 3),
        torch.tensor([1 / 3], dtype=torch.float64),
        torch.tensor([1 / 3], dtype=torch.float16),
        torch.tensor([1 / 3], dtype=torch.bfloat16),
        torch.tensor([[True], [False]]),
        *(torch.tensor([1, 100], dtype=d) for d in (torch.int8, torch.int16, torch.int32, torch.int64)),
        *(torch.tensor([1, 200], dtype=d) for d in (torch.uint8, torch.uint16, torch.uint32, torch.uint64)),
    ],
    "numpy": [
        np.float64(0.1),
        np.float32(math.nan),
        np.int64(3),
        np.bool_(True),
        np.str_("é"),
        np.datetime64("2020-01-02"),
        np.arange(6, dtype=np.uint32).reshape(2, 3).T,
        np.array(2.5, dtype=">f4"),
        np.array([1 + 2j]),
        np.array(["a", "bcd"]),
        np.zeros((0, 2)),
    ],
    "random": [random.Random(1).getstate(), np.random.RandomState(1).get_state(legacy=False), torch.get_rng_state()],
}


@pytest.mark.parametrize("name", list(VALUES))
def test_values_come_back_bit_for_bit_through_a_run_directory(storage: Storage, name: str) -> None:
    values, tensors = encode(VALUES[name])
    json.dumps(values, allow_nan=False)
    CheckpointSlot(storage, 3, "k").save(Checkpoint("k", 1, values, tensors))
    found = CheckpointSlot(storage, 3, "k").load()
    assert found is not None
    assert same(decode(found.values, found.tensors), VALUES[name])


def test_tensors_with_gradients_come_back_as_plain_tensors() -> None:
    value = torch.ones(2, requires_grad=True) * 2
    back = decode(*encode([value]))[0]
    assert torch.equal(back, value.detach())
    assert not back.requires_grad


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "builtins.object"),
        ({1, 2}, "builtins.set"),
        (b"x", "builtins.bytes"),
        (defaultdict(int), "collections.defaultdict"),
        (torch.nn.Parameter(torch.ones(2)), "torch.nn.parameter.Parameter"),
        (torch.ones(2, requires_grad=True), "torch.Tensor"),
        ({1.5: 0}, "builtins.dict"),
        ({True: 0}, "builtins.dict"),
        (np.array([object()]), "numpy.ndarray"),
        (torch.zeros(2, 2).to_sparse(), "torch.Tensor"),
        (len, "builtins.builtin_function_or_method"),
    ],
)
def test_anything_else_is_refused_by_its_place(value: Any, kind: str) -> None:
    with pytest.raises(TypeError) as caught:
        encode({"plugins": [{"x": (0, value)}]})
    assert f"a {kind} at ['plugins'][0]['x'][1]" in str(caught.value)


@pytest.mark.parametrize("value", [{"tensor": "7"}, {"what": 1}, {"dict": [1]}, {}, {"a": 1, "b": 2}])
def test_what_is_no_encoding_is_damaged(value: Any) -> None:
    with pytest.raises(DamagedFileError, match="damaged"):
        decode([value], {})


def test_what_was_on_a_card_comes_back_on_the_jobs_own() -> None:
    """A plugin's tensor of cuda:1 has no business on cuda:0, where torch puts what is for "cuda"."""
    asked: list[object] = []

    class Kept(torch.Tensor):
        def to(self, device: object) -> torch.Tensor:  # type: ignore[override]
            asked.append(device)
            return self

    for device in ("cuda:1", "cpu"):
        decode([{"tensor": "0", "device": "cuda"}, {"tensor": "0"}], {"0": Kept()}, device)
    assert asked == [torch.device("cuda:1"), "cpu", "cuda", torch.device("cpu")]
