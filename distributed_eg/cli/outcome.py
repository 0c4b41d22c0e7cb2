"""What a run came to, and what it holds: values that are printed as JSON and drawn as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distributed_eg.masking import masked
from distributed_eg.types import NEAR_TIE

if TYPE_CHECKING:
    from distributed_eg.benchmarks.benchmark import Benchmark
    from distributed_eg.strategy.strategy import ExpertGateStrategy

_FROM_REGISTRY = ("task", "label", "parent", "transfer", "autoencoder_sha256", "expert_sha256", "train_s", "worker")


@dataclass(frozen=True)
class TaskOutcome:
    """One task's line of the report; accuracies between 0 and 1."""

    task: int
    label: int
    name: str
    domain: str
    parent: int | None
    transfer: str
    relatedness: float | None
    near_tie: int | None
    """Another candidate within 0.001 of the parent's relatedness, which other seeds or images could choose."""
    gate_accuracy: float
    expert_accuracy: float
    end_to_end_accuracy: float
    autoencoder_sha256: str
    expert_sha256: str
    train_s: float
    worker: str | None


@dataclass(frozen=True)
class RunOutcome:
    """What ``--json`` prints; accuracies are means over the tasks."""

    gate_accuracy: float
    expert_accuracy: float
    end_to_end_accuracy: float
    train_s: float
    """0 where nothing was trained."""
    eval_s: float
    run_dir: str
    """Path or URI, without what the URI keeps secret: this is printed and logged."""
    tasks: list[TaskOutcome]
    """Those of the benchmark."""


@dataclass(frozen=True)
class TaskLine:
    """One task, in its newest version."""

    task: int
    label: int
    classes: dict[int, str | None]
    """Names by class id, None where nobody said them."""
    num_images: int
    """Training images of the newest version, validation part apart."""
    num_bytes: int
    """Of its newest weights in the run directory."""
    parent: int | None
    """None: the pretrained root."""
    transfer: str
    versions: int
    finished: str
    """When its newest version was sealed: UTC, ISO 8601."""
    is_retired: bool


def outcome_of(
    strategy: ExpertGateStrategy, metrics: Mapping[str, float], benchmark: Benchmark, train_s: float, eval_s: float
) -> RunOutcome:
    """What an evaluated strategy came to on a benchmark, from its tables and metrics."""
    relatedness = strategy.relatedness.to_pylist()
    # A task that was continued has rows of several versions: those of one have one own error, and only a version that
    # started from another task's expert chose.
    chosen = {row["task"]: row for row in relatedness if row["chosen"]}
    ties = {
        row["task"]: row["candidate"]
        for row in relatedness
        for parent in [chosen.get(row["task"], row)]
        if row["own_error"] == parent["own_error"]
        and row["candidate"] != parent["candidate"]
        and parent["relatedness"] - row["relatedness"] < NEAR_TIE
    }
    by_label = {row["label"]: row for row in strategy.registry.to_pylist()}
    tasks = []
    for place, (label, experience) in enumerate(zip(benchmark.labels, benchmark.scenario.streams["test"], strict=True)):
        row = by_label[label]
        tail = f"_Exp/eval_phase/test_stream/Task{label:03d}/Exp{experience.current_experience:03d}"
        tasks.append(
            TaskOutcome(
                **{name: row[name] for name in _FROM_REGISTRY},
                name=benchmark.task_names[place],
                domain=benchmark.domains[place],
                relatedness=chosen[row["task"]]["relatedness"] if row["task"] in chosen else None,
                near_tie=ties.get(row["task"]),
                gate_accuracy=metrics["Gate_Acc" + tail],
                expert_accuracy=metrics["Expert_Acc" + tail],
                end_to_end_accuracy=metrics["EndToEnd_Acc" + tail],
            )
        )
    return RunOutcome(
        gate_accuracy=sum(task.gate_accuracy for task in tasks) / len(tasks),
        expert_accuracy=sum(task.expert_accuracy for task in tasks) / len(tasks),
        end_to_end_accuracy=sum(task.end_to_end_accuracy for task in tasks) / len(tasks),
        train_s=train_s,
        eval_s=eval_s,
        run_dir=masked(strategy.run_dir or ""),
        tasks=tasks,
    )
