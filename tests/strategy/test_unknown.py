"""Images that no task knows are told from the others, and go where they are to go: in this process and on workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import EvaluationPlugin
from torch.utils.data import TensorDataset

from distributed_eg import ClusterConfig, ExpertGate, ExpertGateStrategy
from distributed_eg.errors import InputError
from distributed_eg.method.gate import ABSENT_LOG_PROBABILITY
from distributed_eg.strategy.metrics import RoutedBatch, gate_metrics, quantities
from distributed_eg.types import NOBODY, GateScore, Unknown
from tests.helpers import SHAPE, tiny_benchmark, tiny_net, tiny_strategy

BENCHMARK = tiny_benchmark((0, 1, 5))
"""The third task is only asked about."""
KNOWN = torch.cat([torch.stack([e.dataset[i][0] for i in range(12)]) for e in BENCHMARK.test_stream[:2]])
STRANGE = torch.stack([BENCHMARK.test_stream[2].dataset[i][0] for i in range(24)])


def trained(unknown: Unknown, score: GateScore = "shared", **settings: Any) -> ExpertGateStrategy:
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear", gate_score=score)
    cluster = ClusterConfig(engine="inline", **settings.pop("cluster", {}))
    # Three tenths are held out: few images' highest errors are no quantiles.
    strategy = tiny_strategy(cluster, model=model, unknown=unknown, validation_fraction=0.3, **settings)
    strategy.train(BENCHMARK.train_stream[:2])
    return strategy


@pytest.mark.parametrize("score", ["residual", "shared"])
def test_an_unseen_pattern_is_strange_and_the_known_ones_are_not(score: GateScore) -> None:
    with trained("expert", score) as strategy:
        known, strange = strategy.model.gate(KNOWN), strategy.model.gate(STRANGE)
        assert float(known.unknown.double().mean()) < 0.25
        assert bool(strange.unknown.all())
        assert float(strange.strangeness.min()) > float(known.strangeness.max())
        # By default it is only told: the nearest expert answers.
        assert set(strange.tasks.tolist()) <= {0, 1}


def test_a_lower_quantile_knows_less() -> None:
    with trained("expert", unknown_quantile=0.5) as strategy:
        assert 0.2 < float(strategy.model.gate(KNOWN).unknown.double().mean()) < 0.9


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_nobody_answers_for_the_unknown(threshold: float | None) -> None:
    with trained("abstain", confidence_threshold=threshold) as strategy:
        model = strategy.model
        routing, output = model.gate(STRANGE), model(STRANGE)
        assert set(routing.tasks.tolist()) == {NOBODY}
        # A last column says so: the most probable of the others would be class 0.
        assert output.shape == (24, 5)
        assert output.argmax(1).tolist() == [4] * 24
        assert bool((output[:, :4] == ABSENT_LOG_PROBABILITY).all())
        said = model.predict(STRANGE[:2])
        assert [(p.class_id, p.task, p.confidence) for p in said] == [(None, None, 0.0)] * 2
        known = model.gate(KNOWN).tasks != NOBODY
        with trained("expert", confidence_threshold=threshold) as other:
            answers = other.model(KNOWN)
        assert torch.equal(model(KNOWN)[known][:, :4], answers[known])


def test_the_root_answers_for_the_unknown() -> None:
    with trained("root") as strategy:
        output = strategy.model(STRANGE)
        assert output.shape == (24, 7)  # the root's own outputs
        with torch.no_grad():
            wanted = torch.log_softmax(strategy.model.expert(STRANGE), dim=1)
        # Logarithms of float32 probabilities.
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
        assert strategy.model.predict(STRANGE[:1])[0].task is None


@pytest.mark.parametrize("unknown", ["expert", "root", "abstain"])
def test_workers_say_the_same_and_metrics_tell_it(unknown: Unknown) -> None:
    evaluator = EvaluationPlugin(gate_metrics(), loggers=[])
    with trained(unknown, evaluator=evaluator) as strategy:
        metrics = strategy.eval(BENCHMARK.test_stream)
        flagged = {
            experience: metrics[f"Gate_Unknown_Exp/eval_phase/test_stream/Task{experience:03d}/Exp{experience:03d}"]
            for experience in range(3)
        }
        images = [torch.stack([e.dataset[i][0] for i in range(24)]) for e in BENCHMARK.test_stream]
        routed = [strategy.model.gate(part) for part in images]
        assert list(flagged.values()) == [float(routing.unknown.double().mean()) for routing in routed]
        assert flagged[2] == 1.0
        (area,) = (value for name, value in metrics.items() if name.startswith("Gate_UnknownAUROC_Stream"))
        assert area == 1.0
        gate = metrics["Gate_Acc_Exp/eval_phase/test_stream/Task002/Exp002"]
        # Where it may say that nobody knows them, it is right to.
        assert gate == (0.0 if unknown == "expert" else 1.0)
        assert metrics["EndToEnd_Acc_Exp/eval_phase/test_stream/Task002/Exp002"] == 0.0


def test_it_is_kept_by_the_run_and_by_a_state_dict(tmp_path: Path) -> None:
    with trained("abstain", cluster={"storage": str(tmp_path / "run")}) as strategy:
        wanted = strategy.model(STRANGE)
    loaded = ExpertGate.load(tmp_path / "run", arch=tiny_net())
    assert torch.equal(loaded(STRANGE), wanted)
    other = ExpertGate(SHAPE, arch=tiny_net(4), autoencoder="linear")
    other.load_state_dict(loaded.state_dict())
    assert torch.equal(other(STRANGE), wanted)


def test_a_value_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="unknown"):
        tiny_strategy(unknown="nobody")
    with pytest.raises(InputError, match="unknown_quantile"):
        tiny_strategy(unknown_quantile=0.0)


@pytest.mark.parametrize("unknown", ["expert", "root", "abstain"])
def test_who_belongs_to_no_task_is_never_right_end_to_end(unknown: Unknown) -> None:
    """Not even where the root's output happens to have the number of the class."""
    root = tiny_net()
    with torch.no_grad():
        root.head.bias[4] += 50
    model = ExpertGate(SHAPE, arch=root, autoencoder="linear", gate_score="shared")
    evaluator = EvaluationPlugin(gate_metrics(), loggers=[])
    with tiny_strategy(model=model, unknown=unknown, validation_fraction=0.3, evaluator=evaluator) as strategy:
        strategy.train(BENCHMARK.train_stream[:2])
        metrics = strategy.eval(BENCHMARK.test_stream)
    assert metrics["EndToEnd_Acc_Exp/eval_phase/test_stream/Task002/Exp002"] == 0


def test_several_experts_are_right_where_their_answer_is_and_the_right_one_took_part() -> None:
    with trained("expert", confidence_threshold=0.05, temp=1e4) as strategy:  # all are asked for every image
        metrics, model = strategy.eval(BENCHMARK.test_stream[:2]), strategy.model
    for task, experience in enumerate(BENCHMARK.test_stream[:2]):
        images, targets = zip(*((x, y) for x, y, *_ in experience.dataset), strict=True)
        assert bool((model.gate(torch.stack(images)).confidences > 0.05).all())
        # The tasks' class ids differ: whoever says the right one is the right expert.
        right = model(torch.stack(images)).argmax(1) == torch.tensor(targets)
        found = metrics[f"EndToEnd_Acc_Exp/eval_phase/test_stream/Task00{task}/Exp00{task}"]
        assert found == pytest.approx(float(right.double().mean()))
    routed = RoutedBatch(
        tasks=torch.tensor([0, 1, 0, NOBODY]),
        right_tasks=torch.tensor([1, 1, 1, NOBODY]),
        confidences=torch.full((4,), 0.5),
        expert_predictions=torch.tensor([2, 2, 2, -1]),
        strangeness=torch.zeros(4),
        heard=torch.tensor([True, True, False, False]),
    )
    batch: Any = SimpleNamespace(mb_y=torch.full((4,), 2), mb_output=torch.eye(3)[[2, 2, 2, 2]])
    assert quantities(batch, routed)["EndToEnd_Acc"].tolist() == [True, True, False, False]


@pytest.mark.parametrize(("fraction", "warns"), [(0.1, True), (0.5, False)])
def test_too_few_images_for_such_a_quantile_are_told(
    fraction: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The highest of four errors is exceeded by a fifth of a task's own images, not by a hundredth."""
    benchmark = tiny_benchmark((0,), train=130)
    for unknown in ("expert", "abstain"):
        caplog.clear()
        with tiny_strategy(unknown=unknown, validation_fraction=fraction) as strategy:
            strategy.train(benchmark.train_stream)
        told = [m for m in caplog.messages if "held out to tell what is strange" in m]
        assert bool(told) == (warns and unknown == "abstain")
    for message in told:
        assert "13 image(s)" in message
        assert "7 % of its own" in message
        assert "not 1.0 %" in message


@pytest.mark.parametrize("score", ["residual", "shared"])
def test_an_image_is_as_strange_alone_as_among_others(score: GateScore) -> None:
    """Of a task whose images are all alike an error is rounding, which depends on the batch."""
    images, before = torch.full((20, *SHAPE), 0.3), torch.stack([x for x, *_ in BENCHMARK.train_stream[0].dataset])
    parts = [_labelled(before), _labelled(images)]
    alike = benchmark_from_datasets(train=parts, test=parts)
    model = ExpertGate(SHAPE, arch=tiny_net(), autoencoder="linear", gate_score=score)
    with tiny_strategy(model=model) as strategy:
        strategy.train(alike.train_stream)
        for count in (1, 2, 7, 20):
            assert not bool(model.gate(images[:count]).unknown.any()), count


def _labelled(images: torch.Tensor) -> Any:
    leaf = TensorDataset(images, torch.arange(len(images)) % 2)
    leaf.targets = (torch.arange(len(images)) % 2).tolist()  # type: ignore[attr-defined]
    return as_classification_dataset(leaf)
