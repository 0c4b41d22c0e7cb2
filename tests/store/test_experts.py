"""Reading a run back: experts on demand, the gate over all tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from distributed_eg.errors import StorageError
from distributed_eg.method.autoencoder import Autoencoder
from distributed_eg.method.expert import derive_expert
from distributed_eg.method.gate import make_gate
from distributed_eg.method.linear_autoencoder import LinearAutoencoder
from distributed_eg.method.sgd_autoencoder import SgdAutoencoder
from distributed_eg.method.standardize import Statistics
from distributed_eg.method.summary import fit_summary
from distributed_eg.store.experts import ExpertReader
from distributed_eg.store.records import StatisticsRecord
from distributed_eg.store.reference import save_statistics
from distributed_eg.store.registry import ExpertRef, GateRef
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.weights import map_tensors, save_tensors
from distributed_eg.types import AutoencoderKind

WIDTH = 6


HEAD = "4"


def network(width: int = WIDTH, seed: int = 0) -> nn.Module:
    """A small network with normalisation and dropout; its head has 4 outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))


def statistics(seed: int = 0) -> Statistics:
    """Statistics of ``WIDTH`` features."""
    generator = torch.Generator().manual_seed(seed)
    return Statistics(torch.randn(WIDTH, generator=generator), torch.rand(WIDTH, generator=generator) + 0.5, 77)


def autoencoder(kind: AutoencoderKind, seed: int, rank: int = 3) -> Autoencoder:
    """An autoencoder that nobody fitted."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "linear":
        components = torch.linalg.qr(torch.randn(WIDTH, rank, generator=generator)).Q.T
        return LinearAutoencoder(components, torch.ones(rank), torch.rand(WIDTH, generator=generator), torch.tensor(9))
    shapes = ((rank, WIDTH), (rank,), (WIDTH, rank), (WIDTH,))
    return SgdAutoencoder(*(torch.randn(*shape, generator=generator) for shape in shapes))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def seal_expert(storage: Storage, task: int, classes: Sequence[int]) -> tuple[ExpertRef, nn.Module]:
    """An expert of ``network()`` in the run directory."""
    expert = derive_expert(network(), HEAD, len(classes), seed=task + 1)
    artifact = save_tensors(storage, f"tasks/{task:05d}/expert", expert.state_dict())
    return ExpertRef(artifact, tuple(classes)), expert


def path_of(ref: ExpertRef) -> str:
    """Where a sealed expert is."""
    assert isinstance(ref.source, Artifact)
    return ref.source.path


def count_loads(reader: ExpertReader, refs: Sequence[ExpertRef]) -> int:
    """How many files are read to get the experts at ``refs``."""
    with mock.patch.object(Storage, "verified_file", autospec=True, side_effect=Storage.verified_file) as loads:
        for ref in refs:
            reader.expert(ref)
    return loads.call_count


def test_an_expert_answers_as_the_one_that_was_sealed(storage: Storage) -> None:
    """Other head sizes than the root's, in eval mode, bit for bit."""
    images = torch.randn(5, WIDTH)
    reader = ExpertReader(partial(map_tensors, storage), network(), HEAD, 2, "cpu")
    for task, classes in enumerate([(3, 8), (0, 1, 2, 4, 5, 6, 7), (9,)]):
        ref, sealed = seal_expert(storage, task, classes)
        read = reader.expert(ref)
        assert read.classes == classes
        assert not read.network.training
        assert not any(parameter.requires_grad for parameter in read.network.parameters())
        assert torch.equal(read.network(images), sealed.eval()(images))


def test_reading_leaves_the_root_and_the_generator_alone(storage: Storage) -> None:
    root = network().train()
    before = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    ref, _ = seal_expert(storage, 0, (0, 1))
    state = torch.get_rng_state()
    ExpertReader(partial(map_tensors, storage), root, HEAD, 1, "cpu").expert(ref)
    assert torch.equal(torch.get_rng_state(), state)
    assert root.training
    assert all(parameter.requires_grad for parameter in root.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in root.state_dict().items())


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_at_most_capacity_experts_stay_in_memory(storage: Storage, capacity: int) -> None:
    refs = [seal_expert(storage, task, (0, 1))[0] for task in range(4)]
    reader = ExpertReader(partial(map_tensors, storage), network(), HEAD, capacity, "cpu")
    assert count_loads(reader, refs) == 4
    assert count_loads(reader, refs[-capacity:]) == 0, "the newest are there"
    assert count_loads(reader, refs[: 4 - capacity]) == 4 - capacity, "the others are read again"


def test_the_least_recently_used_expert_goes_first(storage: Storage) -> None:
    a, b, c, d = (seal_expert(storage, task, (0, 1))[0] for task in range(4))
    reader = ExpertReader(partial(map_tensors, storage), network(), HEAD, 3, "cpu")
    assert count_loads(reader, [a, b, c, a, d]) == 4
    assert count_loads(reader, [a, c, d]) == 0, "a was used after b"
    assert count_loads(reader, [b]) == 1
    assert count_loads(reader, [c, d]) == 0, "b took the place of a"
    assert count_loads(reader, [a]) == 1


def test_an_expert_that_was_evicted_comes_back_the_same(storage: Storage) -> None:
    a, b = (seal_expert(storage, task, (0, 1))[0] for task in range(2))
    reader = ExpertReader(partial(map_tensors, storage), network(), HEAD, 1, "cpu")
    images = torch.randn(3, WIDTH)
    first = reader.expert(a).network(images)
    reader.expert(b)
    assert torch.equal(reader.expert(a).network(images), first)


def test_what_is_read_is_no_part_of_the_file(storage: Storage) -> None:
    """Files are mapped while they are copied: nothing that stays may change with them, nor change them."""
    ref, sealed = seal_expert(storage, 0, (0, 1))
    reader = ExpertReader(partial(map_tensors, storage), network(), HEAD, 1, "cpu")
    read, copies = reader.expert(ref).network, reader.copies(ref.source)
    os.truncate(f"{storage.local_folder}/{ref.source.path}", 0)
    for found in (read.state_dict(), copies):
        assert all(torch.equal(found[name], value) for name, value in sealed.state_dict().items())


def test_experts_with_equal_weights_keep_their_own_classes(storage: Storage) -> None:
    """Two tasks may end with the same bytes; what their outputs stand for is still each task's own."""
    ref, _ = seal_expert(storage, 0, (0, 1))
    twin = ExpertRef(ref.source, (6, 7))
    reader = ExpertReader(partial(map_tensors, storage), network(), HEAD, 2, "cpu")
    assert reader.expert(ref).classes == (0, 1)
    assert reader.expert(twin).classes == (6, 7)


def test_experts_in_memory_are_read_by_their_task_s_number() -> None:
    experts = {task: derive_expert(network(), HEAD, 2, seed=task) for task in (0, 1)}
    reader = ExpertReader(lambda task: experts[task].state_dict(), network(), HEAD, 2, "cpu")
    images = torch.randn(5, WIDTH)
    for task, expert in experts.items():
        assert torch.equal(reader.expert(ExpertRef(task, (0, 1))).network(images), expert.eval()(images))


@pytest.mark.parametrize(
    ("root", "classes"),
    [
        (network(width=WIDTH + 1), (0, 1)),
        (nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5))), (0, 1)),
        (network(), (0, 1, 2)),
    ],
    ids=["other width", "other layers", "other head"],
)
def test_an_expert_of_another_architecture_is_named(storage: Storage, root: nn.Module, classes: tuple[int]) -> None:
    ref, _ = seal_expert(storage, 0, (0, 1))
    with pytest.raises(StorageError, match="does not fit this run's backbone") as caught:
        ExpertReader(partial(map_tensors, storage), root, HEAD, 1, "cpu").expert(ExpertRef(ref.source, classes))
    assert path_of(ref) in str(caught.value)


def test_a_damaged_expert_is_named_and_the_reader_goes_on(storage: Storage, tmp_path: Path) -> None:
    good, bad = (seal_expert(storage, task, (0, 1))[0] for task in range(2))
    (tmp_path / "run" / path_of(bad)).write_bytes(b"")
    reader = ExpertReader(partial(map_tensors, storage), network(), HEAD, 1, "cpu")
    with pytest.raises(StorageError, match="damaged") as caught:
        reader.expert(bad)
    assert path_of(bad) in str(caught.value)
    reader.expert(good)


@pytest.mark.parametrize("kind", ["linear", "sgd"])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_the_gate_is_the_one_that_was_built_by_hand(
    storage: Storage, kind: AutoencoderKind, threshold: float | None
) -> None:
    """Tasks out of order and with gaps; linear autoencoders of different ranks. Same tensors, so bit-equal routing."""
    made = {task: autoencoder(kind, task, rank=2 + (task % 3 if kind == "linear" else 0)) for task in (7, 0, 3)}
    refs = tuple((task, save_tensors(storage, f"tasks/{task}/a", a.tensors())) for task, a in made.items())
    record = StatisticsRecord(save_statistics(storage, statistics()), 77)
    ref = GateRef(kind, record, refs, 0.7, threshold)
    read = ExpertReader(partial(map_tensors, Storage(storage.uri)), network(), HEAD, 1, "cpu").gate(ref)
    by_hand = make_gate(made, statistics(), 0.7, threshold)
    assert read.tasks == by_hand.tasks == (0, 3, 7)
    features = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(5))
    found, expected = read.route(features), by_hand.route(features)
    assert len(expected.tasks.unique()) > 1, "a test in which one task takes all would prove little"
    assert all(torch.equal(*pair) for pair in zip(found[:3], expected[:3], strict=True))
    assert bool(found.strangeness.isnan().all())  # nobody noted what was held out
    answering, expected_answering = read.answering(found), by_hand.answering(expected)
    assert answering.keys() == expected_answering.keys()
    assert all(torch.equal(weights, expected_answering[task]) for task, weights in answering.items())


def test_statistics_and_autoencoders_are_read_once(storage: Storage) -> None:
    artifact = save_tensors(storage, "tasks/0/a", autoencoder("linear", 0).tensors())
    ref = GateRef("linear", StatisticsRecord(save_statistics(storage, statistics()), 77), ((0, artifact),), 2.0, None)
    reader = ExpertReader(partial(map_tensors, storage), network(), HEAD, 1, "cpu")
    with mock.patch.object(Storage, "verified_file", autospec=True, side_effect=Storage.verified_file) as loads:
        reader.gate(ref)
        reader.gate(ref)
    assert loads.call_count == 2
    assert reader.statistics(ref.statistics).num_samples == 77


def test_what_a_stage_trained_is_read_from_memory_and_is_let_go_of(storage: Storage) -> None:
    (a, trained), (b, _) = (seal_expert(storage, task, (0, 1)) for task in range(2))
    reader = ExpertReader(partial(map_tensors, storage), network(), HEAD, 2, "cpu")
    images = torch.randn(3, WIDTH)
    kept = reader.keep(a, trained.state_dict())
    assert count_loads(reader, [a]) == 0
    assert torch.equal(kept.network(images), trained.eval()(images))
    assert {p.data_ptr() for p in kept.network.parameters()}.isdisjoint(p.data_ptr() for p in trained.parameters())
    assert count_loads(reader, [b]) == 1
    reader.release(but=a)
    assert count_loads(reader, [a]) == 0
    reader.release()
    assert count_loads(reader, [a, b]) == 2
    reader.clear()
    assert count_loads(reader, [a, b]) == 2


def test_summaries_are_cut_as_tasks_come_and_whole_again_as_they_go(storage: Storage) -> None:
    rows = torch.rand(60, 50, generator=torch.Generator().manual_seed(3))
    made = [fit_summary((rows + task / 10).split, torch.arange(60) % 2) for task in range(3)]
    artifacts = [save_tensors(storage, f"tasks/{task}/summary", s.tensors()) for task, s in enumerate(made)]
    reader = ExpertReader(partial(map_tensors, storage), network(), HEAD, 1, "cpu")
    most_bytes = 4 * 50 * 30  # thirty directions of fifty features
    for num_tasks, kept in ((1, 30), (3, 10), (2, 15), (1, 30)):
        found = reader.summaries(artifacts[:num_tasks], most_bytes)
        assert [len(summary.scatter) for summary in found] == [kept] * num_tasks
        for summary, whole in zip(found, made, strict=False):
            assert torch.equal(summary.scatter, whole.scatter[:kept])
            assert torch.equal(summary.means, whole.means)
