"""The embedded benchmark: what its tasks hold, and that no test pixel is ever trained on."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_eg.benchmarks import Benchmark, make_benchmark
from distributed_eg.benchmarks.embedded import TASKS, cut_patches, patch_tiles, read_photograph
from distributed_eg.errors import InputError

PHOTOGRAPHS = [source for task in TASKS for source in task.classes if isinstance(source, str)]


def small(**options: object) -> Benchmark:
    return make_benchmark("embedded", **({"image_size": 16, "train_per_task": 12, "test_per_task": 6} | options))


def images(experience) -> torch.Tensor:
    return torch.stack([sample[0] for sample in experience.dataset])


def digest(benchmark: Benchmark, stream: str) -> str:
    content = hashlib.sha256()
    for experience in getattr(benchmark.scenario, stream):
        content.update(images(experience).numpy().tobytes())
        content.update(np.asarray(list(experience.dataset.targets)).tobytes())
    return content.hexdigest()


@pytest.fixture(scope="module")
def whole() -> Benchmark:
    return make_benchmark("embedded")


def test_default_sizes_and_types(whole):
    """Without options: 8 tasks, 240 training and 120 test images each, float32 at 64 x 64."""
    assert whole.shape == (3, 64, 64)
    assert len(whole.task_names) == len(whole.domains) == len(TASKS) == 8
    for stream, count in (("train_stream", 240), ("test_stream", 120)):
        experiences = list(getattr(whole.scenario, stream))
        assert [len(experience.dataset) for experience in experiences] == [count] * 8
        assert [experience.task_label for experience in experiences] == list(range(8))
        for experience in experiences:
            image, target, task = experience.dataset[0]
            assert image.shape == whole.shape
            assert image.dtype == torch.float32
            assert (int(target), task) == (experience.dataset.targets[0], experience.task_label)


def test_pixels_are_normalised(whole):
    """Over natural images the normalised values are centred and of unit size, and finite."""
    pixels = images(whole.scenario.train_stream[0])
    assert torch.isfinite(pixels).all()
    assert abs(float(pixels.mean())) < 1
    assert 0.5 < float(pixels.std()) < 2


def test_classes_are_unique_over_the_sequence_and_balanced(whole):
    for stream in (whole.scenario.train_stream, whole.scenario.test_stream):
        seen: list[int] = []
        for experience in stream:
            classes, counts = np.unique(list(experience.dataset.targets), return_counts=True)
            assert len(set(counts)) == 1
            seen += classes.tolist()
        assert seen == list(range(whole.num_classes))


def test_domains_repeat_and_are_interleaved(whole):
    """A task's domain is never that of the task just before it, and two domains come twice."""
    assert len(set(whole.domains)) >= 3
    assert sum(whole.domains.count(domain) >= 2 for domain in set(whole.domains)) >= 2
    assert all(before != after for before, after in zip(whole.domains, whole.domains[1:], strict=False))


def test_no_image_is_in_both_streams(whole):
    train, test = (
        {hashlib.sha256(image.numpy().tobytes()).digest() for experience in stream for image in images(experience)}
        for stream in (whole.scenario.train_stream, whole.scenario.test_stream)
    )
    assert not train & test


@pytest.mark.parametrize("file_name", PHOTOGRAPHS)
def test_train_and_test_tiles_share_no_pixel(file_name):
    photograph = read_photograph(file_name)
    side, train, test = patch_tiles(photograph)
    owners = np.zeros((photograph.height, photograph.width), dtype=int)
    for left, top in train + test:
        owners[top : top + side, left : left + side] += 1
    assert owners.max() == 1
    assert owners.sum() == len(train + test) * side**2  # no tile leaves the photograph
    assert min(len(train), len(test)) >= 10


def test_training_patches_do_not_depend_on_test_tiles():
    """Painting over every pixel outside the training tiles leaves each training patch as it was."""
    photograph = read_photograph("brick.png")
    side, train, _ = patch_tiles(photograph)
    pixels = np.array(photograph)
    outside = np.ones(pixels.shape[:2], dtype=bool)
    for left, top in train:
        outside[top : top + side, left : left + side] = False
    # Inverted, not blank: a flat tile would be left out, which changes the order of the test tiles alone.
    pixels[outside] = 255 - pixels[outside]
    patches = [
        cut_patches(picture, train, side, 30, 16, np.random.default_rng(0))
        for picture in (photograph, Image.fromarray(pixels))
    ]
    assert patches[0].shape == (30, 16, 16, 3)
    assert np.array_equal(*patches)


def test_same_seed_same_bytes_other_seed_other_bytes():
    assert digest(small(seed=3), "train_stream") == digest(small(seed=3), "train_stream")
    assert digest(small(seed=3), "test_stream") == digest(small(seed=3), "test_stream")
    assert digest(small(seed=3), "train_stream") != digest(small(seed=4), "train_stream")


def test_test_images_do_not_depend_on_the_training_size():
    assert digest(small(train_per_task=12), "test_stream") == digest(small(train_per_task=24), "test_stream")


def test_sizes_per_task():
    sizes = [12, 24, 12, 7, 12, 12, 12, 12]
    benchmark = small(train_per_task=sizes, image_size=None)
    assert benchmark.shape == (3, 64, 64)
    assert [len(experience.dataset) for experience in benchmark.scenario.train_stream] == [
        12,
        24,
        12,
        6,
        12,
        12,
        12,
        12,
    ]


def test_more_digits_than_there_are_is_refused():
    with pytest.raises(InputError, match="lower train_per_task"):
        small(train_per_task=600)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(InputError, match=r"pip install 'distributed-eg\[demo\]'"):
        small()
