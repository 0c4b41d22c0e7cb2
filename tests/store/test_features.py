"""Feature files: what is written comes out again, whatever the batches, and a file is whole or not there."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distributed_eg.errors import StorageError
from distributed_eg.method.standardize import Statistics, standardize
from distributed_eg.store.features import FeatureFile, write_features

WIDTH = 5
ROWS = torch.randn(23, WIDTH, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(23) % 4
STATISTICS = Statistics(torch.linspace(-1, 1, WIDTH), torch.linspace(0.5, 2, WIDTH), 23)


def numbered(batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches whose rows are all of class 0."""
    return ((batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in batches)


@pytest.fixture(params=[(23,), (1,) * 23, (7, 7, 7, 2), (1, 20, 2)], ids=str)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of ``ROWS``, written in batches of these sizes."""
    path = tmp_path / "scratch" / "00001-train.arrow"
    parts = [torch.split(values, list(request.param)) for values in (ROWS, CLASSES)]
    assert write_features(path, zip(*parts, strict=True)) == len(ROWS)
    return path


def test_all_rows_come_out_as_they_were(path: Path) -> None:
    file = FeatureFile(path)
    assert len(file) == len(ROWS)
    assert torch.equal(file.rows(range(len(ROWS))), ROWS)
    assert torch.equal(file.classes, CLASSES)


@pytest.mark.parametrize("size", [1, 3, 22, 23, 24, 1000])
def test_blocks_are_all_rows_in_order_of_any_size(path: Path, size: int) -> None:
    blocks = list(FeatureFile(path).blocks(size))
    assert [len(block) for block in blocks] == [len(part) for part in torch.split(ROWS, size)]
    assert torch.equal(torch.cat(blocks), ROWS)


def test_rows_come_in_the_order_that_was_asked_for_and_may_repeat(path: Path) -> None:
    indices = [22, 0, 7, 7, 6, 13, 0, 21]
    assert torch.equal(FeatureFile(path).rows(indices), ROWS[indices])
    shuffled = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(FeatureFile(path).rows(shuffled.tolist()), ROWS[shuffled])


def test_rows_are_standardized_on_the_way_out_and_the_file_stays_raw(path: Path) -> None:
    """The same rows together give the same bits; other rows beside them may change the last one, for the vectorized
    sigmoid rounds otherwise than the one for the rest: values lie in (0, 1), where 1.2e-7 is two units of the last
    digit."""
    file = FeatureFile(path, STATISTICS)
    assert torch.equal(file.rows([5, 2]), standardize(ROWS[[5, 2]], STATISTICS))
    blocks = list(file.blocks(4))
    for block, part in zip(blocks, torch.split(ROWS, 4), strict=True):
        assert torch.equal(block, standardize(part, STATISTICS))
    torch.testing.assert_close(torch.cat(blocks), standardize(ROWS, STATISTICS), rtol=0, atol=1.2e-7)
    assert torch.equal(FeatureFile(path).rows(range(23)), ROWS)


def test_what_comes_out_is_a_copy(path: Path) -> None:
    file = FeatureFile(path)
    file.rows([3]).zero_()
    next(file.blocks(23)).zero_()
    assert torch.equal(file.rows(range(23)), ROWS)


def test_the_file_may_be_removed_while_it_is_mapped(path: Path) -> None:
    """A task's features go as soon as they are not needed; a slow reader on the same node must not notice."""
    file = FeatureFile(path)
    path.unlink()
    assert torch.equal(torch.cat(list(file.blocks(6))), ROWS)


def test_the_file_may_be_written_again_while_it_is_mapped(path: Path) -> None:
    file = FeatureFile(path)
    write_features(path, [(ROWS[:3] + 1, CLASSES[:3])])
    assert torch.equal(file.rows(range(23)), ROWS)
    assert torch.equal(FeatureFile(path).rows(range(3)), ROWS[:3] + 1)


@pytest.mark.parametrize("index", [23, 1000, -24])
def test_a_row_that_is_not_there_is_an_index_error(path: Path, index: int) -> None:
    with pytest.raises(IndexError):
        FeatureFile(path).rows([0, index])


def test_any_layout_in_memory_is_written_the_same(tmp_path: Path) -> None:
    write_features(tmp_path / "a.arrow", numbered([ROWS]))
    write_features(tmp_path / "b.arrow", numbered([ROWS.T.contiguous().T]))
    wide = torch.cat([ROWS, ROWS], dim=1)
    write_features(tmp_path / "c.arrow", numbered([wide[:, :WIDTH]]))
    assert len({(tmp_path / f"{name}.arrow").read_bytes() for name in "abc"}) == 1


def test_values_that_are_no_numbers_keep_their_bits(tmp_path: Path) -> None:
    rows = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-45]])
    write_features(tmp_path / "a.arrow", numbered([rows]))
    found = FeatureFile(tmp_path / "a.arrow").rows([0])
    assert torch.equal(found.view(torch.int32), rows.view(torch.int32))


def _batches_that_end_in(error: BaseException) -> Iterator[Tensor]:
    yield ROWS[:9]
    raise error


@pytest.mark.parametrize("error", [ValueError("a damaged image"), KeyboardInterrupt(), RuntimeError("CUDA")], ids=repr)
def test_a_batch_that_raises_leaves_no_file_and_the_error_as_it_is(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "00001-train.arrow"
    with pytest.raises(type(error)) as caught:
        write_features(path, numbered(_batches_that_end_in(error)))
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_visible_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "00001-train.arrow"

    def batches() -> Iterator[Tensor]:
        for part in torch.split(ROWS, 8):
            assert not path.exists()
            yield part
        assert not path.exists()

    write_features(path, numbered(batches()))
    assert torch.equal(FeatureFile(path).rows(range(23)), ROWS)


def test_a_second_attempt_that_fails_leaves_the_first_ones_file(tmp_path: Path) -> None:
    path = tmp_path / "00001-train.arrow"
    write_features(path, numbered([ROWS]))
    with pytest.raises(ValueError, match="damaged"):
        write_features(path, numbered(_batches_that_end_in(ValueError("damaged"))))
    assert torch.equal(FeatureFile(path).rows(range(23)), ROWS)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_parts_of_several_tasks_may_be_written_at_once(tmp_path: Path) -> None:
    """Interleaved, as by two workers of one node."""

    def nested() -> Iterator[Tensor]:
        yield ROWS[:4]
        write_features(tmp_path / "00001-valid.arrow", numbered([ROWS[10:]]))
        write_features(tmp_path / "00002-train.arrow", numbered([ROWS[20:]]))
        yield ROWS[4:]

    write_features(tmp_path / "00001-train.arrow", numbered(nested()))
    found = [FeatureFile(tmp_path / f"{name}.arrow") for name in ("00001-train", "00001-valid", "00002-train")]
    assert [len(file) for file in found] == [23, 13, 3]


def test_two_attempts_at_the_same_file_do_not_spoil_each_other(tmp_path: Path) -> None:
    """A worker that was taken for dead still writes while its replacement, on the same node, begins and ends."""
    path = tmp_path / "00001-train.arrow"

    def overtaken() -> Iterator[Tensor]:
        yield ROWS[:4]
        write_features(path, numbered([ROWS]))
        yield ROWS[4:]

    write_features(path, numbered(overtaken()))
    assert torch.equal(FeatureFile(path).rows(range(23)), ROWS)


def test_a_scratch_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("")
    with pytest.raises(StorageError, match="scratch"):
        write_features(tmp_path / "scratch" / "00001-train.arrow", numbered([ROWS]))


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        write_features(tmp_path / "00001-train.arrow", numbered([ROWS]))
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
