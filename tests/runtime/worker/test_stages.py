"""The stages as a worker runs them: what LwF and fine-tuning take from the parent, caches, in-place transforms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_eg import ClusterConfig, ExpertGateStrategy
from distributed_eg.runtime.messages import Done, ExpertRequest, ExpertResult, FeaturesRequest, Raised
from distributed_eg.store.registry import ExpertRef
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import load_tensors, save_tensors
from distributed_eg.types import TransferChoice
from tests.helpers import DOMAINS, SETTINGS, tiny_benchmark, tiny_strategy
from tests.inside import manifests_of, shipped_trainer_of, task_input, worker_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An inline run over four tasks, still open."""
    storage = str(tmp_path_factory.mktemp("run") / "run")
    with tiny_strategy(ClusterConfig(engine="inline", storage=storage), **SETTINGS) as strategy:
        strategy.train(tiny_benchmark(DOMAINS).train_stream)
        yield strategy


def expert_of_child(strategy: ExpertGateStrategy, transfer: str, perturb: str | None) -> ExpertResult:
    """Train a fifth task from task 0, whose stored tensors that contain ``perturb`` in their name are changed."""
    storage = Storage(strategy.run_dir or "")
    parent = manifests_of(strategy)[0]
    state = load_tensors(storage, parent.expert)
    if perturb is not None:
        state = {name: value + 0.5 if perturb in name else value for name, value in state.items()}
    artifact = save_tensors(storage, "perturbed", state)
    experience = tiny_benchmark((*DOMAINS, 1)).train_stream[4]
    choice = TransferChoice(0, transfer)  # type: ignore[arg-type]
    start = ExpertRef(artifact, parent.classes)
    request = ExpertRequest(task_input(strategy, experience, 4), choice, start, shipped_trainer_of(strategy))
    done = worker_of(strategy).run(request)
    assert isinstance(done, Done), done.message if isinstance(done, Raised) else done
    assert isinstance(done.result, ExpertResult)
    return done.result


def test_distillation_acts_for_lwf_and_is_absent_for_fine_tuning(trained: ExpertGateStrategy) -> None:
    terms = {task: (m.transfer, m.distillation) for task, m in manifests_of(trained).items()}
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
    states = {task: load_tensors(storage, m.expert) for task, m in manifests_of(trained).items()}
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
    for manifest in manifests_of(trained).values():
        state = load_tensors(storage, manifest.expert)
        assert torch.equal(state["features.1.running_mean"], root["features.1.running_mean"])
        assert not torch.equal(state["features.1.weight"], root["features.1.weight"])


def test_no_feature_is_left_behind_and_no_data_in_the_run_directory(trained: ExpertGateStrategy) -> None:
    assert list(worker_of(trained)._context.scratch.glob("*")) == []
    names = {path.suffix for path in Path(trained.run_dir or "").rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors", ".parquet"}


def test_features_that_are_gone_are_extracted_again(trained: ExpertGateStrategy) -> None:
    """Another node, or a cleaned temporary folder: the same bytes come back."""
    context = worker_of(trained)._context
    task = task_input(trained, tiny_benchmark(DOMAINS).train_stream[0], 0, key="k0")
    assert isinstance(worker_of(trained).run(FeaturesRequest(task, False)), Done)
    first = context.scratch_file("k0", "train").read_bytes()
    context.drop_features("k0", "train")
    assert len(context.feature_file(task, "train", None)) == 54
    assert context.scratch_file("k0", "train").read_bytes() == first
    context.drop_features("k0", "train")
    context.drop_features("k0", "valid")


def test_a_stage_that_raises_becomes_a_value(trained: ExpertGateStrategy) -> None:
    task = task_input(trained, tiny_benchmark(DOMAINS).train_stream[0], 9, classes=(5, 6))
    raised = worker_of(trained).run(FeaturesRequest(task, False))
    assert isinstance(raised, Raised)
    assert "hold the class 0" in raised.message
    assert "Traceback" in raised.traceback
    assert replace(raised, seconds=0.0).seconds == 0.0
