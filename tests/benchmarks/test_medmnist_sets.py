"""MedMNIST's datasets, from small files of its form."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from distributed_eg.benchmarks import make_benchmark
from distributed_eg.errors import InputError


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images of each class of PneumoniaMNIST's and BloodMNIST's."""
    medmnist = pytest.importorskip("medmnist", reason="the extra medmnist is not installed")
    for flag, num_classes, channels in (("pneumoniamnist", 2, ()), ("bloodmnist", 8, (3,))):
        labels = np.repeat(np.arange(num_classes), 3)[:, None].astype(np.uint8)
        images = np.broadcast_to(
            20 * labels.reshape(-1, *(1 for _ in (28, 28, *channels))), (len(labels), 28, 28, *channels)
        )
        np.savez(
            tmp_path / f"{flag}.npz",
            **{
                f"{part}_{what}": value
                for part in ("train", "val", "test")
                for what, value in (("images", images), ("labels", labels))
            },
        )
        # Its classes refuse another number of images than the published files have.
        counts = dict.fromkeys(("train", "val", "test"), len(labels))
        monkeypatch.setitem(medmnist.INFO[flag], "n_samples", counts)
    return tmp_path


def test_each_is_a_task_with_its_own_class_names(data: Path) -> None:
    benchmark = make_benchmark("medmnist:pneumoniamnist+medmnist:bloodmnist", data=data, image_size=16)
    assert benchmark.task_names == ("medmnist:pneumoniamnist", "medmnist:bloodmnist")
    assert (benchmark.class_names[1], benchmark.class_names[2]) == ("pneumonia", "basophil")
    for experience, first in zip(benchmark.scenario.train_stream, (0, 2), strict=True):
        samples = list(pickle.loads(pickle.dumps(experience.dataset)))
        assert [sample[1] for sample in samples] == list(experience.dataset.targets)
        assert all(type(sample[1]) is int for sample in samples)
        assert {tuple(sample[0].shape) for sample in samples} == {(3, 16, 16)}
        grey = [round(float(image[0, 0, 0] * 0.229 + 0.485) * 255) for image, *_ in samples]
        assert grey == [20 * (target - first) for _, target, _ in samples]
    split = make_benchmark("medmnist:bloodmnist", data=data, image_size=16, classes_per_task=4)
    assert split.task_names == ("medmnist:bloodmnist 0-3", "medmnist:bloodmnist 4-7")


def test_a_missing_or_damaged_file_is_named(data: Path) -> None:
    with pytest.raises(InputError, match=r"needs MedMNIST's pathmnist.npz, and .* does not have pathmnist.npz"):
        make_benchmark("medmnist:pathmnist", data=data)
    with pytest.raises(InputError, match="no folder was given: pass --data DIR"):
        make_benchmark("medmnist:pathmnist")
    for content in (b"", b"PK\3\4 cut off"):
        (data / "pathmnist.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"does not have pathmnist.npz, or not whole"):
            make_benchmark("medmnist:pathmnist", data=data)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(InputError, match=r"pip install 'distributed-eg\[medmnist\]'"):
        make_benchmark("medmnist:pathmnist", data=".")


def test_the_catalogue_agrees_with_the_package() -> None:
    from distributed_eg.benchmarks.catalog import MEDMNIST

    medmnist = pytest.importorskip("medmnist", reason="the extra medmnist is not installed")
    flat = {
        flag: (len(info["label"]), "RGB" if info["n_channels"] == 3 else "grey")
        for flag, info in medmnist.INFO.items()
        if not flag.endswith("3d") and "multi-label" not in info["task"]
    }
    assert flat == dict(MEDMNIST)
