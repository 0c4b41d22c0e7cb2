"""What Avalanche 0.6.0's Expert Gate gets wrong, row by row of the README's table, and that it is right here."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.errors import InputError
from distributed_eg.method import backbone, sgd_autoencoder
from distributed_eg.method.distill import Distillation
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import load_tensors
from distributed_eg.strategy import model as strategy_model
from distributed_eg.strategy.training import trainer
from tests.helpers import DOMAINS, SETTINGS, SHAPE, hashes, tiny_benchmark, tiny_net, tiny_strategy
from tests.inside import manifests_of, sample_counts_of

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def stored(strategy: ExpertGateStrategy, task: int, what: str) -> dict[str, Tensor]:
    """A task's sealed "expert" or "autoencoder"."""
    return load_tensors(Storage(strategy.run_dir or ""), getattr(manifests_of(strategy)[task], what))


def images_of(stream: Any, task: int, count: int | None = None) -> Tensor:
    """The first images of an experience, after its transforms."""
    dataset = stream[task].dataset
    return torch.stack([dataset[i][0] for i in range(len(dataset) if count is None else count)])


def sgd_model() -> ExpertGate:
    """A model with the paper's autoencoder."""
    return ExpertGate(SHAPE, arch=tiny_net(), autoencoder="sgd")


def test_row_01_lwf_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distillation term is positive, its teacher is the parent's expert, and the old head trains beside the new."""
    teachers: list[dict[str, Tensor]] = []
    heads: list[tuple[Tensor, Tensor]] = []

    class Spy(Distillation):
        def __init__(self, student: Any, teacher: Any, head: str, **options: Any) -> None:
            super().__init__(student, teacher, head, **options)
            teachers.append(copy.deepcopy(teacher.state_dict()))
            self._before = self.old_head.weight.detach().clone()

        def detach(self) -> None:
            heads.append((self._before, self.old_head.weight.detach().clone()))
            super().detach()

    monkeypatch.setattr(trainer, "Distillation", Spy)
    with tiny_strategy(**SETTINGS) as strategy:
        strategy.train(tiny_benchmark(DOMAINS).train_stream)
        by_lwf = [task for task, manifest in manifests_of(strategy).items() if manifest.transfer == "lwf"]
        assert by_lwf == [2]
        manifest = manifests_of(strategy)[2]
        assert manifest.distillation is not None
        assert manifest.distillation > 0
        assert all(m.distillation is None for task, m in manifests_of(strategy).items() if task != 2)
        assert manifest.parent == 0
        parent = stored(strategy, 0, "expert")
        assert teachers[0].keys() == parent.keys()
        assert all(torch.equal(teachers[0][name], tensor) for name, tensor in parent.items())
        before, after = heads[0]
        assert torch.equal(before, parent["head.weight"])
        assert not torch.equal(before, after)
        # The old head goes when training ends.
        assert stored(strategy, 2, "expert").keys() == parent.keys()
        assert stored(strategy, 2, "expert")["head.weight"].shape[0] == 2


def test_row_02_each_sample_is_routed_by_itself() -> None:
    benchmark = tiny_benchmark((0, 1, 2))
    with tiny_strategy() as strategy:
        strategy.train(benchmark.train_stream)
        model = strategy.model.eval()
    mixed = torch.stack([images_of(benchmark.test_stream, i % 3, i + 1)[i] for i in range(12)])
    routing = model.gate(mixed)
    assert routing.tasks.tolist() == [i % 3 for i in range(12)]
    for i, image in enumerate(mixed):
        assert model.gate(image[None]).errors[0].tolist() == pytest.approx(routing.errors[i].tolist(), rel=1e-4)


def trained_sgd(**settings: Any) -> tuple[ExpertGate, dict[str, Tensor], Any]:
    """A model with two of the paper's autoencoders, its tensors, and the benchmark, whose train stream is theirs."""
    benchmark, model = tiny_benchmark((0, 1)), sgd_model()
    with tiny_strategy(model=model, train_epochs=1, ae_train_mb_size=16, **settings) as strategy:
        strategy.train(benchmark.train_stream, valid_stream=benchmark.test_stream)
    return model.eval(), model.state_dict(), benchmark


def test_row_03_features_are_standardized() -> None:
    """μ and σ are per feature, those of the first task, and the same for every autoencoder."""
    model, state, benchmark = trained_sgd()
    features_of = backbone.Backbone(model.expert, model.output_layer_name, SHAPE)
    features = features_of(images_of(benchmark.train_stream, 0))
    assert torch.allclose(state["run.statistics.mean"], features.mean(0), atol=1e-4)
    std = features.std(0, correction=0)
    assert torch.allclose(state["run.statistics.std"][std > 0.1], std[std > 0.1], rtol=1e-3)
    x = features_of(images_of(benchmark.test_stream, 1, 5))
    z = torch.sigmoid((x - state["run.statistics.mean"]) / state["run.statistics.std"])
    errors = torch.stack([_errors_by_hand(state, task, z) for task in (0, 1)], dim=1)
    assert torch.allclose(model.gate(images_of(benchmark.test_stream, 1, 5)).errors, errors, rtol=1e-3)


def _errors_by_hand(state: dict[str, Tensor], task: int, z: Tensor) -> Tensor:
    """Squared distance of each row to its reconstruction by a linear layer, ReLU, a linear layer and sigmoid."""
    own = {name.rsplit(".", 1)[1]: value for name, value in state.items() if f"run.autoencoders.{task}." in name}
    hidden = torch.relu(z @ own["encoder_weight"].T + own["encoder_bias"])
    return (torch.sigmoid(hidden @ own["decoder_weight"].T + own["decoder_bias"]) - z).square().sum(1)


def test_row_04_cross_entropy_in_training_squared_distance_at_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[tuple[float, float]] = []
    original = F.binary_cross_entropy_with_logits

    def spy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        losses.append((float(target.min()), float(target.max())))
        return original(logits, target, **options)

    monkeypatch.setattr(sgd_autoencoder.F, "binary_cross_entropy_with_logits", spy)
    model, _, benchmark = trained_sgd()
    assert len(losses) == 2 * 2 * 4  # tasks, epochs, batches of 16
    assert all(0 <= low <= high <= 1 for low, high in losses)
    # An error is a sample's own: it does not grow with the batch.
    images = images_of(benchmark.test_stream, 0, 8)
    assert torch.allclose(model.gate(images).errors[:2], model.gate(images[:2]).errors, rtol=1e-4)


@pytest.mark.parametrize(("shape", "expected"), [((3, 16, 16), (12, 8, 8)), ((3, 24, 40), (12, 12, 20))])
def test_row_05_feature_size_follows_from_backbone_and_images(
    shape: tuple[int, int, int], expected: tuple[int, ...]
) -> None:
    model = ExpertGate(shape, arch=tiny_net(), autoencoder="linear")
    assert model.feature_shape == expected
    other = ExpertGate(shape, arch=tiny_net(), output_layer_name="features.0", autoencoder="linear")
    assert other.feature_shape == (8, *expected[1:])


def test_row_05_autoencoders_have_that_size() -> None:
    _, state, _ = trained_sgd()
    assert state["run.autoencoders.0.encoder_weight"].shape == (8, 12 * 8 * 8)
    assert state["run.statistics.mean"].shape == (12 * 8 * 8,)


def test_row_06_relatedness_is_measured_on_validation_data() -> None:
    """The table's errors are means over the validation stream, not over what the autoencoders were fitted to."""
    benchmark = tiny_benchmark((0, 1))
    residual = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    with tiny_strategy(model=residual, train_epochs=1) as strategy:
        strategy.train(benchmark.train_stream, valid_stream=benchmark.test_stream)
        (row,) = strategy.relatedness.to_pylist()
        model = strategy.model.eval()
    on_valid = model.gate(images_of(benchmark.test_stream, 1)).errors.mean(0).tolist()
    on_train = model.gate(images_of(benchmark.train_stream, 1)).errors.mean(0).tolist()
    assert [row["error"], row["own_error"]] == pytest.approx(on_valid, rel=1e-4)
    assert row["own_error"] != pytest.approx(on_train[1], rel=0.05)


def test_row_06_a_part_is_split_off_where_there_is_no_validation_stream() -> None:
    """It is not in the autoencoder, and it is the same part in every run."""
    with tiny_strategy(train_epochs=1, validation_fraction=0.25) as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
        assert sample_counts_of(strategy) == [45, 45]


def test_row_07_any_label_any_order_repeats_and_none() -> None:
    stream = tiny_benchmark((0, 1, 2)).train_stream
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train([stream[2], stream[0]])
        first = hashes(strategy)
        strategy.train(stream[2])  # seen before: it goes on
        assert strategy.registry["label"].to_pylist() == [2, 0]
        assert strategy.registry["transfer"].to_pylist()[0] == "continue"
        assert hashes(strategy)[0] != first[0]
        assert hashes(strategy)[1] == first[1]
    with tiny_strategy(train_epochs=1, on_repeat="error") as strategy:
        strategy.train(stream[2])
        with pytest.raises(InputError, match="Label 2 was trained already"):
            strategy.train(stream[2])
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(tiny_benchmark((0, 1, 2), labels=False).train_stream)
        assert strategy.registry["label"].to_pylist() == [0, 1, 2]


def test_row_08_any_architecture_and_weights_and_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a download was asked for")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    shape = (3, 32, 32)
    random = ExpertGate(shape, arch="squeezenet1_1", pretrained_flag=False, seed=3)
    torch.save(random.expert.state_dict(), tmp_path / "weights.pt")
    by_path = ExpertGate(shape, arch="squeezenet1_1", weights=str(tmp_path / "weights.pt"))
    for name, tensor in by_path.expert.state_dict().items():
        assert torch.equal(tensor, random.expert.state_dict()[name])
    assert ExpertGate(shape, arch="resnet18", pretrained_flag=False).feature_shape == (512, 1, 1)
    module = tiny_net()
    assert ExpertGate(SHAPE, arch=module).expert is module
    model = ExpertGate(SHAPE, arch="mobilenet_v3_small", pretrained_flag=False, autoencoder="linear")
    with tiny_strategy(model=model, train_epochs=1) as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
        assert strategy.registry.num_rows == 2


@pytest.mark.parametrize("eval_every", [0, 1, 2])
def test_row_09_periodic_evaluation_works(eval_every: int) -> None:
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    with tiny_strategy(eval_every=eval_every, evaluator=evaluator) as strategy:
        metrics = strategy.train(tiny_benchmark((0, 1)).train_stream)
    assert 0 <= metrics["Top1_Acc_Exp/eval_phase/valid_stream/Task000/Exp000"] <= 1


def test_row_10_a_head_has_its_tasks_classes_only() -> None:
    """Class ids are mapped to the head's outputs, not padded with the classes of others."""
    benchmark = tiny_benchmark((0, 1, 2))
    with tiny_strategy() as strategy:
        strategy.train(benchmark.train_stream)
        for task in range(3):
            assert manifests_of(strategy)[task].classes == (2 * task, 2 * task + 1)
            assert stored(strategy, task, "expert")["head.weight"].shape == (2, 48)
        outputs = strategy.model.eval()(images_of(benchmark.test_stream, 1, 6))
    assert outputs.shape == (6, 6)
    assert set(outputs.argmax(1).tolist()) <= {2, 3}


@pytest.mark.parametrize("kind", ["sgd", "linear"])
def test_row_11_an_autoencoder_costs_its_own_matrices(kind: Any, tmp_path: Path) -> None:
    """One backbone for all: nothing of it is in an autoencoder's file."""
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder=kind)
    cluster = ClusterConfig(engine="inline", storage=str(tmp_path / "run"))
    options = {"ae_train_mb_size": 16} if kind == "sgd" else {}
    with tiny_strategy(cluster, model=model, train_epochs=1, **options) as strategy:
        strategy.train(tiny_benchmark((0, 1)).train_stream)
        tensors = stored(strategy, 1, "autoencoder")
        assert not any(name.startswith(("features", "expert", "head")) for name in tensors)
    features, units = 12 * 8 * 8, 8
    # The linear one keeps twice its units, to go on from when its label comes again.
    most = 2 * features * units + features + units + (2 * units * features if kind == "linear" else 0) + 100
    assert sum(tensor.numel() for tensor in tensors.values()) <= most
    assert len(list((tmp_path / "run").glob("root-*.safetensors"))) == 1


@pytest.mark.parametrize("num_tasks", [1, 4])
def test_row_12_the_backbone_sees_each_image_once(num_tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in evaluation, whatever the number of autoencoders and their epochs."""
    counts = [0]
    original = backbone.features_at

    def spy(network: nn.Module, layer: str, images: Tensor) -> Tensor:
        counts[0] += len(images)
        return original(network, layer, images)

    for module in (backbone, strategy_model):
        monkeypatch.setattr(module, "features_at", spy)
    benchmark = tiny_benchmark((0, 1, 2, 3)[:num_tasks])
    with tiny_strategy(model=sgd_model(), ae_train_mb_size=16, ae_train_epochs=3, train_epochs=1) as strategy:
        strategy.train(benchmark.train_stream)
        assert counts == [60 * num_tasks]
        counts[0] = 0
        strategy.eval(benchmark.test_stream)
        assert counts == [24 * num_tasks]
        counts[0] = 0
        strategy.model.eval()(images_of(benchmark.test_stream, 0, 10))
        assert counts == [10]


def test_row_13_the_model_is_complete_in_itself() -> None:
    """The temperature is part of the model: a reloaded one has it, and runs."""
    benchmark = tiny_benchmark((0, 1))
    with tiny_strategy(temp=7.5, train_epochs=1) as strategy:
        strategy.train(benchmark.train_stream)
        model = strategy.model.eval()
        reloaded = ExpertGate(SHAPE, arch=tiny_net(4), autoencoder="linear").eval()
        reloaded.load_state_dict(model.state_dict())
        images = images_of(benchmark.test_stream, 0, 6)
        assert torch.equal(reloaded(images), model(images))
        routing = reloaded.gate(images)
    assert torch.allclose(routing.confidences, torch.softmax(-routing.errors / 7.5, 1))


def test_row_14_forward_has_no_side_effects() -> None:
    """A deep copy gates on its own input, not on what the original saw last."""
    benchmark = tiny_benchmark((0, 1))
    with tiny_strategy(train_epochs=1) as strategy:
        strategy.train(benchmark.train_stream)
        model = strategy.model.eval()
    expert, state = model.expert, copy.deepcopy(model.state_dict())
    ones, others = images_of(benchmark.test_stream, 0, 6), images_of(benchmark.test_stream, 1, 6)
    model(ones)
    clone = copy.deepcopy(model).eval()
    model(others)
    assert clone.gate(ones).tasks.tolist() == [0] * 6
    assert torch.equal(clone(others), model(others))
    assert model.expert is expert
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


class Held(SupervisedPlugin):
    """Writes which parameters the optimizer holds where an expert trains."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Number of parameters held, trained, and held but not trained."""
        held = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
        own = {id(p) for p in strategy.model.expert.parameters()}
        with self.path.open("a") as file:
            file.write(json.dumps([len(held), len(own), len(held - own)]) + "\n")


def test_row_15_no_prints_and_the_callers_objects_are_untouched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the optimizer holds what is being trained: no old expert's parameters."""
    plugins: list[Any] = [Held(tmp_path / "held.jsonl")]
    given = list(plugins)
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear")
    optimizer = torch.optim.SGD(model.expert.parameters(), lr=0.05)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    benchmark = tiny_benchmark(DOMAINS)
    with tiny_strategy(model=model, optimizer=optimizer, plugins=plugins, train_epochs=1, **SETTINGS) as strategy:
        strategy.train(benchmark.train_stream)
        strategy.eval(benchmark.test_stream)
        transfers = strategy.registry["transfer"].to_pylist()
    assert plugins == given
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    counts = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    # features (2 convolutions, 1 normalisation) and head: 8 tensors; while LwF acts the optimizer has the old head's 2
    plain, with_old_head = [8, 8, 0], [10, 8, 2]
    assert counts == [with_old_head if transfer == "lwf" else plain for transfer in transfers]
    assert capsys.readouterr().out == ""
