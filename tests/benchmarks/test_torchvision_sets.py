"""The benchmarks over torchvision's datasets: one shared object a split, right class ids, chosen samples."""

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from avalanche.benchmarks.utils import AvalancheDataset
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets import VisionDataset

from distributed_eg.benchmarks import Benchmark, make_benchmark
from distributed_eg.benchmarks.benchmark import IMAGENET_MEAN, IMAGENET_STD
from distributed_eg.errors import InputError
from tests.benchmarks.stand_ins import ColourImages

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not ((DATA / "MNIST").is_dir() and (DATA / "FashionMNIST").is_dir()), reason="no MNIST and FashionMNIST files"
)


def split(name: str, **options: object) -> Benchmark:
    return make_benchmark(name, **({"data": DATA, "image_size": 32} | options))


def strip(dataset: AvalancheDataset) -> tuple[bytes, list[Dataset]]:
    """The pickle of `dataset` without its torchvision datasets, and those."""
    leaves: list[Dataset] = []

    class Stripper(pickle.Pickler):
        def persistent_id(self, obj: object) -> int | None:
            if not isinstance(obj, VisionDataset):
                return None
            leaves.append(obj)
            return len(leaves) - 1

    buffer = io.BytesIO()
    Stripper(buffer).dump(dataset)
    return buffer.getvalue(), leaves


@needs_data
@pytest.mark.parametrize(("name", "domain"), [("split-mnist", "MNIST"), ("split-fashion-mnist", "FashionMNIST")])
def test_five_tasks_of_two_classes_over_all_samples(name, domain):
    benchmark = split(name, image_size=None)
    assert benchmark.shape == (3, 96, 96)
    assert benchmark.domains == (domain,) * 5
    assert benchmark.num_classes == 10
    assert sum(len(experience.dataset) for experience in benchmark.scenario.train_stream) == 60_000
    assert sum(len(experience.dataset) for experience in benchmark.scenario.test_stream) == 10_000
    for k, experience in enumerate(benchmark.scenario.train_stream):
        assert set(experience.dataset.targets) == {2 * k, 2 * k + 1}
        assert experience.task_label == k
    image, target, task = benchmark.scenario.test_stream[1].dataset[0]
    assert (image.shape, image.dtype, task) == ((3, 96, 96), torch.float32, 1)
    assert target in (2, 3)


@needs_data
@pytest.mark.parametrize("stream", ["train_stream", "test_stream"])
def test_all_tasks_of_a_split_view_one_dataset_object(stream):
    """Ten tasks over two datasets hold two objects, and next to them a pickle without pixels."""
    benchmark = split("split-mnist+fashion", train_per_task=20, test_per_task=20)
    found = []
    for experience in getattr(benchmark.scenario, stream):
        content, leaves = strip(experience.dataset)
        assert len(content) < 10_000
        assert len({id(leaf) for leaf in leaves}) == 1
        found.append(leaves[0])
    assert [type(leaf).__name__ for leaf in found] == ["MNIST", "FashionMNIST"] * 5
    assert all(leaf is found[k % 2] for k, leaf in enumerate(found))


@needs_data
def test_two_datasets_take_turns_and_share_no_class():
    """The id of a sample and the id in `targets` agree, Fashion-MNIST's raised by 10."""
    benchmark = split("split-mnist+fashion", train_per_task=4, test_per_task=2)
    assert benchmark.domains == ("MNIST", "FashionMNIST") * 5
    assert benchmark.task_names[:3] == ("MNIST 0-1", "FashionMNIST 0-1", "MNIST 2-3")
    seen: list[int] = []
    for experience in benchmark.scenario.train_stream:
        assert [sample[1] for sample in experience.dataset] == list(experience.dataset.targets)
        seen += sorted(set(experience.dataset.targets))
    assert sorted(seen) == list(range(20)) == list(range(benchmark.num_classes))
    assert seen[:4] == [0, 1, 10, 11]


@needs_data
def test_sizes_are_balanced_and_per_task():
    benchmark = split("split-mnist", train_per_task=[10, 20, 31, 40, 50], test_per_task=8)
    assert [len(experience.dataset) for experience in benchmark.scenario.train_stream] == [10, 20, 30, 40, 50]
    assert [len(experience.dataset) for experience in benchmark.scenario.test_stream] == [8] * 5
    for experience in benchmark.scenario.train_stream:
        assert len(set(np.unique(list(experience.dataset.targets), return_counts=True)[1])) == 1
    with pytest.raises(InputError, match="images of class 0 of MNIST, which has 5923"):
        split("split-mnist", train_per_task=20_000)


@needs_data
def test_seed_decides_which_samples():
    def digest(seed: int) -> str:
        stream = split("split-mnist", train_per_task=20, seed=seed).scenario.train_stream
        pixels = [sample[0].numpy().tobytes() for experience in stream for sample in experience.dataset]
        return hashlib.sha256(b"".join(pixels)).hexdigest()

    assert digest(1) == digest(1) != digest(2)


def test_colour_images_keep_their_channels(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "CIFAR10", ColourImages)
    benchmark = make_benchmark("split-cifar10", data=tmp_path, image_size=16, test_per_task=4)
    assert [len(experience.dataset) for experience in benchmark.scenario.train_stream] == [8] * 5
    assert [len(experience.dataset) for experience in benchmark.scenario.test_stream] == [4] * 5
    for image, target, _ in benchmark.scenario.test_stream[2].dataset:
        colour = torch.tensor([target * 20 / 255, 0, 1])
        expected = (colour - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 16, 16))


def test_failed_download_says_what_and_why(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "CIFAR10", ColourImages)
    with pytest.raises(InputError, match=r"could not download CIFAR10 into .*: no route to host"):
        make_benchmark("split-cifar10", data=tmp_path, download=True)
