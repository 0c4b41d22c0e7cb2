"""Predictions for people: which class, of which task, how sure; the same in every mode, from tensors and from files."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import FakeData, ImageFolder

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy, Prediction
from distributed_eg.benchmarks.benchmark import labelled
from distributed_eg.errors import InputError
from distributed_eg.method.image_transform import transform_as_data
from distributed_eg.types import ImageTransform
from tests.helpers import SHAPE, task_images, tiny_benchmark, tiny_net, tiny_strategy

TRANSFORM = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
NAMES = (("ant", "bee"), ("cat", "dog"))


def write_images(folder: Path, domain: int, names: tuple[str, ...], count: int, seed: int) -> None:
    """Two classes of a domain as PNG files of 20 × 20 pixels, a folder each."""
    images, targets = task_images(domain, count, seed)
    for i, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
        pixels = ((image.clamp(-3, 3) + 3) * (255 / 6)).round().byte().permute(1, 2, 0).numpy()
        (folder / names[target]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((20, 20), Image.Resampling.NEAREST).save(folder / names[target] / f"{i:02}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``test`` images of two tasks, each with class ids from 0."""
    root = tmp_path_factory.mktemp("images")
    for task, names in enumerate(NAMES):
        write_images(root / "train" / str(task), task, names, 60, 1 + task)
        write_images(root / "test" / str(task), task, names, 20, 100 + task)
    return root


def of_folders(root: Path, transform: Any = TRANSFORM) -> Any:
    """The benchmark that a user of ImageFolder makes."""
    parts = {
        split: [as_classification_dataset(ImageFolder(str(root / split / str(task)), transform)) for task in (0, 1)]
        for split in ("train", "test")
    }
    return task_incremental_benchmark(benchmark_from_datasets(**parts))


@pytest.fixture(scope="module")
def trained(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> ExpertGateStrategy:
    """A strategy that has learnt from folders of images."""
    storage = tmp_path_factory.mktemp("predict") / "run"
    strategy = tiny_strategy(ClusterConfig(engine="inline", storage=storage), train_epochs=6)
    strategy.train(of_folders(folders).train_stream)
    return strategy


def test_files_are_told_by_name(trained: ExpertGateStrategy, folders: Path) -> None:
    files = sorted((folders / "test").rglob("*.png"))
    found = trained.model.predict(files)
    tasks = [int(file.parts[-3]) for file in files]
    assert [p.task for p in found] == tasks
    right = [p.class_name == file.parent.name for p, file in zip(found, files, strict=True)]
    metrics = trained.eval(of_folders(folders).test_stream)
    for task in (0, 1):
        told = metrics[f"EndToEnd_Acc_Exp/eval_phase/test_stream/Task{task:03d}/Exp{task:03d}"]
        assert told == np.mean(right[20 * task : 20 * task + 20])
    for p in found:
        assert 0.5 <= p.confidence <= 1
        assert {p.class_name, p.second_class_name} == set(NAMES[p.task])
        assert p.second_confidence == pytest.approx(1 - p.confidence, abs=1e-6)  # float32 softmax over two classes
        assert 0.5 <= p.task_confidence <= 1


@pytest.mark.parametrize(
    "cluster",
    [
        pytest.param({"engine": "inline"}, id="inline"),
        pytest.param({"num_workers": 2}, id="ray", marks=[pytest.mark.ray]),
    ],
)
def test_workers_say_the_same(
    cluster: dict[str, Any], trained: ExpertGateStrategy, folders: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if "engine" not in cluster:
        request.getfixturevalue("ray_local")
    files = sorted((folders / "test").rglob("*.png"))
    expected = trained.model.predict(files, batch_size=8)
    # Without the sessions, for its own driver is at work.
    run = shutil.copytree(str(trained.run_dir), tmp_path / "run", ignore=shutil.ignore_patterns("sessions"))
    (tmp_path / "none.png").write_bytes(b"none")
    with tiny_strategy(ClusterConfig(storage=run, resume="append", **cluster)) as strategy:
        assert strategy.predict(files, batch_size=8) == expected
        assert strategy.predict([files[0], tmp_path / "none.png", tmp_path / "gone.png"])[1:] == [None, None]
        assert strategy.predict([]) == []


def test_whatever_way_the_images_come(trained: ExpertGateStrategy, folders: Path) -> None:
    files = sorted((folders / "test" / "1").rglob("*.png"))
    opened = [Image.open(file) for file in files]
    tensors = torch.stack([TRANSFORM(image.convert("RGB")) for image in opened])
    model = trained.model
    expected = model.predict(files)
    same: list[Any] = [map(str, files), opened, tensors, list(tensors), (x for x in opened)]
    assert all(model.predict(images) == expected for images in same)
    assert model.predict(files[0], batch_size=1) == model.predict(opened[0]) == model.predict(tensors[0])
    assert model.predict([]) == []
    assert model.predict(files, transform=TRANSFORM) == expected


def modes_of(model: ExpertGate) -> list[ExpertGate]:
    """A model in every state that users bring it into."""
    other = ExpertGate(SHAPE, arch=tiny_net(5), autoencoder="linear")
    other.load_state_dict(model.state_dict())
    other.train()
    return [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).train(), other]


def test_every_mode_answers_the_same(trained: ExpertGateStrategy, folders: Path) -> None:
    files = sorted((folders / "test").rglob("*.png"))
    images = torch.stack([TRANSFORM(Image.open(file).convert("RGB")) for file in files[:7]])
    model = trained.model
    expected = model.predict(files), model(images), model.gate(images).tasks
    loaded = ExpertGate.load(str(trained.run_dir), arch=tiny_net())
    for other in [*modes_of(model), *modes_of(loaded)]:
        assert other.predict(files) == expected[0]
        assert torch.equal(other(images), expected[1])
        assert torch.equal(other.gate(images).tasks, expected[2])


def test_a_state_dict_of_before_asks_for_the_transform(trained: ExpertGateStrategy, folders: Path) -> None:
    file = next((folders / "test").rglob("*.png"))
    state = {name: value for name, value in trained.model.state_dict().items() if not name.endswith("run.notes")}
    other = ExpertGate(SHAPE, arch=tiny_net(5), autoencoder="linear")
    other.load_state_dict(state)
    with pytest.raises(InputError, match="the run does not tell it: give transform="):
        other.predict(file)
    found = other.predict(file, transform=TRANSFORM)[0]
    expected = trained.model.predict(file)[0]
    assert (found.class_id, found.confidence, found.class_name) == (expected.class_id, expected.confidence, None)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ("gone.png", "gone.png cannot be taken as an image"),
        ([3], "of type int"),
        (3, "of type int"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "have not been through the transform"),
        ([torch.zeros(3, 16, 16, dtype=torch.uint8)], "have not been through the transform"),
        (torch.zeros(2, 3, 8, 8), "the model takes"),
        ([torch.zeros(3, 16, 16), torch.zeros(3, 8, 8)], "several shapes"),
        (Image.new("I;16", (20, 20)), "deeper than a byte"),
    ],
)
def test_what_is_no_image_is_refused(trained: ExpertGateStrategy, images: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        trained.model.predict(images)


def test_before_training_there_is_nothing_to_predict_with() -> None:
    with pytest.raises(InputError, match="train it"):
        tiny_strategy().model.predict(torch.zeros(1, *SHAPE))


# What is found in a dataset


def told_of(dataset: Any, tmp_path: Path, **settings: Any) -> tuple[dict[int, str | None], ImageTransform | None]:
    """Class names and transform that a run keeps of its only task."""
    benchmark = task_incremental_benchmark(benchmark_from_datasets(train=[dataset]))
    storage = str(tmp_path / "run")
    with tiny_strategy(ClusterConfig(engine="inline", storage=storage), train_epochs=0, **settings) as strategy:
        strategy.train(benchmark.train_stream)
        (notes,) = strategy.model._trained().notes.values()
    return notes.names, notes.transform


def folder_of(root: Path, transform: Any = None, target_transform: Any = None) -> ImageFolder:
    return ImageFolder(str(root / "train" / "0"), transform, target_transform)


def test_names_follow_targets_that_are_moved(folders: Path, tmp_path: Path) -> None:
    leaf = folder_of(folders, TRANSFORM, lambda target: 7 - target)
    rows = list(range(0, 60, 3))
    moved = labelled(Subset(leaf, rows), [7 - leaf.targets[row] for row in rows])
    names, transform = told_of(moved, tmp_path)
    assert names == {6: "bee", 7: "ant"}
    assert transform == transform_as_data(TRANSFORM, "RGB")


def test_names_that_are_given_win(folders: Path, tmp_path: Path) -> None:
    data = as_classification_dataset(folder_of(folders, TRANSFORM))
    names, _ = told_of(data, tmp_path, class_names={1: "wasp"})
    assert names == {0: "ant", 1: "wasp"}


def test_a_list_of_names_is_by_class_id(folders: Path, tmp_path: Path) -> None:
    data = as_classification_dataset(folder_of(folders, TRANSFORM))
    assert told_of(data, tmp_path, class_names=["a", "b", "c"])[0] == {0: "a", 1: "b"}


def test_a_transform_in_two_layers_is_found_whole(folders: Path, tmp_path: Path) -> None:
    outer = TransformGroups(
        {"train": (transforms.RandomHorizontalFlip(), None), "eval": (TRANSFORM.transforms[2], None)}
    )
    leaf = folder_of(folders, transforms.Compose(TRANSFORM.transforms[:2]))
    names, transform = told_of(as_classification_dataset(leaf, transform_groups=outer), tmp_path)
    assert transform == transform_as_data(TRANSFORM, "RGB")
    assert names == {0: "ant", 1: "bee"}


class Halved(ImageFolder):
    """Does something after its transform, which its transform does not say."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = super().__getitem__(index)
        return (image / 2 if isinstance(image, Tensor) else image), target


def unknown_of(name: str, root: Path) -> Any:
    if name == "lambda":
        return as_classification_dataset(folder_of(root, lambda image: TRANSFORM(image)))
    if name == "halved":
        return as_classification_dataset(Halved(str(root / "train" / "0"), TRANSFORM))
    if name == "several":
        twice = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
        return as_classification_dataset(folder_of(root, TRANSFORM)).concat(
            as_classification_dataset(folder_of(root, twice))
        )
    return tiny_benchmark((0,), labels=False).train_stream[0].dataset


@pytest.mark.parametrize("name", ["lambda", "halved", "several", "tensors"])
def test_a_transform_that_is_not_sure_is_asked_for(name: str, folders: Path, tmp_path: Path) -> None:
    assert told_of(unknown_of(name, folders), tmp_path)[1] is None
    model = ExpertGate.load(tmp_path / "run", arch=tiny_net())
    file = next((folders / "test").rglob("*.png"))
    with pytest.raises(InputError, match="the run does not tell it: give transform="):
        model.predict(file)
    assert isinstance(model.predict(file, transform=TRANSFORM)[0], Prediction)


def test_a_transform_that_is_given_is_kept(folders: Path, tmp_path: Path) -> None:
    assert told_of(unknown_of("lambda", folders), tmp_path, transform=TRANSFORM)[1] == transform_as_data(
        TRANSFORM, "RGB"
    )


def test_tasks_with_unlike_transforms_ask(folders: Path) -> None:
    unlike = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    data = [
        as_classification_dataset(ImageFolder(str(folders / "train" / str(task)), transform))
        for task, transform in enumerate((TRANSFORM, unlike))
    ]
    with tiny_strategy(train_epochs=0) as strategy:
        strategy.train(task_incremental_benchmark(benchmark_from_datasets(train=data)).train_stream)
        file = next((folders / "test").rglob("*.png"))
        with pytest.raises(InputError, match="tasks 0 and 1 were trained with unlike ones"):
            strategy.model.predict(file)
        assert strategy.model.predict(file, transform=TRANSFORM)


def test_random_data_of_torchvision_are_read_without_their_transform(tmp_path: Path) -> None:
    leaf = FakeData(12, (3, 20, 20), 2, TRANSFORM)
    data = labelled(leaf, [int(leaf[i][1]) for i in range(12)])
    assert told_of(data, tmp_path)[1] == transform_as_data(TRANSFORM, "RGB")


def test_a_task_that_continues_keeps_earlier_names(folders: Path) -> None:
    data = as_classification_dataset(folder_of(folders, TRANSFORM))
    images, _ = task_images(0, 20, 3)
    more = TensorDataset(images, torch.full((20,), 2))
    more.targets = [2] * 20  # type: ignore[attr-defined]
    with tiny_strategy(train_epochs=0) as strategy:
        strategy.train(benchmark_from_datasets(train=[data]).train_stream)
        strategy.train(benchmark_from_datasets(train=[as_classification_dataset(more)]).train_stream)
        assert strategy.model._trained().notes[0].names == {0: "ant", 1: "bee", 2: None}
