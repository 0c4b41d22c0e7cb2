"""ExpertGate alone: before training, after it, copied, stored, loaded again; always the same outputs, bit for bit."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distributed_eg import ClusterConfig, ExpertGate
from distributed_eg.errors import BackboneError, InputError, StorageError
from tests.helpers import INLINE, SHAPE, tiny_benchmark, tiny_net, tiny_strategy

DOMAINS = (0, 1, 0)
KINDS = pytest.mark.parametrize("trained", ["linear", "sgd", "threshold"], indirect=True)


def images_of(count: int = 18) -> Tensor:
    """Test images of all tasks, mixed."""
    stream = tiny_benchmark(DOMAINS).test_stream
    return torch.stack([stream[i % 3].dataset[i][0] for i in range(count)])


def fresh(kind: Any = "linear", seed: int = 5) -> ExpertGate:
    """An untrained model over another root network."""
    return ExpertGate(SHAPE, arch=tiny_net(seed), autoencoder=kind)


_TRAINED: dict[str, ExpertGate] = {}


@pytest.fixture
def trained(request: pytest.FixtureRequest) -> ExpertGate:
    """A trained model, shared by tests that leave it as it is; its run lives as long as it does."""
    name = getattr(request, "param", "linear")
    if name not in _TRAINED:
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="sgd" if name == "sgd" else "linear")
        threshold = 0.05 if name == "threshold" else None
        with tiny_strategy(INLINE, model=model, confidence_threshold=threshold, temp=8.0, rel_thresh=0.5) as strategy:
            strategy.train(tiny_benchmark(DOMAINS).train_stream)
        _TRAINED[name] = model.eval()
    return _TRAINED[name]


def same(one: ExpertGate, other: ExpertGate) -> bool:
    """Equal outputs and equal routing on the mixed images."""
    images = images_of()
    outputs = torch.equal(one(images), other(images))
    return outputs and all(torch.equal(a, b) for a, b in zip(one.gate(images), other.gate(images), strict=True))


def digest(model: nn.Module) -> str:
    """sha256 of all tensors and their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def num_hooks(model: nn.Module) -> int:
    """Hooks on any module of the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class TestBeforeTraining:
    def test_the_expert_is_the_root(self) -> None:
        net = tiny_net()
        model = ExpertGate(SHAPE, arch=net, autoencoder="linear")
        optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.1)
        held = optimizer.param_groups[0]["params"]
        assert {id(p) for p in held} == {id(p) for p in net.parameters()}
        assert all(p.requires_grad for p in held)

    def test_it_answers_as_the_root(self) -> None:
        model, images = fresh(seed=0), images_of()
        with torch.no_grad():
            assert torch.equal(model.eval()(images), tiny_net().eval()(images))
            # in training mode too: the root is a template, its dropout and statistics stay still
            assert torch.equal(model.train()(images), tiny_net().eval()(images))

    def test_it_has_no_gate(self) -> None:
        with pytest.raises(InputError, match="no gate yet"):
            fresh().gate(images_of())

    def test_copies_work(self, tmp_path: Path) -> None:
        model, images = fresh().eval(), images_of()
        expected = model(images)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)
        other = fresh(seed=6)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.eval()(images), expected)
        torch.save(model.state_dict(), tmp_path / "state.pt")

    @pytest.mark.parametrize("arguments", [{"shape": (3, 16)}, {"autoencoder": "cubic"}], ids=str)
    def test_bad_arguments(self, arguments: dict[str, Any]) -> None:
        with pytest.raises((BackboneError, InputError)):
            ExpertGate(**{"shape": SHAPE, "arch": tiny_net(), **arguments})


class TestAfterTraining:
    @KINDS
    def test_the_gate_answers_with_a_row_a_sample(self, trained: ExpertGate) -> None:
        routing = trained.gate(images_of())
        assert routing._fields == ("tasks", "confidences", "errors", "strangeness")
        assert routing.tasks.shape == (18,)
        assert routing.tasks.dtype == torch.int64
        assert routing.confidences.shape == routing.errors.shape == (18, 3)
        assert torch.allclose(routing.confidences.sum(1), torch.ones(18))
        assert torch.equal(routing.tasks, routing.errors.argmin(1))
        assert torch.allclose(routing.confidences, torch.softmax(-routing.errors / 8.0, 1))

    @KINDS
    def test_a_mixed_batch_is_what_its_samples_are(self, trained: ExpertGate) -> None:
        """Each sample goes by itself: alone, in any order, beside anything."""
        images = images_of()
        outputs, tasks = trained(images), trained.gate(images).tasks
        assert set(tasks.tolist()) >= {0, 1}
        order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
        assert torch.equal(trained.gate(images[order]).tasks, tasks[order])
        assert torch.allclose(trained(images[order]), outputs[order], atol=1e-4)
        singly = torch.cat([trained(image[None]) for image in images])
        assert torch.allclose(singly, outputs, atol=1e-4)

    def test_outputs_are_log_probabilities_over_dataset_class_ids(self, trained: ExpertGate) -> None:
        outputs = trained(images_of())
        assert outputs.shape == (18, 6)
        assert torch.isfinite(outputs).all()
        assert torch.allclose(outputs.exp().sum(1), torch.ones(18), atol=1e-4)
        answered = (outputs > -16).int()
        assert ((answered[:, ::2] + answered[:, 1::2]) > 0).sum(1).tolist() == [1] * 18

    @pytest.mark.parametrize("trained", ["threshold"], indirect=True)
    def test_several_experts_answer_above_the_threshold(self, trained: ExpertGate) -> None:
        images = images_of()
        several = (trained.gate(images).confidences >= 0.05).sum(1) > 1
        assert several.any()
        outputs = trained(images).exp()
        assert torch.allclose(outputs.sum(1), torch.ones(18), atol=1e-4)
        known = (outputs > 1.1e-7).sum(1)
        assert (known[several] > 2).all()
        assert (known[~several] <= 2).all()

    @KINDS
    def test_forward_has_no_side_effects(self, trained: ExpertGate) -> None:
        images = images_of()
        before, expert, given = digest(trained), trained.expert, images.clone()
        attributes, rng = set(vars(trained)), torch.get_rng_state()
        threads = torch.get_num_threads()
        first = trained(images)
        trained.gate(images[:3])
        assert torch.equal(trained(images), first)
        assert digest(trained) == before
        assert trained.expert is expert
        assert torch.equal(images, given)
        assert set(vars(trained)) == attributes
        assert num_hooks(trained) == 0
        assert torch.equal(torch.get_rng_state(), rng)
        assert torch.get_num_threads() == threads
        assert all(p.requires_grad for p in trained.expert.parameters())

    def test_a_failing_forward_leaves_no_hook(self, trained: ExpertGate) -> None:
        handle = trained.expert.get_submodule("features.0").register_forward_hook(lambda *_: 1 / 0)
        try:
            for fails in (trained, trained.gate):
                with pytest.raises(ZeroDivisionError):
                    fails(images_of())
        finally:
            handle.remove()
        assert num_hooks(trained) == 0
        assert same(trained, copy.deepcopy(trained))

    def test_the_root_never_changes(self, trained: ExpertGate) -> None:
        """Neither by training tasks, nor in training mode: weights and BatchNorm statistics are the caller's."""
        expected = tiny_net().state_dict()
        trained.train()
        trained(images_of())
        trained.eval()
        trained(images_of())
        found = trained.expert.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    def test_it_answers_the_same_in_every_mode(self, trained: ExpertGate) -> None:
        """Also where somebody set the root's own layers to another mode, or computes in another type around it."""
        images = images_of()
        gated, routed = trained(images), trained.gate(images)
        assert trained.train() is trained
        assert trained.training
        assert not any(module.training for module in trained.expert.modules())

        def answers_as_before() -> bool:
            again = trained.gate(images)
            return torch.equal(trained(images), gated) and all(map(torch.equal, again, routed))

        assert answers_as_before()
        trained.expert.train()
        assert answers_as_before()
        assert trained.expert.training, "whose mode it is, keeps it"
        assert trained.eval() is trained
        assert answers_as_before()
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            assert answers_as_before()
        assert torch.equal(trained(images.double()), gated)

    @pytest.mark.parametrize("shape", [(2, 5, 16, 16), (3, 16, 16), (2, 3, 8, 8)])
    def test_images_of_another_shape_are_refused(self, trained: ExpertGate, shape: tuple[int, ...]) -> None:
        for take in (trained, trained.gate):
            with pytest.raises(InputError, match=r"the model takes \(n, 3, 16, 16\)"):
                take(torch.zeros(shape))

    def test_moving_to_a_device(self, trained: ExpertGate) -> None:
        moved = copy.deepcopy(trained)
        assert moved.to("cpu") is moved
        assert same(moved, trained)

    def test_it_goes_on_learning_after_a_copy(self, trained: ExpertGate) -> None:
        """A copy is a value: what happens to the original afterwards does not reach it."""
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        benchmark = tiny_benchmark(DOMAINS)
        with tiny_strategy(model=model, train_epochs=1) as strategy:
            strategy.train(benchmark.train_stream[:2])
            snapshot = copy.deepcopy(model.eval())
            strategy.train(benchmark.train_stream[2])
        assert snapshot.eval().gate(images_of()).errors.shape == (18, 2)
        assert model.eval().gate(images_of()).errors.shape == (18, 3)


def _by_state_dict(model: ExpertGate) -> ExpertGate:
    other = fresh(model.autoencoder)
    other.load_state_dict(model.state_dict())
    return other


def _by_file(model: ExpertGate) -> ExpertGate:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = fresh(model.autoencoder)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


def _by_pickle(model: ExpertGate) -> ExpertGate:
    return pickle.loads(pickle.dumps(model))


def _by_torch_save(model: ExpertGate) -> ExpertGate:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class _Holder(nn.Module):
    """A user's module around the model."""

    def __init__(self, model: ExpertGate) -> None:
        super().__init__()
        self.inner = model


def _inside_another_module(model: ExpertGate) -> ExpertGate:
    other = fresh(model.autoencoder)
    _Holder(other).load_state_dict(_Holder(model).state_dict())
    return other


class TestRoundTrips:
    @KINDS
    @pytest.mark.parametrize(
        "copied",
        [_by_state_dict, _by_file, copy.deepcopy, _by_pickle, _by_torch_save, _inside_another_module],
        ids=["state_dict", "torch.save of it", "deepcopy", "pickle", "torch.save", "inside another module"],
    )
    def test_outputs_are_equal_bit_for_bit(
        self, trained: ExpertGate, copied: Callable[[ExpertGate], ExpertGate]
    ) -> None:
        """The model is complete in itself: temperature, threshold, statistics, autoencoders and experts."""
        before = digest(trained)
        other = copied(trained).eval()
        assert other is not trained
        assert same(trained, other)
        assert digest(other) == before
        # once more, from the copy
        assert same(trained, copied(other).eval())

    def test_loading_leaves_the_callers_state_dict_alone(self, trained: ExpertGate) -> None:
        state = trained.state_dict()
        names = list(state)
        for _ in range(2):
            other = fresh()
            result = other.load_state_dict(state)
            assert (result.missing_keys, result.unexpected_keys) == ([], [])
            assert same(trained, other.eval())
        assert list(state) == names

    def test_a_copy_owns_its_tensors(self, trained: ExpertGate) -> None:
        """Changing a copy's state changes nothing of the original, and the other way round."""
        before = digest(trained)
        other = copy.deepcopy(trained)
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.zero_()
        assert digest(trained) == before

    def test_a_loaded_model_does_not_share_with_the_state_dict(self, trained: ExpertGate) -> None:
        state = {name: value.clone() for name, value in trained.state_dict().items()}
        other = fresh()
        other.load_state_dict(state)
        for value in state.values():
            value.zero_()
        assert same(trained, other.eval())

    def test_a_state_dict_of_an_untrained_model_takes_the_gate_away(self, trained: ExpertGate) -> None:
        other = copy.deepcopy(trained)
        other.load_state_dict(fresh().state_dict())
        with pytest.raises(InputError, match="no gate yet"):
            other.gate(images_of())

    def test_another_kind_of_autoencoder_is_refused(self, trained: ExpertGate) -> None:
        with pytest.raises(InputError, match="'linear' autoencoders"):
            fresh("sgd").load_state_dict(trained.state_dict())

    @pytest.mark.parametrize("part", ["settings", "statistics.mean", "autoencoders.1.", "experts.1."])
    def test_an_incomplete_state_dict_is_refused(self, trained: ExpertGate, part: str) -> None:
        """When it is loaded, as torch refuses missing keys, and the model stays as it was."""
        state = {name: value for name, value in trained.state_dict().items() if not name.startswith(f"run.{part}")}
        other = copy.deepcopy(trained)
        with pytest.raises((InputError, RuntimeError)):
            other.load_state_dict(state)
        assert same(trained, other)

    def test_a_state_dict_for_images_of_another_shape_is_refused(self, trained: ExpertGate) -> None:
        other = ExpertGate((3, 24, 24), arch=tiny_net(), autoencoder="linear")
        with pytest.raises((InputError, RuntimeError)):
            other.load_state_dict(trained.state_dict())

    def test_a_copy_outlives_the_run(self) -> None:
        """The run's folder goes with the model; copies need it no more."""
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        with tiny_strategy(model=model, train_epochs=1) as strategy:
            strategy.train(tiny_benchmark((0, 1)).train_stream)
            run_dir = Path(strategy.run_dir or "")
        other = copy.deepcopy(model.eval())
        expected = model(images_of())
        for path in run_dir.rglob("expert-*"):
            path.unlink()
        assert torch.equal(other.eval()(images_of()), expected)

    def test_a_copied_model_can_be_trained_again(self, trained: ExpertGate) -> None:
        """A copy is an ``ExpertGate`` like any other: a strategy over it starts a run of its own."""
        with tiny_strategy(model=copy.deepcopy(trained), train_epochs=1) as strategy:
            strategy.train(tiny_benchmark((0,)).train_stream)
            assert strategy.registry.num_rows == 1
            assert strategy.model.eval().gate(images_of()).errors.shape == (18, 1)


class TestLoad:
    @pytest.fixture(scope="class")
    @staticmethod
    def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertGate, Path]:
        """A live model and its finished run."""
        path = tmp_path_factory.mktemp("load") / "run"
        model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
        with tiny_strategy(
            ClusterConfig(engine="inline", storage=str(path)), model=model, temp=3.0, confidence_threshold=0.2
        ) as strategy:
            strategy.train(tiny_benchmark(DOMAINS).train_stream)
        return model.eval(), path

    def test_equals_the_live_model(self, run: tuple[ExpertGate, Path]) -> None:
        live, path = run
        loaded = ExpertGate.load(str(path), arch=tiny_net(9))
        assert not loaded.training
        assert same(live, loaded)
        assert digest(loaded) == digest(live)
        assert same(live, copy.deepcopy(loaded))

    def test_a_network_of_its_own_must_be_given(self, run: tuple[ExpertGate, Path]) -> None:
        with pytest.raises(BackboneError, match="give arch="):
            ExpertGate.load(str(run[1]))

    def test_another_network_is_refused(self, run: tuple[ExpertGate, Path]) -> None:
        other = tiny_net()
        other.features[3] = nn.Conv2d(8, 12, 1)
        with pytest.raises(BackboneError, match="another one than the run was trained with"):
            ExpertGate.load(str(run[1]), arch=other)

    def test_a_missing_run(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="nowhere"):
            ExpertGate.load(str(tmp_path / "nowhere"))
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.parametrize("most", [1, 2])
    def test_experts_are_read_on_demand(
        self, run: tuple[ExpertGate, Path], most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At most so many are in memory, and none before an image asks for it."""
        live, path = run
        loaded = ExpertGate.load(str(path), arch=tiny_net(9), max_resident_experts=most)
        assert loaded._predictor is not None
        resident = loaded._predictor.reader._experts
        assert len(resident) == 0
        loaded.gate(images_of())
        assert len(resident) == 0
        assert same(live, loaded)
        assert len(resident) == most

    def test_a_damaged_expert_is_named(self, run: tuple[ExpertGate, Path], tmp_path: Path) -> None:
        import shutil

        path = tmp_path / "copy"
        shutil.copytree(run[1], path)
        (expert,) = (path / "tasks" / "00001").glob("expert-*.safetensors")
        data = bytearray(expert.read_bytes())
        data[-1] ^= 1
        expert.write_bytes(bytes(data))
        loaded = ExpertGate.load(str(path), arch=tiny_net())
        images = torch.stack([tiny_benchmark(DOMAINS).test_stream[1].dataset[i][0] for i in range(4)])
        assert loaded.gate(images).tasks.tolist() == [1] * 4
        with pytest.raises(StorageError, match=expert.name):
            loaded(images)

    def test_a_lost_expert_is_named(self, run: tuple[ExpertGate, Path], tmp_path: Path) -> None:
        import shutil

        path = tmp_path / "copy"
        shutil.copytree(run[1], path)
        (expert,) = (path / "tasks" / "00001").glob("expert-*.safetensors")
        expert.unlink()
        with pytest.raises(StorageError, match=expert.name):
            ExpertGate.load(str(path), arch=tiny_net())(images_of())

    def test_a_named_architecture_needs_nothing_more(self, tmp_path: Path) -> None:
        """A run over a torchvision network with random weights opens by its path alone, without a download."""
        model = ExpertGate((3, 32, 32), arch="squeezenet1_1", pretrained_flag=False, autoencoder="linear")
        cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"))
        images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.benchmarks.utils import as_classification_dataset
        from torch.utils.data import TensorDataset

        leaf = TensorDataset(images, torch.arange(24) % 2)
        leaf.targets = [i % 2 for i in range(24)]  # type: ignore[attr-defined]
        stream = benchmark_from_datasets(train=[as_classification_dataset(leaf)]).train_stream
        with tiny_strategy(cluster, model=model, train_epochs=1) as strategy:
            strategy.train(stream)
        loaded = ExpertGate.load(str(tmp_path / "run"))
        assert torch.equal(loaded(images[:4]), model.eval()(images[:4]))
