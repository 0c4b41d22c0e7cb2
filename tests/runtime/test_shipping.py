"""Shipping: each leaf once however many views of it travel, and a copy of one's own wherever it arrives."""

from __future__ import annotations

import gc
import multiprocessing
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from distributed_eg.errors import InputError
from distributed_eg.runtime.shipping import Shipped, Shipper, hollow
from tests.helpers import tiny_benchmark

LARGE = 400_000
"""Bytes of a leaf's images; a view of it is some kilobytes."""


class Store:
    """An object store that counts."""

    def __init__(self) -> None:
        self.objects: list[bytes] = []

    def put(self, data: bytes) -> int:
        """Keep ``data``; its number is the reference."""
        self.objects.append(data)
        return len(self.objects) - 1

    def fetch(self, reference: int) -> bytes:
        """What is behind a reference."""
        return self.objects[reference]


class Images(Dataset):
    """A large array, as numpy and as a tensor, and a count of what was read."""

    def __init__(self, value: float = 1.0, size: int = 100) -> None:
        self.images = torch.full((size, LARGE // 4 // size), value)
        self.array = np.arange(size)
        self.targets = [i % 2 for i in range(size)]
        self.reads = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        return self.images[index], self.targets[index]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def shipper(store: Store) -> Shipper:
    return Shipper(store)


def check_small(shipped: Sequence[Shipped]) -> None:
    """None of them carries a leaf's images."""
    assert max(len(one.view) for one in shipped) < LARGE / 20


# Once


def test_many_views_of_one_leaf_store_it_once(shipper: Shipper, store: Store) -> None:
    leaf = Images()
    views = [Subset(leaf, range(10 * i, 10 * i + 10)) for i in range(10)]
    shipments = [shipper.ship(view, f"view {i}") for i, view in enumerate(views)]
    assert len(store.objects) == 1
    assert len(store.objects[0]) > LARGE
    check_small([shipped for shipped, _ in shipments])
    for i, (shipped, _) in enumerate(shipments):
        view = shipped.load(store.fetch)
        assert list(view.indices) == list(range(10 * i, 10 * i + 10))
        assert torch.equal(view[3][0], leaf.images[10 * i + 3])


def test_avalanche_views_of_one_leaf_store_it_once(shipper: Shipper, store: Store) -> None:
    """Experiences of a class-incremental split, their halves, and other transforms of the same images."""
    leaf = Images()
    whole = as_classification_dataset(leaf)
    groups = TransformGroups({"train": (lambda x: 2 * x, None), "eval": (None, None)})
    doubled = as_classification_dataset(leaf, groups)
    views = [whole, whole.subset(range(0, 100, 2)), whole.subset(range(50)).subset(range(10)), doubled.eval(), doubled]
    shipments = [shipper.ship(view, "a view") for view in views]
    assert len(store.objects) == 1
    check_small([shipped for shipped, _ in shipments])
    loaded = [shipped.load(store.fetch) for shipped, _ in shipments]
    assert [len(view) for view in loaded] == [len(view) for view in views]
    for mine, theirs in zip(loaded, views, strict=True):
        assert torch.equal(mine[7][0], theirs[7][0])
        assert list(mine.targets) == list(theirs.targets)
    assert torch.equal(loaded[-1][7][0], 2 * leaf.images[7])


def test_a_stream_stores_each_leaf_of_its_own_once(shipper: Shipper, store: Store) -> None:
    """Three experiences of three datasets; each is shipped for training and for evaluation."""
    experiences = list(tiny_benchmark((0, 1, 2), train=12, test=6).train_stream)
    held = [shipper.ship((e.dataset, e.dataset.eval()), "experience") for e in experiences for _ in range(2)]
    assert len(store.objects) == 3
    for (shipped, _), experience in zip(held[::2], experiences, strict=True):
        dataset, _ = shipped.load(store.fetch)
        for index in (0, 11):
            assert torch.equal(dataset[index][0], experience.dataset[index][0])
            assert dataset[index][1:] == experience.dataset[index][1:]


def test_a_concatenation_of_subsets_stores_each_leaf_once(shipper: Shipper, store: Store) -> None:
    first, second = Images(1.0), Images(2.0)
    view = ConcatDataset([Subset(first, [0, 1]), Subset(second, [5]), Subset(Subset(first, range(9)), [3]), second])
    shipped, _ = shipper.ship(view, "a concatenation")
    assert len(store.objects) == 2
    assert len(shipped.leaves) == 2
    check_small([shipped])
    loaded = shipped.load(store.fetch)
    assert len(loaded) == 104
    assert [float(loaded[i][0][0]) for i in range(5)] == [1, 1, 2, 1, 2]
    assert loaded.datasets[0].dataset is loaded.datasets[2].dataset.dataset, "one leaf on the other side too"


def test_equal_leaves_are_two_leaves(shipper: Shipper, store: Store) -> None:
    shipped, _ = shipper.ship([Images(), Images()], "two datasets")
    a, b = shipped.load(store.fetch)
    assert len(store.objects) == 2
    assert a is not b


def test_a_leaf_is_stored_again_only_after_every_shipment_of_it_is_dropped(shipper: Shipper, store: Store) -> None:
    leaf = Images()
    _, first = shipper.ship(leaf, "leaf")
    _, second = shipper.ship(Subset(leaf, [0]), "leaf")
    del first
    gc.collect()
    _, third = shipper.ship(leaf, "leaf")
    assert len(store.objects) == 1
    del second, third
    gc.collect()
    shipper.ship(leaf, "leaf")
    assert len(store.objects) == 2


def test_what_holds_no_dataset_travels_whole(shipper: Shipper, store: Store) -> None:
    shipped, _ = shipper.ship({"network": torch.nn.Linear(2, 2), "numbers": [1, 2]}, "a value")
    assert (store.objects, shipped.leaves) == ([], ())
    assert shipped.load(store.fetch)["numbers"] == [1, 2]


# Nothing is mixed up


def test_temporary_leaves_whose_ids_are_used_again_are_not_confused(shipper: Shipper, store: Store) -> None:
    """A lazy stream makes a dataset, ships it and drops it; the next one often stands at the same address."""
    shipments, ids = [], []
    for i in range(200):
        leaf = TensorDataset(torch.tensor([float(i)]))
        ids.append(id(leaf))
        shipments.append(shipper.ship(Subset(leaf, [0]), "leaf")[0])
        del leaf
        gc.collect(0)
    assert len(set(ids)) < len(ids), "without a reused id this proves nothing"
    assert [float(shipped.load(store.fetch)[0][0]) for shipped in shipments] == [float(i) for i in range(200)]


def test_a_leaf_that_is_held_by_its_shipment_keeps_its_place(shipper: Shipper, store: Store) -> None:
    """Nobody but the shipment holds the leaves: each is alive, so no id is used twice."""
    shipments = [shipper.ship(Subset(TensorDataset(torch.tensor([float(i)])), [0]), "leaf") for i in range(200)]
    assert [float(shipped.load(store.fetch)[0][0]) for shipped, _ in shipments] == [float(i) for i in range(200)]
    assert len(store.objects) == 200


# A copy of one's own


def _change_in_place(leaf: Any) -> None:
    leaf.images.sub_(5)
    leaf.array += 5
    leaf.targets[0] = 99
    assert leaf[0][1] == 99


def test_every_load_is_a_writable_copy_that_nobody_else_sees(shipper: Shipper, store: Store) -> None:
    leaf = Images()
    shipped, _ = shipper.ship(Subset(leaf, range(50)), "leaf")
    spoilt, clean = shipped.load(store.fetch), shipped.load(store.fetch)
    _change_in_place(spoilt.dataset)
    later = shipped.load(store.fetch)
    for dataset in (leaf, clean.dataset, later.dataset):
        assert torch.equal(dataset.images, torch.ones_like(dataset.images))
        assert dataset.array.tolist() == list(range(100))
        assert dataset.targets[0] == 0
        assert dataset.reads == 0
    assert float(spoilt.dataset.images[0, 0]) == -4


def test_shipping_reads_no_sample_and_changes_nothing(shipper: Shipper) -> None:
    leaf = Images()
    shipper.ship(as_classification_dataset(leaf).subset(range(5)), "leaf")
    assert leaf.reads == 0


def test_one_load_fetches_each_leaf_once(shipper: Shipper, store: Store) -> None:
    leaf = Images()
    shipped, _ = shipper.ship([Subset(leaf, [0]), Subset(leaf, [1]), leaf], "views")
    fetched: list[int] = []

    def fetch(reference: int) -> bytes:
        fetched.append(reference)
        return store.fetch(reference)

    views = shipped.load(fetch)
    assert fetched == [0]
    assert views[0].dataset is views[1].dataset is views[2]


# What users bring


def test_a_dataset_class_of_a_notebook_travels_by_value(shipper: Shipper, store: Store) -> None:
    """A class that no worker can import, and lambdas as transforms, in the leaf and in the view."""
    offset = 3

    class Local(Dataset):
        def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
            self.targets = [0, 1]
            self.transform = transform

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.transform(torch.tensor(float(index))) + offset, self.targets[index]

    leaf = Local(lambda x: 10 * x)
    view = as_classification_dataset(leaf, TransformGroups({"train": (lambda x: -x, None), "eval": (None, None)}))
    shipped, _ = shipper.ship(view.subset([1]), "a notebook's dataset")
    assert float(shipped.load(store.fetch)[0][0]) == -13.0
    assert float(shipped.load(store.fetch).eval()[0][0]) == 13.0
    assert len(store.objects) == 1


class Locked(Dataset):
    """A dataset that guards its file handle."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index


UNPICKLABLE: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "process lock": multiprocessing.Lock,
    "generator": lambda: (i for i in range(3)),
    "database": lambda: sqlite3.connect(":memory:"),
}


@pytest.mark.parametrize("make", UNPICKLABLE.values(), ids=UNPICKLABLE.keys())
@pytest.mark.parametrize("place", ["leaf", "view"])
def test_what_cannot_travel_is_an_input_error_that_names_it(
    shipper: Shipper, store: Store, make: Callable[[], Any], place: str
) -> None:
    culprit = make()
    value = Subset(Locked(culprit), [0]) if place == "leaf" else (Subset(Images(), [0]), culprit)
    with pytest.raises(InputError, match=r"the dataset of task 3 cannot be sent to a worker: .+"):
        shipper.ship(value, "the dataset of task 3")
    shipped, _ = shipper.ship(Images(), "another")
    assert len(shipped.load(store.fetch)) == 100, "the next one is not affected"


def test_a_hollow_network_is_the_same_without_values() -> None:
    """What two layers share they share still, and what lies in memory in another order does so, too."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    network[3].weight = network[2].weight
    network[0].weight.data = network[0].weight.data.to(memory_format=torch.channels_last)
    network[2].bias.requires_grad_(False)
    network[1].running_mean += 1  # type: ignore[operator]
    found = hollow(network, "The network")
    assert all(parameter.is_meta for parameter in found.parameters())
    assert found[3].weight is found[2].weight  # type: ignore[index]
    for before, after in zip(network.parameters(), found.parameters(), strict=True):
        assert (before.stride(), before.dtype, before.requires_grad) == (
            after.stride(),
            after.dtype,
            after.requires_grad,
        )
    assert all(torch.equal(found.get_buffer(name), buffer) for name, buffer in network.named_buffers())
    assert not any(parameter.is_meta for parameter in network.parameters())
