"""Datasets cut into tasks: classes, ids and labels of chains, orders, rotations, permutations and pairs."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image

from distributed_eg import ExpertGate
from distributed_eg.benchmarks import Benchmark, make_benchmark
from distributed_eg.benchmarks.benchmark import IMAGENET_MEAN, IMAGENET_STD, part_of
from distributed_eg.benchmarks.changes import Permuted, Rotated
from distributed_eg.errors import InputError
from distributed_eg.method.image_transform import ImageReader, transform_as_data
from tests.benchmarks.stand_ins import ColourImages
from tests.helpers import tiny_net, tiny_strategy


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten classes of four images each stand for both datasets."""
    monkeypatch.setattr(datasets, "CIFAR10", ColourImages)
    monkeypatch.setattr(datasets, "MNIST", ColourImages)


def made(name: str, **options: object) -> Benchmark:
    return make_benchmark(name, **({"data": ".", "image_size": 16} | options))


def classes_of(benchmark: Benchmark, stream: str = "train") -> list[list[int]]:
    """Of each task; what a sample says is what its dataset's targets say."""
    found = []
    for label, experience in zip(benchmark.labels, benchmark.scenario.streams[stream], strict=True):
        dataset = experience.dataset
        assert [tuple(sample[1:]) for sample in dataset] == [(target, label) for target in dataset.targets]
        assert (experience.task_label, list(dataset.targets_task_labels)) == (label, [label] * len(dataset))
        found.append(sorted(set(dataset.targets)))
    return found


def test_a_chain_numbers_on(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "x+y" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "x+y" / name / f"{number}.png")
    benchmark = made(f"split-mnist+folder:{tmp_path}/x+y+split-cifar10", train_per_task=2, test_per_task=2)
    assert benchmark.labels == tuple(range(11))
    expected = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15], [16, 17], [18, 19], [20, 21]]
    assert classes_of(benchmark) == classes_of(benchmark, "test") == expected
    assert [benchmark.class_names[c] for c in (0, 10, 11, 12)] == ["colour 0", "a", "b", "colour 0"]
    assert [e.current_experience for e in benchmark.scenario.test_stream] == list(range(11))
    later = part_of(benchmark, [10, 5], 30, 100)
    assert classes_of(later) == [[120, 121], [110, 111]]
    assert list(later.class_names) == [110, 111, 120, 121]


def test_a_chain_has_the_images_that_its_parts_have_alone() -> None:
    chain = made("embedded+split-cifar10", train_per_task=6, test_per_task=6)
    alone = [made(name, train_per_task=6, test_per_task=6) for name in ("embedded", "split-cifar10")]
    datasets_of_parts = [e.dataset for benchmark in alone for e in benchmark.scenario.train_stream]
    for experience, dataset in zip(chain.scenario.train_stream, datasets_of_parts, strict=True):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(experience.dataset, dataset, strict=True))


def test_classes_per_task_leave_no_class_alone() -> None:
    assert classes_of(made("split-cifar10", classes_per_task=3)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert classes_of(made("split-cifar10", classes_per_task=4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert classes_of(made("split-cifar10", classes_per_task=50)) == [list(range(10))]


def test_an_order_is_drawn_by_its_seed_and_ids_stay_the_datasets_own() -> None:
    benchmark = made("split-cifar10", order_seed=1)
    drawn = classes_of(benchmark)
    assert sorted(c for task in drawn for c in task) == list(range(10))
    assert drawn != classes_of(made("split-cifar10"))
    assert drawn == classes_of(made("split-cifar10", order_seed=1)) != classes_of(made("split-cifar10", order_seed=2))
    assert all(benchmark.class_names[c] == f"colour {c}" for c in range(10))
    image, target, _ = benchmark.scenario.train_stream[0].dataset[0]
    red = image[0, 0, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    assert round(float(red) * 255) == 20 * target


class Corner(ColourImages):
    """Images whose upper left quarter is bright."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = np.zeros((16, 16, 3), dtype=np.uint8)
        pixels[:8, :8] = 200 + self.targets[index]
        return Image.fromarray(pixels), self.targets[index]


def bright(image: torch.Tensor) -> list[int]:
    """Which quarters are bright, in the order of reading."""
    quarters = image[0].reshape(2, 8, 2, 8).mean((1, 3)).flatten()
    return (quarters > 0).nonzero().flatten().tolist()


def test_rotations_are_tasks_of_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CIFAR10", Corner)
    benchmark = made("rotated-4:split-cifar10")
    assert benchmark.task_names[:2] == ("CIFAR10", "CIFAR10 rotated 90°")
    assert [bright(e.dataset[0][0]) for e in benchmark.scenario.train_stream] == [[0], [2], [3], [1]]
    assert classes_of(benchmark) == [list(range(10 * task, 10 * task + 10)) for task in range(4)]
    assert benchmark.class_names[37] == "colour 7 (rotated 270°)"
    assert len(made("rotated-3:split-cifar10", classes_per_task=5).labels) == 6


def test_permutations_keep_an_images_values_and_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CIFAR10", Corner)

    def first_images(seed: int) -> list[torch.Tensor]:
        stream = made("permuted-3:split-cifar10", seed=seed).scenario.test_stream
        return [experience.dataset[0][0] for experience in stream]

    plain, *others = first_images(3)
    assert bright(plain) == [0]
    for image in others:
        assert not torch.equal(image, plain)
        assert torch.equal(image.flatten(1).sort().values, plain.flatten(1).sort().values)
    assert not torch.equal(*others)
    assert all(torch.equal(a, b) for a, b in zip(first_images(3), [plain, *others], strict=True))
    assert not torch.equal(first_images(4)[1], others[0])


@pytest.mark.parametrize("name", ["rotated-3:split-cifar10", "permuted-3:split-cifar10"])
def test_what_is_saved_of_a_changed_image_reads_as_that_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CIFAR10", Corner)
    benchmark = made(name)
    image = benchmark.scenario.test_stream[1].dataset[0][0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    saved = to_pil_image(((image * std + mean) * 255).round().to(torch.uint8))
    assert torch.equal(ImageReader(transform_as_data(benchmark.transform, "RGB"), benchmark.shape)(saved), image)


def test_a_thousand_tasks_are_made_one_by_one() -> None:
    """45 pairs in 24 rotations: no dataset is made before it is asked for, and each says its own ids."""
    benchmark = made("pairs:split-cifar10", train_per_task=4, test_per_task=2)
    assert len(benchmark.labels) == 1080
    assert benchmark.num_classes == len(benchmark.class_names) == 2160
    for task in (0, 44, 45, 1079):
        experience = benchmark.scenario.train_stream[task]
        assert callable(experience._dataset)
        assert sorted(set(experience.dataset.targets)) == [2 * task, 2 * task + 1]
        assert len(experience.dataset) == 4
    assert benchmark.task_names[44] == "CIFAR10 8-9"
    assert benchmark.task_names[1079] == "CIFAR10 8-9 rotated 345°"
    assert benchmark.class_names[2159] == "colour 9 (8-9, rotated 345°)"
    assert len({*benchmark.class_names.values()}) == 2160


def test_tasks_of_a_long_sequence_train_and_route() -> None:
    benchmark = part_of(made("pairs-2:split-cifar10", train_per_task=8, test_per_task=4), [0, 44, 89], 0, 0)
    model = ExpertGate(benchmark.shape, arch=tiny_net(), autoencoder="linear", gate_score="shared")
    with tiny_strategy(model=model) as strategy:
        strategy.train(benchmark.scenario.train_stream)
        metrics = strategy.eval(benchmark.scenario.test_stream)
        assert strategy.registry["label"].to_pylist() == [0, 44, 89]
    assert any(name.startswith("EndToEnd_Acc_Stream") for name in metrics)


def test_changes_travel() -> None:
    for change in (Rotated(15.0), Permuted(3, 1)):
        assert pickle.loads(pickle.dumps(change)) == change


def test_more_images_than_a_class_has_are_refused() -> None:
    with pytest.raises(InputError, match="test_per_task asks for 5 images of class 0 of CIFAR10, which has 4"):
        made("split-cifar10", test_per_task=10)
