"""The stages as a worker runs them: what LwF and fine-tuning take from the parent, caches, in-place transforms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_eg import ClusterConfig, ExpertGateStrategy
from distributed_eg.runtime.messages import Done, ExpertRequest, ExpertResult, FeaturesRequest, Raised, TaskInput
from distributed_eg.runtime.worker.worker import TaskWorker
from distributed_eg.store.experts import ExpertRef
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import load_tensors, save_tensors
from distributed_eg.strategy.strategy import _DRIVER_ONLY
from distributed_eg.strategy.tasks.experiences import info_of, parts_of, task_data
from distributed_eg.strategy.training.packing import pack
from distributed_eg.strategy.training.trainer import StrategyTrainer
from distributed_eg.types import TransferChoice
from tests.helpers import DOMAINS, SETTINGS, tiny_benchmark, tiny_strategy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An inline run over four tasks, still open."""
    storage = str(tmp_path_factory.mktemp("run") / "run")
    with tiny_strategy(ClusterConfig(engine="inline", storage=storage), **SETTINGS) as strategy:
        strategy.train(tiny_benchmark(DOMAINS).train_stream)
        yield strategy


def manifests(strategy: ExpertGateStrategy) -> Any:
    """Manifests by task."""
    assert strategy._open is not None
    return strategy._open.session.registry.manifests


def worker_of(strategy: ExpertGateStrategy) -> TaskWorker:
    """The inline engine's worker."""
    assert strategy._open is not None
    return strategy._open.engine._worker  # type: ignore[attr-defined]


def expert_of_child(strategy: ExpertGateStrategy, transfer: str, perturb: str | None) -> ExpertResult:
    """Train a fifth task from task 0, whose stored tensors that contain ``perturb`` in their name are changed."""
    assert strategy._open is not None
    storage = Storage(strategy.run_dir or "")
    parent = manifests(strategy)[0]
    state = load_tensors(storage, parent.expert)
    if perturb is not None:
        state = {name: value + 0.5 if perturb in name else value for name, value in state.items()}
    artifact = save_tensors(storage, "perturbed", state)
    experience = tiny_benchmark((*DOMAINS, 1)).train_stream[4]
    shipper = strategy._open.engine.shipper
    data, _held = shipper.ship(task_data(parts_of(experience)[0], 4, 0, 0.1), "data")
    trainer, _ = shipper.ship(StrategyTrainer(pack(strategy, _DRIVER_ONLY), True, {}), "trainer")
    task_input = TaskInput(4, 4, parts_of(experience)[0].classes, data, info_of(experience), "k4", (4,))
    choice = TransferChoice(0, transfer)  # type: ignore[arg-type]
    done = worker_of(strategy).run(ExpertRequest(task_input, choice, ExpertRef(artifact, parent.classes), trainer))
    assert isinstance(done, Done), done.message if isinstance(done, Raised) else done
    assert isinstance(done.result, ExpertResult)
    return done.result


def test_distillation_acts_for_lwf_and_is_absent_for_fine_tuning(trained: ExpertGateStrategy) -> None:
    terms = {task: (m.transfer, m.distillation) for task, m in manifests(trained).items()}
    assert terms[0] == ("fresh", None)
    assert terms[1] == ("finetune", None)
    assert terms[2][0] == "lwf"
    assert terms[2][1] > 0
    assert terms[3] == ("finetune", None)


def test_the_parents_old_head_matters_under_lwf_only(trained: ExpertGateStrategy) -> None:
    for transfer, matters in (("lwf", True), ("finetune", False)):
        plain = expert_of_child(trained, transfer, None)
        perturbed = expert_of_child(trained, transfer, "head")
        assert (plain.expert.sha256 != perturbed.expert.sha256) is matters, transfer
        assert (plain.distillation is not None) is matters


def test_the_parents_features_matter_under_both(trained: ExpertGateStrategy) -> None:
    for transfer in ("lwf", "finetune"):
        plain = expert_of_child(trained, transfer, None)
        assert expert_of_child(trained, transfer, "features").expert.sha256 != plain.expert.sha256


def test_experts_start_from_their_parents_and_keep_only_their_own_head(trained: ExpertGateStrategy) -> None:
    storage = Storage(trained.run_dir or "")
    states = {task: load_tensors(storage, m.expert) for task, m in manifests(trained).items()}
    names = set(trained.model.expert.state_dict())
    for task, state in states.items():
        assert set(state) == names
        assert state["head.weight"].shape == (2, 48), task
    # Two epochs move the features a little: a child is nearer to its parent than to the root it never saw.
    child, parent, root = states[1], states[0], trained.model.expert.state_dict()
    name = "features.3.weight"
    assert torch.dist(child[name], parent[name]) < torch.dist(child[name], root[name])


def test_normalisation_statistics_stay_frozen(trained: ExpertGateStrategy) -> None:
    storage = Storage(trained.run_dir or "")
    root = trained.model.expert.state_dict()
    for manifest in manifests(trained).values():
        state = load_tensors(storage, manifest.expert)
        assert torch.equal(state["features.1.running_mean"], root["features.1.running_mean"])
        assert not torch.equal(state["features.1.weight"], root["features.1.weight"])


def test_no_feature_is_left_behind_and_no_data_in_the_run_directory(trained: ExpertGateStrategy) -> None:
    assert list(worker_of(trained)._context.scratch.glob("*")) == []
    names = {path.suffix for path in Path(trained.run_dir or "").rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors", ".parquet"}


def test_features_that_are_gone_are_extracted_again(trained: ExpertGateStrategy) -> None:
    """Another node, or a cleaned temporary folder: the same bytes come back."""
    assert trained._open is not None
    context = worker_of(trained)._context
    experience = tiny_benchmark(DOMAINS).train_stream[0]
    shipped, _held = trained._open.engine.shipper.ship(task_data(parts_of(experience)[0], 0, 0, 0.1), "data")
    task_input = TaskInput(0, 0, parts_of(experience)[0].classes, shipped, info_of(experience), "k0", (0,))
    assert isinstance(worker_of(trained).run(FeaturesRequest(task_input, False)), Done)
    first = context.scratch_file("k0", "train").read_bytes()
    context.drop_features("k0", "train")
    assert len(context.feature_file(task_input, "train", None)) == 54
    assert context.scratch_file("k0", "train").read_bytes() == first
    context.drop_features("k0", "train")
    context.drop_features("k0", "valid")


def test_a_stage_that_raises_becomes_a_value(trained: ExpertGateStrategy) -> None:
    assert trained._open is not None
    experience = tiny_benchmark(DOMAINS).train_stream[0]
    shipped, _held = trained._open.engine.shipper.ship(task_data(parts_of(experience)[0], 9, 0, 0.1), "data")
    task_input = TaskInput(9, 9, (5, 6), shipped, info_of(experience), "k9", (9,))
    raised = worker_of(trained).run(FeaturesRequest(task_input, False))
    assert isinstance(raised, Raised)
    assert "hold the class 0" in raised.message
    assert "Traceback" in raised.traceback
    assert replace(raised, seconds=0.0).seconds == 0.0
