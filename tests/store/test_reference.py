"""References between runs: statistics and the root's autoencoder, through a file and through run directories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distributed_eg.errors import ExpertGateError, InputError
from distributed_eg.method.standardize import Statistics
from distributed_eg.store.reference import Reference
from distributed_eg.store.storage import Storage


def statistics() -> Statistics:
    """Statistics of six features."""
    generator = torch.Generator().manual_seed(0)
    return Statistics(torch.randn(6, generator=generator), torch.rand(6, generator=generator) + 0.5, 77)


def autoencoder() -> Mapping[str, Tensor]:
    """Tensors as of an autoencoder."""
    generator = torch.Generator().manual_seed(4)
    return {"components": torch.randn(3, 6, generator=generator), "mean": torch.rand(6, generator=generator)}


ROOTS = [None, autoencoder()]


def same(found: Reference, expected: Reference) -> bool:
    """Whether two references hold the same."""
    ours, theirs = found.statistics, expected.statistics
    roots = found.root_autoencoder, expected.root_autoencoder
    return (
        torch.equal(ours.mean, theirs.mean)
        and torch.equal(ours.std, theirs.std)
        and ours.num_samples == theirs.num_samples
        and (roots[0] is None) == (roots[1] is None)
        and (not roots[0] or not roots[1] or all(torch.equal(roots[0][name], roots[1][name]) for name in roots[1]))
        and (roots[0] or {}).keys() == (roots[1] or {}).keys()
    )


@pytest.mark.parametrize("root", ROOTS, ids=["statistics only", "with a root"])
def test_a_reference_goes_through_a_file_and_through_a_run(tmp_path: Path, root: dict[str, Tensor] | None) -> None:
    """Run to file to another run: the same numbers, and the same artifact in the end."""
    storage = Storage(str(tmp_path / "run"))
    reference = Reference(statistics(), root)
    record = reference.store(storage)
    assert (record.root_autoencoder is None) == (root is None)
    of_run = Reference.of_run(storage, record)
    assert same(of_run, reference)
    of_run.save(tmp_path / "reference.safetensors", "linear")
    loaded = Reference.load(tmp_path / "reference.safetensors", "linear")
    assert same(loaded, reference)
    assert loaded.store(Storage(str(tmp_path / "other"))) == record


def test_a_reference_without_root_fits_either_kind(tmp_path: Path) -> None:
    Reference(statistics(), None).save(tmp_path / "r", "linear")
    assert Reference.load(str(tmp_path / "r"), "sgd").root_autoencoder is None


def test_a_reference_of_another_kind_is_refused_with_both_names(tmp_path: Path) -> None:
    Reference(statistics(), autoencoder()).save(tmp_path / "r", "linear")
    with pytest.raises(InputError, match="'linear' autoencoder, not 'sgd'"):
        Reference.load(tmp_path / "r", "sgd")


def test_a_reference_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    (tmp_path / "folder").mkdir()
    save_file({"mean": torch.zeros(2)}, tmp_path / "other")
    for name in ("missing", "text", "folder", "other"):
        with pytest.raises(InputError, match=name):
            Reference.load(tmp_path / name, "linear")


def test_a_reference_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The run took hours, the path has a slip in it: an error of ours, that a caller may catch and try again."""
    with pytest.raises(ExpertGateError, match="missing"):
        Reference(statistics(), None).save(tmp_path / "missing" / "r", "linear")


def test_a_reference_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    """A run is resumed with the file that it began with, or with one written anew."""
    for index in range(20):
        Reference(statistics(), autoencoder()).save(tmp_path / str(index), "linear")
    assert len({(tmp_path / str(index)).read_bytes() for index in range(20)}) == 1


def test_a_reference_of_an_older_version_keeps_its_number_of_samples(tmp_path: Path) -> None:
    tensors = {"mean": statistics().mean, "std": statistics().std}
    save_file(tensors, tmp_path / "old", metadata={"kind": "linear", "num_samples": "77"})
    assert same(Reference.load(tmp_path / "old", "linear"), Reference(statistics(), None))
