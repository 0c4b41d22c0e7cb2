"""Identities: the same data and settings are the same in every process, and whatever differs is named."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks.classic import SplitMNIST
from avalanche.benchmarks.utils import DataAttribute, as_classification_dataset
from avalanche.training.plugins import EarlyStoppingPlugin, LRSchedulerPlugin
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import SequentialLR, StepLR
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import MNIST, ImageFolder

from distributed_eg import ExpertGate, ExpertGateStrategy
from distributed_eg.errors import InputError
from distributed_eg.runtime.resuming import differences
from distributed_eg.strategy.tasks import settings_identity as module
from distributed_eg.strategy.tasks.settings_identity import (
    DataIdentities,
    plain_values,
)
from tests.helpers import SHAPE, task_images, tiny_benchmark, tiny_net, tiny_strategy


def dataset_identity(dataset: Any) -> dict[str, str | int]:
    """By somebody who has seen no other dataset."""
    return DataIdentities().of(dataset)


def settings_identity(strategy: Any) -> dict[str, Any]:
    return module.settings_identity(strategy, DataIdentities())


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The leaves that were hashed, in order."""
    leaves: list[Any] = []
    original = module._LeafHash.of

    def of(self: Any, leaf: Any) -> str:
        leaves.append(leaf)
        return original(self, leaf)

    monkeypatch.setattr(module._LeafHash, "of", of)
    return leaves


@pytest.fixture(scope="session")
def split_mnist(mnist_root: Path) -> list[Any]:
    """The datasets of SplitMNIST's five training tasks."""
    return [experience.dataset for experience in SplitMNIST(5, seed=0, dataset_root=mnist_root).train_stream]


def changed(before: Any, after: Any) -> set[str]:
    """Keys in which the identities of two datasets differ."""
    return keys(dataset_identity(before), dataset_identity(after))


def keys(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Keys in which two identities differ."""
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def tensors(count: int = 8, seed: int = 0) -> TensorDataset:
    """A leaf in memory."""
    return TensorDataset(*task_images(0, count, seed))


# SplitMNIST: one large leaf under five views


def test_the_leaf_of_five_tasks_is_hashed_once(split_mnist: list[Any], hashed: list[Any]) -> None:
    identities = DataIdentities()
    tasks = [identities.of(dataset) for dataset in (*split_mnist, *split_mnist)]
    assert len(hashed) == 1
    assert isinstance(hashed[0], MNIST)
    assert tasks[:5] == tasks[5:]
    for other in tasks[1:5]:
        assert keys(tasks[0], other) == {"length", "targets", "indices"}


def test_using_a_dataset_leaves_its_identity(mnist_root: Path) -> None:
    def first_task() -> Any:
        return SplitMNIST(5, seed=0, dataset_root=mnist_root).train_stream[0].dataset

    used = first_task()
    before = dataset_identity(used)
    assert used.targets.uniques
    assert used.targets.count
    assert used.targets.val_to_idx
    assert used.targets_task_labels.val_to_idx
    for index in range(20):
        used[index]
    assert dataset_identity(used) == dataset_identity(used.eval()) == dataset_identity(first_task()) == before


def test_one_pixel_of_mnist(mnist_root: Path) -> None:
    whole = MNIST(mnist_root)
    before = dataset_identity(whole)
    whole.data[59_999, 27, 27] += 1
    assert keys(before, dataset_identity(whole)) == {"content"}


def test_mnist_read_from_another_folder(mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moved").symlink_to(mnist_root)
    (tmp_path / "data").symlink_to(mnist_root)
    monkeypatch.chdir(tmp_path)
    here = MNIST(mnist_root, train=False)
    for folder in (tmp_path / "moved", str(tmp_path / "moved"), "data", "./data"):
        assert not changed(here, MNIST(folder, train=False))


# Leaves in memory


def test_what_changes_the_identity_of_data_in_memory() -> None:
    images, targets = task_images(0, 8, 0)

    def dataset(images: Any = images, targets: Any = targets) -> Any:
        leaf = TensorDataset(images, targets)
        leaf.targets = targets.tolist()  # type: ignore[attr-defined]
        return as_classification_dataset(leaf)

    brighter, other = images.clone(), targets.clone()
    brighter[3, 0, 0, 0] += 1e-6
    other[3] += 1
    order = [1, 0, *range(2, 8)]
    assert not changed(dataset(), dataset(images.clone(), targets.clone()))
    assert not changed(dataset(), dataset(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)))
    assert changed(dataset(), dataset(brighter)) == {"content"}
    assert changed(dataset(), dataset(targets=other)) == {"content", "targets"}
    assert changed(dataset(), dataset(images.double())) == {"content"}
    assert changed(dataset(), dataset(images[order])) == {"content"}
    assert changed(dataset(), dataset().subset(order)) == {"indices", "targets"}
    assert changed(dataset(), dataset().subset([0, 1, 2])) == {"length", "indices", "targets"}
    assert changed(dataset(), dataset().update_data_attribute("targets", other.tolist())) == {"targets"}


def test_tasks_of_a_benchmark_differ_and_come_again() -> None:
    first, again = ([e.dataset for e in tiny_benchmark().train_stream] for _ in range(2))
    assert [dataset_identity(d) for d in first] == [dataset_identity(d) for d in again]
    assert changed(first[0], first[1]) == {"content", "targets"}
    assert dataset_identity(first[0])["class"] == "torch.utils.data.dataset.TensorDataset"
    assert dataset_identity(first[0])["length"] == 60


class Renamed(TensorDataset):
    """Another class around the same data."""


def test_another_class_is_named() -> None:
    images, targets = task_images(0, 8, 0)
    before, after = (dataset_identity(cls(images, targets)) for cls in (TensorDataset, Renamed))
    assert keys(before, after) == {"class"}
    assert after["class"] == f"{__name__}.Renamed"


def test_views_are_followed_to_their_rows() -> None:
    a, b = tensors(seed=1), tensors(seed=2)
    nested = Subset(ConcatDataset([Subset(a, [5, 4, 3]), b]), [4, 0, -11])
    assert not changed(nested, ConcatDataset([Subset(b, [1]), Subset(a, [5, 5])]))
    assert not changed(ConcatDataset([a, a]), Subset(a, [*range(8), *range(8)]))
    assert changed(ConcatDataset([a, b]), ConcatDataset([b, a])) == {"content"}
    assert dataset_identity(Subset(ConcatDataset([a, b]), range(8))) == dataset_identity(a)
    assert dataset_identity(Subset(a, torch.tensor([1, 2]))) == dataset_identity(Subset(a, [1, 2]))
    assert dataset_identity(Subset(a, []))["length"] == 0
    with pytest.raises(InputError, match="TensorDataset asks for a row that its 8 samples do not have"):
        dataset_identity(Subset(a, [8]))


def test_a_leaf_is_forgotten_with_its_last_view(hashed: list[Any]) -> None:
    identities = DataIdentities()
    for seed in (1, 2):
        leaf = tensors(seed=seed)
        assert identities.of(Subset(leaf, [0])) == identities.of(Subset(leaf, [0]))
        assert len(hashed) == 1
        hashed.clear()
        del leaf
        gc.collect()
        assert not identities._contents


class Holder(Dataset):
    """A leaf of eight samples with the attributes that it is given."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a sample was read")

    @cached_property
    def lazily(self) -> int:
        """Filled by its first reader."""
        return 1


class Opaque:
    """An object that only its class tells."""


@dataclass
class Sample:
    """A record of a user's own."""

    name: str
    box: Any


class Column:
    """What a table's column offers."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def to_numpy(self) -> Any:
        """The values."""
        return np.array(self.values, dtype=object)

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.to_numpy()


def image(value: int) -> Image.Image:
    """A tiny picture."""
    return Image.new("RGB", (2, 2), (value, 0, 0))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (None, False),
        ("train", "test"),
        (1.0, float("nan")),
        ([1, 2], [2, 1]),
        ({"cat": 0}, {"cat": 1}),
        ({1, 2}, {1, 3}),
        (np.arange(3), np.arange(1, 4)),
        (np.arange(4), np.arange(4).reshape(2, 2)),
        (np.arange(4), np.arange(4, dtype=np.int32)),
        (np.float32(1), np.float32(2)),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (np.array(["2020-01-01"], dtype="M8[D]"), np.array(["2020-01-02"], dtype="M8[D]")),
        (np.empty((0, 3)), np.empty((0, 4))),
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.eye(2).to_sparse(), torch.ones(2, 2).to_sparse()),
        (nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))),
        ([torch.ones(2), torch.ones(3)], [torch.ones(2), torch.zeros(3)]),
        ([b"jpeg"], [b"jpog"]),
        ([image(1), image(2)], [image(1), image(3)]),
        ([Sample("a", np.ones(2))], [Sample("a", np.zeros(2))]),
        (Column(["a", 1]), Column(["a", 2])),
        (DataAttribute([1, 2], "targets"), DataAttribute([1, 3], "targets")),
        (tensors(seed=1), tensors(seed=2)),
        ([Subset(tensors(), [0])], [Subset(tensors(), [1])]),
        (transforms.ToTensor(), transforms.PILToTensor()),
        (image, tensors),
        (Opaque, Sample),
    ],
    ids=repr,
)
def test_values_that_a_leaf_may_hold(one: Any, other: Any) -> None:
    before = dataset_identity(Holder(value=one))
    copied = dataset_identity(Holder(value=pickle.loads(pickle.dumps(one))))
    assert copied == before
    assert keys(before, dataset_identity(Holder(value=other))) == {"content"}
    assert keys(before, dataset_identity(Holder(other_name=one))) == {"content"}


def test_what_must_not_matter() -> None:
    def leaf(**others: Any) -> Holder:
        return Holder(**{"names": {"a": 0, "b": 1}, "kinds": {"x", "y"}, "transform": Opaque(), "n": [1, 2], **others})

    shared = [1, 2]
    assert not changed(leaf(m=[1, 2]), leaf(n=shared, m=shared))
    assert not changed(leaf(), leaf(transform=Opaque(), names={"b": 1, "a": 0}, kinds={"y", "x"}))
    used = leaf()
    assert used.lazily == 1
    assert not changed(leaf(), used)
    itself = leaf()
    itself.parent = itself
    assert dataset_identity(itself) == dataset_identity(itself)


def test_a_wrapper_is_told_by_what_it_wraps_which_is_hashed_once(hashed: list[Any]) -> None:
    inner, identities = tensors(), DataIdentities()
    one, other = (identities.of(Holder(inner=inner, noise=noise)) for noise in (0.1, 0.2))
    assert keys(one, other) == {"content"}
    assert hashed.count(inner) == 1


# Leaves in files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two images each."""
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(len(name)).save(path)
        os.utime(path, ns=(10**18, 10**18))
    return tmp_path / "images"


def touch(path: Path) -> None:
    """Another modification time, a nanosecond later where the file system keeps it."""
    os.utime(path, ns=(10**18, 10**18 + 10**9))


def lengthen(path: Path) -> None:
    """Another size at the same time."""
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(10**18, 10**18))


def replace(path: Path) -> None:
    """Another name."""
    path.rename(path.with_name("3.png"))


@pytest.mark.parametrize("change", [touch, lengthen, replace])
def test_an_image_folder_is_told_by_its_files(folder: Path, change: Callable[[Path], None]) -> None:
    before = dataset_identity(ImageFolder(str(folder)))
    assert dataset_identity(ImageFolder(str(folder))) == before
    assert dataset_identity(ImageFolder(os.path.relpath(folder))) == before
    change(folder / "cat" / "2.png")
    assert keys(before, dataset_identity(ImageFolder(str(folder)))) == {"content"}


def test_a_file_that_went_away_is_another_content(folder: Path) -> None:
    dataset = ImageFolder(str(folder))
    before = dataset_identity(dataset)
    (folder / "cat" / "2.png").unlink()
    assert keys(before, dataset_identity(dataset)) == {"content"}


@pytest.mark.parametrize(
    "attributes",
    [
        lambda paths: {"paths": paths, "labels": np.arange(8)},
        lambda paths: {"paths": np.array([str(path) for path in paths]), "mean": torch.ones(3, 1, 1)},
        lambda paths: {"items": {str(path): 0 for path in paths}, "boxes": np.zeros((8, 4))},
        lambda paths: {"samples": [Sample(str(path), None) for path in paths]},
        lambda paths: {"file": str(paths[0]), "labels": torch.arange(8), "std": torch.ones(3, 1, 1)},
    ],
)
def test_labels_and_means_in_memory_do_not_hide_files(folder: Path, attributes: Callable[[list[Path]], Any]) -> None:
    leaf = Holder(**attributes(sorted(folder.glob("*/*.png"))))
    before = dataset_identity(leaf)
    touch(folder / "cat" / "1.png")
    assert keys(before, dataset_identity(leaf)) == {"content"}


def test_samples_in_memory_may_come_from_another_file(folder: Path, tmp_path: Path) -> None:
    images = np.zeros((8, 4))
    here = Holder(images=images, file=str(folder / "cat" / "1.png"), mode="train")
    assert not changed(here, Holder(images=images, file=tmp_path / "elsewhere.npz", mode="train"))
    assert changed(here, Holder(images=images, file=tmp_path / "elsewhere.npz", mode="test")) == {"content"}


def test_a_bare_name_is_a_file_only_where_it_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder / "cat")
    before = dataset_identity(Holder(file="1.png", classes=["n/a", "cat"]))
    touch(folder / "cat" / "1.png")
    after = dataset_identity(Holder(file="1.png", classes=["n/a", "cat"]))
    assert keys(before, after) == {"content"}
    # Names that are no files do not depend on the folder that the process was started in.
    names = [dataset_identity(Holder(mode="dog", classes=["n/a", "dog"]))]
    monkeypatch.chdir(folder)
    names.append(dataset_identity(Holder(mode="dog", classes=["n/a", "dog"])))
    assert names[0] == names[1]


# Another process

ELSEWHERE = """
import functools, json, sys
from avalanche.benchmarks.utils import as_classification_dataset
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder
from distributed_eg.strategy.tasks.settings_identity import DataIdentities, settings_identity
from tests.helpers import task_images, tiny_benchmark, tiny_strategy
from avalanche.training.plugins import EarlyStoppingPlugin

def everything(folder):
    leaves = [TensorDataset(*task_images(0, 8, seed)) for seed in range(6)]
    for leaf in leaves:
        leaf.targets = [0] * 8
        leaf.kinds = {"a", "b", "c", "d"}
    parts = [as_classification_dataset(leaf) for leaf in leaves]
    # Leaves that come twice are put in the order of a set.
    twice = functools.reduce(lambda one, other: one.concat(other), [*parts, *parts[::-1]])
    assert len(twice._flat_data._datasets) == 6
    datasets = [e.dataset for e in tiny_benchmark().train_stream] + [twice, ImageFolder(folder)]
    strategy = tiny_strategy(plugins=[EarlyStoppingPlugin(2, "valid")], eval_every=1)
    identities = DataIdentities()
    return [identities.of(dataset) for dataset in datasets] + [settings_identity(strategy, identities)]
"""


def test_another_process_with_another_hash_seed(folder: Path) -> None:
    scope: dict[str, Any] = {}
    exec(compile(ELSEWHERE, "elsewhere", "exec"), scope)
    found = subprocess.run(
        [sys.executable, "-c", ELSEWHERE + "print(json.dumps(everything(sys.argv[1])))", str(folder)],
        env={**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout.splitlines()[-1]) == scope["everything"](str(folder))


# Settings


def strategy(lr: float = 0.05, momentum: float = 0.9, weight: Any = None, **others: Any) -> Any:
    """A strategy with an optimizer of two groups and a weighted criterion."""
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    features, head = model.expert.features.parameters(), model.expert.head.parameters()
    optimizer = torch.optim.SGD([{"params": features}, {"params": head, "lr": lr}], lr=0.05, momentum=momentum)
    if "step_size" in others:
        others["plugins"] = [LRSchedulerPlugin(StepLR(optimizer, others.pop("step_size")))]
    return tiny_strategy(**{"model": model, "optimizer": optimizer, "criterion": nn.CrossEntropyLoss(weight), **others})


def lines(before: Any, after: Any) -> list[str]:
    """What differs between two strategies."""
    return differences(settings_identity(before), settings_identity(after))


def smooth(value: float) -> Any:
    """A criterion that is no module."""
    return partial(nn.functional.cross_entropy, label_smoothing=value)


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ({}, {"lr": 0.1}, "optimizer.groups.1.lr: the run has 0.05, now 0.1"),
        ({}, {"lr": torch.tensor(0.5)}, "optimizer.groups.1.lr: the run has 0.05, now 0.5"),
        ({}, {"train_mb_size": 8}, "train_mb_size: the run has 16, now 8"),
        ({}, {"train_epochs": 3}, "train_epochs: the run has 2, now 3"),
        ({}, {"eval_every": 1}, "eval_every: the run has -1, now 1"),
        ({}, {"peval_mode": "iteration"}, "peval_mode: the run has 'epoch', now 'iteration'"),
        ({}, {"on_repeat": "error"}, "on_repeat: the run has 'continue', now 'error'"),
        (
            {"criterion": smooth(0.1)},
            {"criterion": smooth(0.2)},
            "criterion.keywords.label_smoothing: the run has 0.1, now 0.2",
        ),
        (
            {"plugins": [EarlyStoppingPlugin(2, "valid")]},
            {"plugins": [EarlyStoppingPlugin(3, "valid")]},
            "plugins.0.patience: the run has 2, now 3",
        ),
        ({"step_size": 1}, {"step_size": 2}, "plugins.0.scheduler.step_size: the run has 1, now 2"),
    ],
)
def test_each_setting_gives_its_one_line(before: dict[str, Any], after: dict[str, Any], line: str) -> None:
    assert lines(strategy(**before), strategy(**before)) == []
    assert lines(strategy(**before), strategy(**after)) == [line]


class Tuned(ExpertGateStrategy):
    """A subclass with a setting of its own."""

    def __init__(self, *, alpha: float, **others: Any) -> None:
        super().__init__(**others)
        self.alpha = alpha


def test_a_setting_of_a_subclass_counts() -> None:
    before, after = (strategy(cls=partial(Tuned, alpha=alpha)) for alpha in (0.2, 0.9))
    assert lines(before, after) == ["strategy.alpha: the run has 0.2, now 0.9"]


def test_which_parameters_a_group_holds_counts() -> None:
    """As many of other layers."""

    def over(layer: str) -> Any:
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        return tiny_strategy(model=model, optimizer=torch.optim.SGD(model.expert.get_submodule(layer).parameters()))

    [line] = lines(over("head"), over("features.0"))
    assert line.startswith("optimizer.groups.0.params: the run has ")


def test_what_a_scheduler_keeps_to_itself_and_dataclasses_count() -> None:
    def scheduled(milestone: int) -> Any:
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.1)
        parts = [StepLR(optimizer, 1), StepLR(optimizer, 2)]
        plugin = LRSchedulerPlugin(SequentialLR(optimizer, parts, [milestone]))
        plugin.kept = Kept(milestone)  # type: ignore[attr-defined]
        return tiny_strategy(model=model, optimizer=optimizer, plugins=[plugin])

    assert lines(scheduled(1), scheduled(1)) == []
    assert lines(scheduled(1), scheduled(3)) == [
        "plugins.0.kept.value: the run has 1, now 3",
        "plugins.0.scheduler._milestones.0: the run has 1, now 3",
    ]


@dataclass(frozen=True, slots=True)
class Kept:
    """A value in a dataclass without a ``__dict__``."""

    value: int


def test_a_setting_of_every_group_gives_a_line_each() -> None:
    groups = (f"optimizer.groups.{group}.momentum: the run has 0.9, now 0.8" for group in (0, 1))
    assert lines(strategy(), strategy(momentum=0.8)) == list(groups)


def test_weights_of_the_criterion_are_shown_short() -> None:
    [line] = lines(strategy(weight=torch.ones(7)), strategy(weight=torch.arange(7.0)))
    assert line.startswith("criterion.weight: the run has ")
    before, after = line.removeprefix("criterion.weight: the run has ").split(", now ")
    assert len(before) == len(after) == 13
    [line] = lines(strategy(), strategy(weight=torch.ones(7)))
    assert line == f"criterion.weight: the run has nothing, now {before}"


class Note(EarlyStoppingPlugin):
    """A plugin with attributes of all kinds."""

    def __init__(self) -> None:
        super().__init__(2, "valid")
        self.model = tiny_net()
        self.table = {(1, 2): torch.arange(3), "fn": tiny_net, "where": Path("a"), "device": torch.device("cpu")}
        self.kinds = {"b", "a"}
        self.opaque = [Opaque(), lambda: 0]
        self._private = Opaque()


def test_settings_are_json_without_addresses_and_reading_them_changes_nothing() -> None:
    subject = strategy(plugins=[Note()], criterion=smooth(0.1))
    plugins, before = list(subject.plugins), {name: id(value) for name, value in vars(subject).items()}
    text = json.dumps(settings_identity(subject), allow_nan=False)
    assert "0x" not in text
    assert lines(subject, strategy(plugins=[Note()], criterion=smooth(0.1))) == []
    [note] = json.loads(text)["plugins"]
    assert note["table"]["fn"] == "tests.helpers.tiny_net"
    assert note["opaque"][0] == f"{__name__}.Opaque"
    assert "_private" not in note
    assert subject.plugins == plugins
    assert {name: id(value) for name, value in vars(subject).items()} == before


def test_evaluator_and_clock_are_no_settings() -> None:
    assert settings_identity(strategy())["plugins"] == []
    assert lines(strategy(), strategy(evaluator=None, eval_mb_size=4)) == []


def test_loader_arguments_are_json() -> None:
    given = {"num_workers": 2, "collate_fn": tiny_net, "generator": torch.Generator(), "weights": torch.ones(2)}
    values = plain_values(given)
    assert values | {"weights": ""} == {
        "num_workers": 2,
        "collate_fn": "tests.helpers.tiny_net",
        "generator": "torch._C.Generator",
        "weights": "",
    }
    assert len(values["weights"]) == 64


# Differences


def test_differences_are_sorted_and_complete() -> None:
    then = {"method": {"seed": 0, "betas": (0.9, 0.99)}, "z": 1, "list": [], "data": "a" * 64, "gone": {"x": None}}
    now = {"method": {"seed": 1, "betas": [0.9, 0.95]}, "z": 1.0, "list": [{"c": "d"}], "data": "b" * 64}
    assert differences(then, now) == [
        "data: the run has aaaaaaaaaaaa…, now bbbbbbbbbbbb…",
        "gone.x: the run has None, now nothing",
        "list.0.c: the run has nothing, now 'd'",
        "method.betas.1: the run has 0.99, now 0.95",
        "method.seed: the run has 0, now 1",
    ]


def test_equal_values_do_not_differ() -> None:
    value = {"a": float("nan"), "b": (1, [2, ()]), 3: {}, "inf": float("inf")}
    assert differences(value, json.loads(json.dumps(value))) == []
    assert differences({}, {}) == []
    assert differences({}, {"a": []}) == ["a: the run has nothing, now {}"]
    assert differences({"a": 3}, {"a": {"b": 1}}) == [
        "a: the run has 3, now nothing",
        "a.b: the run has nothing, now 1",
    ]
