"""Data: the same are the same in every process, whatever differs is named, and few samples are read for that."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks.classic import SplitMNIST
from avalanche.benchmarks.utils import as_classification_dataset
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import MNIST

from distributed_eg.errors import InputError
from distributed_eg.strategy.tasks.data_identity import identity_of, reference_identity
from tests.helpers import task_images, tiny_benchmark


def changed(before: Any, after: Any) -> set[str]:
    """Keys in which the identities of two datasets differ."""
    one, other = identity_of(before), identity_of(after)
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def tensors(count: int = 8, seed: int = 0) -> TensorDataset:
    """A leaf in memory."""
    return TensorDataset(*task_images(0, count, seed))


def image(value: int) -> Image.Image:
    """A tiny picture."""
    return Image.new("RGB", (2, 2), (value, 0, 0))


class Holder(Dataset):
    """A leaf of the samples that it is given, which notes what is read; an exception among them is raised."""

    def __init__(self, *samples: Any) -> None:
        self.samples = samples
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        if isinstance(self.samples[index], BaseException):
            raise self.samples[index]
        return self.samples[index]


# What is seen


def test_what_changes_the_identity() -> None:
    images, targets = task_images(0, 8, 0)

    def dataset(images: Any = images, targets: Any = targets, **others: Any) -> Any:
        leaf = TensorDataset(images, targets)
        leaf.targets = targets.tolist()  # type: ignore[attr-defined]
        return as_classification_dataset(leaf, **others)

    brighter, other = images.clone(), targets.clone()
    brighter[3, 0, 0, 0] += 1e-6
    other[3] += 1
    order = [1, 0, *range(2, 8)]
    assert identity_of(dataset())["length"] == 8
    assert identity_of(dataset())["class"] == "torch.utils.data.dataset.TensorDataset"
    assert not changed(dataset(), dataset(images.clone(), targets.clone()))
    assert not changed(dataset(), dataset(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)))
    assert changed(dataset(), dataset(brighter)) == {"samples"}
    assert changed(dataset(), dataset(targets=other)) == {"samples", "targets"}
    assert changed(dataset(), dataset(images.double())) == {"samples"}
    assert changed(dataset(), dataset(images[order])) == {"samples"}
    assert changed(dataset(), dataset().subset(order)) == {"indices", "samples", "targets"}
    assert changed(dataset(), dataset().subset([0, 1, 2])) == {"length", "indices", "samples", "targets"}
    assert changed(dataset(), dataset().update_data_attribute("targets", other.tolist())) == {"targets"}


def test_transforms_are_seen_by_what_they_do_in_evaluation() -> None:
    darker, noise = transforms.Normalize(0.5, 1), transforms.RandomErasing(1.0)

    def dataset(train: Any = None, evaluation: Any = None) -> Any:
        leaf = tensors()
        leaf.targets = [0] * 8  # type: ignore[attr-defined]
        groups = {"train": (train, None), "eval": (evaluation, None)}
        return as_classification_dataset(leaf, transform_groups=groups).eval()

    assert not changed(dataset(), dataset(train=darker))
    assert not changed(dataset(noise), dataset(noise))
    assert changed(dataset(), dataset(evaluation=darker)) == {"samples"}


def test_tasks_of_a_benchmark_differ_and_come_again() -> None:
    first, again = ([e.dataset for e in tiny_benchmark().train_stream] for _ in range(2))
    assert [identity_of(d) for d in first] == [identity_of(d) for d in again]
    assert changed(first[0], first[1]) == {"samples", "targets"}


def test_tasks_over_one_leaf_and_their_use(mnist_root: Path) -> None:
    tasks, again = (
        [experience.dataset for experience in SplitMNIST(5, seed=0, dataset_root=mnist_root).train_stream]
        for _ in range(2)
    )
    assert all(changed(tasks[0], other) == {"length", "indices", "samples", "targets"} for other in tasks[1:])
    assert tasks[0].targets.uniques
    assert tasks[0].targets.val_to_idx
    assert tasks[0].targets_task_labels.val_to_idx
    assert not changed(tasks[0], again[0])
    assert not changed(tasks[0].eval(), again[0])


def test_data_in_another_folder_are_the_same(mnist_root: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(mnist_root)
    assert not changed(MNIST(mnist_root, train=False), MNIST(str(tmp_path / "moved"), train=False))


class Renamed(TensorDataset):
    """Another class around the same data."""


def test_another_class_is_named() -> None:
    images, targets = task_images(0, 8, 0)
    assert changed(TensorDataset(images, targets), Renamed(images, targets)) == {"class"}
    assert identity_of(Renamed(images, targets))["class"] == f"{__name__}.Renamed"


def test_views_are_followed_to_their_rows() -> None:
    a, b = tensors(seed=1), Renamed(*task_images(0, 8, 2))
    nested = Subset(ConcatDataset([Subset(a, [5, 4, 3]), b]), [4, 0, -11])
    assert not changed(nested, ConcatDataset([Subset(b, [1]), Subset(a, [5, 5])]))
    assert identity_of(nested)["class"] == f"{__name__}.Renamed + torch.utils.data.dataset.TensorDataset"
    assert not changed(ConcatDataset([a, a]), Subset(a, [*range(8), *range(8)]))
    assert changed(ConcatDataset([a, b]), ConcatDataset([b, a])) == {"class", "samples"}
    assert not changed(Subset(ConcatDataset([a, b]), range(8)), a)
    assert not changed(Subset(a, torch.tensor([1, 2])), Subset(a, [1, 2]))
    assert changed(ConcatDataset([a, a]), ConcatDataset([a, tensors(seed=1)])) == {"class", "indices"}


class Endless(IterableDataset):
    """A stream of samples."""

    def __iter__(self) -> Any:
        return iter(int, 1)


def test_a_view_of_too_few_rows_and_a_leaf_without_a_length_are_refused() -> None:
    with pytest.raises(InputError, match="TensorDataset asks for a row that its 8 samples do not have"):
        identity_of(Subset(tensors(), [8]))
    with pytest.raises(InputError, match="Endless has no length"):
        identity_of(Endless())


def test_targets_hash_as_earlier_versions_hashed_them() -> None:
    """Runs of theirs are compared by them."""
    lines = hashlib.sha256(b"0\n1\n2\n").hexdigest()
    dataset = tensors(3)
    for targets in (torch.arange(3), np.arange(3), [np.int64(0), torch.tensor(1), 2], [0, 1, 2]):
        dataset.targets = targets  # type: ignore[attr-defined]
        assert identity_of(dataset)["targets"] == lines
    assert identity_of(as_classification_dataset(dataset))["targets"] == lines
    assert "targets" not in identity_of(tensors())


# Samples


@dataclass
class Sample:
    """A record of a user's own."""

    name: str
    box: Any


class Opaque:
    """An object that only its class tells."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, True),
        (None, False),
        ("a/b", "a/c"),
        (1.0, float("nan")),
        ([1, 2], [2, 1]),
        ((1, [2]), (1, [3])),
        ({"cat": 0}, {"cat": 1}),
        ({("cat", 1): image(1)}, {("cat", 2): image(1)}),
        (b"jpeg", b"jpog"),
        (np.arange(3), np.arange(1, 4)),
        (np.arange(4), np.arange(4).reshape(2, 2)),
        (np.arange(4), np.arange(4, dtype=np.int32)),
        (np.float32(1), np.float32(2)),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (np.array(["a", 1], dtype=object), np.array(["a", 2], dtype=object)),
        (torch.tensor(1), torch.tensor(1.0)),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.eye(2).to_sparse(), torch.ones(2, 2).to_sparse()),
        (nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))),
        ((image(1), 0), (image(2), 0)),
        (image(1).convert("P"), image(1)),
        (Sample("a", np.ones(2)), Sample("a", np.zeros(2))),
        (Opaque(), Sample("a", None)),
        (OSError("no such file"), ValueError("damaged")),
    ],
    ids=repr,
)
def test_samples_of_all_kinds(one: Any, other: Any) -> None:
    assert not changed(Holder(0, one), Holder(0, pickle.loads(pickle.dumps(one))))
    assert changed(Holder(0, one), Holder(0, other)) == {"samples"}


def test_the_order_in_a_dict_and_what_an_object_holds_do_not_count() -> None:
    assert not changed(Holder({"a": 0, "b": 1}), Holder({"b": 1, "a": 0}))
    named = Opaque()
    named.value = 1  # type: ignore[attr-defined]
    assert not changed(Holder(Opaque()), Holder(named))


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 128, 1_000, 60_000])
def test_few_samples_are_read_each_once_and_evenly(length: int) -> None:
    dataset = Holder(*range(length))
    identity_of(dataset)
    assert dataset.read == sorted(set(dataset.read))
    assert len(dataset.read) == min(length, 64)
    assert dataset.read[:1] + dataset.read[-1:] == ([0, length - 1] if length else [])
    gaps = np.diff(dataset.read)
    assert length < 3 or max(gaps) - min(gaps) <= 1


def test_datasets_of_one_sample_and_of_none() -> None:
    assert identity_of(Subset(tensors(), []))["length"] == 0
    assert changed(Holder(), Holder(1)) == {"class", "length", "indices", "samples"}
    assert changed(Holder(1), Holder(2)) == {"samples"}


class Drawn(Dataset):
    """Every sample is drawn, from all the generators that there are."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Any:
        return torch.rand(3), np.random.rand(3), random.random()


def test_what_is_drawn_is_the_same_and_moves_no_generator() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    first = identity_of(Drawn())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]  # type: ignore[index]
    torch.rand(1), np.random.rand(1), random.random()
    assert identity_of(Drawn()) == first


def test_a_sample_that_cannot_be_read_counts_by_what_it_raises() -> None:
    assert not changed(Holder(0, OSError("/here/1.png")), Holder(0, OSError("/there/1.png")))
    with pytest.raises(KeyboardInterrupt):
        identity_of(Holder(0, KeyboardInterrupt()))


# References


def test_a_reference_is_told_by_its_file_or_its_data(tmp_path: Path) -> None:
    file = tmp_path / "reference.safetensors"
    file.write_bytes(b"statistics")
    assert reference_identity(file) == reference_identity(str(file)) == hashlib.sha256(b"statistics").hexdigest()
    assert reference_identity(tensors()) == identity_of(tensors())
    assert reference_identity(None) is None
    with pytest.raises(InputError, match=r"The reference '.*elsewhere' cannot be read: .*No such file"):
        reference_identity(tmp_path / "elsewhere")


# Another process

ELSEWHERE = """
import functools, json
from avalanche.benchmarks.utils import as_classification_dataset
from torch.utils.data import Dataset, TensorDataset
from distributed_eg.strategy.tasks.data_identity import identity_of
from tests.helpers import task_images, tiny_benchmark

class Named(Dataset):
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return {"kinds": {"a", "b", "c"}, **dict.fromkeys({"x", "y", "z"}), "this": self, "hook": lambda: 0}

def everything():
    leaves = [TensorDataset(*task_images(0, 8, seed)) for seed in range(6)]
    for leaf in leaves:
        leaf.targets = [0] * 8
    parts = [as_classification_dataset(leaf) for leaf in leaves]
    # Leaves that come twice are put in the order of a set.
    twice = functools.reduce(lambda one, other: one.concat(other), [*parts, *parts[::-1]])
    assert len(twice._flat_data._datasets) == 6
    datasets = [experience.dataset for experience in tiny_benchmark().train_stream]
    return [identity_of(dataset) for dataset in (*datasets, twice, Named())]
"""


def test_another_process_with_another_hash_seed_gives_the_same_data() -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(ELSEWHERE, "elsewhere", "exec"), scope)
    found = subprocess.run(
        [sys.executable, "-c", ELSEWHERE + "print(json.dumps(everything()))"],
        env={**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout.splitlines()[-1]) == scope["everything"]()
