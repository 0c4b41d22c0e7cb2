"""Reading a run back: experts on demand, at most so many in memory at a time, and the gate over all tasks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distributed_eg.errors import InputError, StorageError
from distributed_eg.method.autoencoder import (
    Autoencoder,
    AutoencoderStack,
    autoencoder_from_tensors,
    stack_autoencoders,
)
from distributed_eg.method.calibration import HeldOut, calibrate
from distributed_eg.method.expert import blank_expert
from distributed_eg.method.gate import Expert, Gate, make_gate
from distributed_eg.method.shared_score import MOST_BYTES, kept_rows
from distributed_eg.method.standardize import Statistics
from distributed_eg.method.summary import TaskSummary
from distributed_eg.store.records import StatisticsRecord
from distributed_eg.store.registry import ExpertRef, GateRef
from distributed_eg.store.storage import Artifact
from distributed_eg.types import AutoencoderKind

LoadTensors = Callable[[Any], dict[str, Tensor]]

_GROUP = 64
"""Autoencoders laid out together where the next task asks the same ones and one more."""


class ExpertReader:
    """Reads experts and gates of a run; the least recently used expert goes first.

    Args:
        load: gives the tensors of a sealed file, or of whatever an expert's ``source`` is; they are copied.
        root: the network that experts are copies of; never changed.
        head: name of its head.
        capacity: experts in memory at a time.
        device: where they are put.
    """

    def __init__(
        self, load: LoadTensors, root: nn.Module, head: str, capacity: int, device: torch.device | str
    ) -> None:
        self._load = load
        self.root, self._head = root, head
        self._capacity = capacity
        self.device = torch.device(device)
        self._experts: OrderedDict[ExpertRef, Expert] = OrderedDict()
        self._autoencoders: dict[Artifact, Autoencoder] = {}
        self._summaries: dict[Artifact, tuple[int, TaskSummary]] = {}
        self._groups: dict[tuple[Artifact, ...], AutoencoderStack] = {}
        self._statistics: dict[StatisticsRecord, Statistics] = {}
        self._gate: tuple[GateRef, Gate] | None = None

    def to(self, device: torch.device, root: nn.Module) -> ExpertReader:
        """A reader of the same run for another device, with nothing in memory yet."""
        return ExpertReader(self._load, root, self._head, self._capacity, device)

    def expert(self, ref: ExpertRef) -> Expert:
        """The expert in eval mode; shared, so that callers that train must copy it.

        Raises:
            StorageError: its file is missing, damaged or of another architecture.
        """
        if ref in self._experts:
            self._experts.move_to_end(ref)
            return self._experts[ref]
        return self.keep(ref, self._load(ref.source))

    def copies(self, source: Any) -> dict[str, Tensor]:
        """The tensors of a source, in memory of their own."""
        return {name: tensor.clone() for name, tensor in self._load(source).items()}

    def release(self, but: ExpertRef | None = None) -> None:
        """Have no expert in memory any more, ``but`` that one."""
        for ref in self._experts.keys() - {but}:
            del self._experts[ref]

    def clear(self) -> None:
        """Have nothing in memory any more but what is on the CPU and small."""
        self.release()
        self._groups.clear()
        self._gate = None

    def keep(self, ref: ExpertRef, tensors: Mapping[str, Tensor]) -> Expert:
        """Have an expert in memory, a copy of its ``tensors``.

        Raises:
            StorageError: they are of another architecture.
        """
        while len(self._experts) >= self._capacity:
            self._experts.popitem(last=False)
        network = blank_expert(self.root, self._head, len(ref.classes)).to(self.device)
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise StorageError(f"The expert {ref.source} does not fit this run's backbone: {error}") from error
        expert = Expert(network.eval().requires_grad_(False), ref.classes)
        self._experts[ref] = expert
        return expert

    def autoencoder(self, kind: AutoencoderKind, artifact: Artifact) -> Autoencoder:
        """A sealed autoencoder, on the CPU; all of them stay in memory, as the gate asks every one for every sample."""
        if artifact not in self._autoencoders:
            self._autoencoders[artifact] = autoencoder_from_tensors(kind, self.copies(artifact))
        return self._autoencoders[artifact]

    def stacks(self, kind: AutoencoderKind, artifacts: Sequence[Artifact]) -> list[AutoencoderStack]:
        """Autoencoders laid out in groups, in their order; whole groups stay laid out until the gate is asked for."""
        groups = [tuple(artifacts[i : i + _GROUP]) for i in range(0, len(artifacts), _GROUP)]
        stacks: list[AutoencoderStack] = []
        for group in groups:
            stack = self._groups.get(group)
            if stack is None:
                stack = stack_autoencoders([self.autoencoder(kind, a).to(self.device) for a in group])
            if len(group) == _GROUP:
                self._groups[group] = stack
            stacks.append(stack)
        return stacks

    def summaries(self, artifacts: Sequence[Artifact], most_bytes: int = MOST_BYTES) -> list[TaskSummary]:
        """Sealed summaries, on the CPU, with as much of their scatter as the shared score takes of so many tasks; that
        stays in memory."""
        for artifact in artifacts:
            known, summary = self._summaries.get(artifact, (0, None))
            most = kept_rows(len(artifacts), summary.means.shape[1], most_bytes) if summary is not None else 1
            if summary is None or known < most:
                summary = TaskSummary(**self._load(artifact))
                most = kept_rows(len(artifacts), summary.means.shape[1], most_bytes)
            if known != most:
                self._summaries[artifact] = most, summary.cut(most)
        return [self._summaries[artifact][1] for artifact in artifacts]

    def statistics(self, record: StatisticsRecord) -> Statistics:
        """The run's standardization statistics."""
        if record not in self._statistics:
            tensors = self.copies(record.artifact)
            loaded = Statistics(tensors["mean"], tensors["std"], record.num_samples)
            self._statistics[record] = loaded.to(self.device)
        return self._statistics[record]

    def gate(self, ref: GateRef) -> Gate:
        """The gate over all tasks that ``ref`` names; the last one stays in memory, laid out for its batched pass.

        Raises:
            InputError: it is to know unknown images, and the run's tasks do not say how strange their own are.
        """
        if self._gate is None or self._gate[0] != ref:
            autoencoders = {task: self.autoencoder(ref.kind, artifact) for task, artifact in ref.autoencoders}
            self._groups.clear()  # the gate has a layout of its own
            summaries = dict(zip(autoencoders, self.summaries(ref.summaries), strict=True)) if ref.summaries else None
            held_out = [HeldOut(**self.copies(artifact)) for artifact in ref.held_out]
            known, statistics = calibrate(held_out, ref.temp), self.statistics(ref.statistics)
            if ref.unknown != "expert" and not ref.limits:
                raise InputError(
                    f"unknown={ref.unknown!r} needs to know how strange each task's own images are, which a task of "
                    "this run has not noted, for an earlier version trained it: leave it at 'expert'."
                )
            about = {"calibration": known, "limits": ref.limits, "unknown": ref.unknown}
            gate = make_gate(autoencoders, statistics, known.temp, ref.confidence_threshold, summaries, **about)
            self._gate = (ref, gate)
        return self._gate[1]
