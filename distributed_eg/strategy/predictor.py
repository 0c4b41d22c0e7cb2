"""What a trained model predicts with: the gate, and its experts, read from a run directory or kept in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias, get_args

import torch
from torch import Tensor, nn

from distributed_eg.errors import InputError
from distributed_eg.method.autoencoder import autoencoder_from_tensors
from distributed_eg.method.gate import (
    Expert,
    Gate,
    Routing,
    combine_experts,
    expert_of_root,
    make_gate,
    with_abstentions,
)
from distributed_eg.method.standardize import Statistics
from distributed_eg.method.summary import TaskSummary
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.store.experts import ExpertReader
from distributed_eg.store.registry import ExpertRef
from distributed_eg.strategy.predictions import Prediction, TaskNotes, notes_as_tensor, notes_from_tensor, predictions
from distributed_eg.types import NOBODY, AutoencoderKind, TaskId, Unknown

_PREFIX = "run."
_OF_GATE = ("autoencoders.", "summaries.")
_IN_MEMORY = 4
"""Experts built at a time where all of their tensors are held anyway."""

FeaturesOf: TypeAlias = Callable[[Tensor], Tensor]
"""A backbone: images (n, channels, height, width) to features (n, num_features)."""


@dataclass(frozen=True)
class Predictor:
    """The gate over all tasks and where their experts are; ``threads`` is the run's number of torch threads."""

    gate: Gate
    experts: Mapping[TaskId, ExpertRef]
    reader: ExpertReader
    threads: int
    notes: Mapping[TaskId, TaskNotes]

    def route(self, images: Tensor, features_of: FeaturesOf) -> Routing:
        """Where each image goes."""
        with self._alike(images):
            return self.gate.route(features_of(images))

    def answer(self, images: Tensor, features_of: FeaturesOf) -> tuple[Routing, Tensor]:
        """Where each image goes, and log-probabilities (n, highest class id + 1) of the experts that answer for it."""
        with self._alike(images):
            width = 1 + max(max(ref.classes) for ref in self.experts.values())
            root = expert_of_root(self.reader.root, images.shape[1:]) if self.gate.unknown == "root" else None
            routing = self.gate.route(features_of(images))

            def expert_of(task: TaskId) -> Expert:
                return root if root is not None and task == NOBODY else self.reader.expert(self.experts[task])

            width = width if root is None else max(width, len(root.classes))
            answer = combine_experts(images, self.gate.answering(routing), expert_of, width)
            return routing, with_abstentions(answer, routing.tasks) if self.gate.unknown == "abstain" else answer

    def predict(self, images: Tensor, features_of: FeaturesOf) -> list[Prediction]:
        """What each image shows."""
        routing, log_probabilities = self.answer(images, features_of)
        if self.gate.unknown == "abstain":
            log_probabilities = log_probabilities[:, :-1]
        classes = torch.arange(log_probabilities.shape[1])
        return predictions(routing.tasks, routing.confidences.max(1).values, classes, log_probabilities, self.notes)

    @contextmanager
    def _alike(self, images: Tensor) -> Iterator[None]:
        """Compute as the run's workers do, whatever the caller has set around it.

        Raises:
            InputError: there is nothing to choose from.
        """
        if not self.experts:
            raise InputError("Every task is retired, and nothing can answer: strategy.restore(label) takes one back.")
        with (
            torch.no_grad(),
            torch.autocast(images.device.type, enabled=False),
            reproducible(0, self.threads, images.device),
        ):
            yield

    def to(self, device: torch.device, root: nn.Module) -> Predictor:
        """The same on another device, where ``root`` is already."""
        gate = self.gate
        moved = replace(gate, statistics=gate.statistics.to(device))
        return replace(self, gate=moved, reader=self.reader.to(device, root))

    def tensors(self, kind: AutoencoderKind) -> dict[str, Tensor]:
        """Everything, experts included, as tensors by name: what ``state_dict`` holds beside the root network."""
        gate, statistics = self.gate, self.gate.statistics
        threshold = -1.0 if gate.confidence_threshold is None else gate.confidence_threshold
        found: dict[str, Tensor] = {
            "settings": torch.tensor(
                [gate.temp, threshold, self.threads, kind == "linear", get_args(Unknown).index(gate.unknown)],
                dtype=torch.float64,
            ),
            "limits": torch.tensor(gate.limits, dtype=torch.float64),
            "statistics.mean": statistics.mean,
            "statistics.std": statistics.std,
            "statistics.num_samples": torch.tensor(statistics.num_samples),
            "notes": notes_as_tensor(self.notes),
        }
        for task, summary in zip(gate.tasks, gate.summaries, strict=bool(gate.summaries)):
            found |= {f"summaries.{task}.{name}": value for name, value in summary.tensors().items()}
        for task, autoencoder in zip(gate.tasks, gate.autoencoders, strict=True):
            found |= {f"autoencoders.{task}.{name}": value for name, value in autoencoder.tensors().items()}
            ref = self.experts[task]
            found[f"classes.{task}"] = torch.tensor(ref.classes)
            found |= {f"experts.{task}.{name}": value for name, value in self.reader.copies(ref.source).items()}
        return {_PREFIX + name: value for name, value in found.items()}


def take_predictor(
    state: MutableMapping[str, Tensor],
    prefix: str,
    root: nn.Module,
    head: str,
    kind: AutoencoderKind,
    device: torch.device,
    feature_shape: Sequence[int],
) -> Predictor | None:
    """Take what ``Predictor.tensors`` gave, under ``prefix``, out of ``state``: a predictor in memory, None without.

    Raises:
        InputError: tensors are missing, or belong to another kind of autoencoder, or to another backbone.
    """
    start = prefix + _PREFIX
    # As torch does it: what is loaded does not share memory with what was given.
    tensors = {name[len(start) :]: state.pop(name).detach().clone() for name in list(state) if name.startswith(start)}
    if not tensors:
        return None
    tasks = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("classes."))
    needed = ["settings", "statistics.mean", "statistics.std", "statistics.num_samples"]
    fields = {(name.split(".")[0], name.split(".", 2)[2]) for name in tensors if name.startswith(_OF_GATE)}
    for task in tasks:
        needed += [f"{what}.{task}.{name}" for what, name in fields]
        needed += [f"experts.{task}.{name}" for name in root.state_dict()]
    if missing := [_PREFIX + name for name in needed if name not in tensors]:
        raise InputError(f"The state dict is incomplete: {len(missing)} tensors are missing, such as {missing[0]!r}.")
    temp, threshold, threads, linear, *rest = tensors["settings"].tolist()
    stored: AutoencoderKind = "linear" if linear else "sgd"
    if stored != kind:
        raise InputError(f"The state dict holds {stored!r} autoencoders; build ExpertGate(autoencoder={stored!r}).")
    mean, std = tensors["statistics.mean"], tensors["statistics.std"]
    if mean.numel() != math.prod(feature_shape):
        raise InputError(
            f"The state dict was trained on {mean.numel()} features, but the model's backbone gives "
            f"{math.prod(feature_shape)}: build ExpertGate with the same shape=, arch= and output_layer_name=."
        )
    autoencoders = {task: autoencoder_from_tensors(kind, _below(tensors, f"autoencoders.{task}.")) for task in tasks}
    statistics = Statistics(mean, std, int(tensors["statistics.num_samples"]))
    states = {task: _below(tensors, f"experts.{task}.") for task in tasks}
    experts = {task: ExpertRef(task, tuple(tensors[f"classes.{task}"].tolist())) for task in tasks}
    summaries = None
    if any(what == "summaries" for what, _ in fields):
        summaries = {task: TaskSummary(**_below(tensors, f"summaries.{task}.")) for task in tasks}
    # Earlier versions did not have what follows.
    limits = tuple(tensors["limits"].tolist()) if "limits" in tensors else ()
    about = {"limits": limits, "unknown": get_args(Unknown)[int(rest[0]) if rest else 0]}
    gate = make_gate(autoencoders, statistics, temp, None if threshold < 0 else threshold, summaries, **about)
    reader = ExpertReader(states.__getitem__, root, head, _IN_MEMORY, device)
    unknown = {task: TaskNotes(ref.classes, (None,) * len(ref.classes), None) for task, ref in experts.items()}
    notes = notes_from_tensor(tensors["notes"]) if "notes" in tensors else unknown  # as earlier versions saved them
    return Predictor(gate, experts, reader, int(threads), notes).to(device, root)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
