"""What the stages of one worker process share: the backbone, the readers of the run directory, the scratch folder."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distributed_eg.errors import InputError, StoppedError, StorageError
from distributed_eg.method.backbone import Backbone
from distributed_eg.method.expert import blank
from distributed_eg.method.gate import Expert, expert_of_root
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.runtime.messages import Epoch, GateAndExperts, TaskData, TaskInput, WorkerSetup
from distributed_eg.runtime.shipping import Shipped
from distributed_eg.runtime.worker.contract import require_shape
from distributed_eg.runtime.worker.reading import Reader
from distributed_eg.store.experts import ExpertReader
from distributed_eg.store.features import FeatureFile, on_device, write_features
from distributed_eg.store.records import StatisticsRecord
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import map_tensors
from distributed_eg.types import derive_seed


class WorkerContext:
    """One process's view of a run.

    Args:
        setup: what the worker is made from.
        fetch: gives the bytes behind a leaf reference.
        device: where this process computes.
        tell: called now and then while an expert is trained.
    """

    def __init__(
        self, setup: WorkerSetup, fetch: Callable[[Any], Any], device: torch.device, tell: Callable[[Epoch], None]
    ) -> None:
        self.setup = setup
        self.fetch = fetch
        self.device = device
        self.tell = tell
        self.storage = Storage(setup.storage_uri)
        self.root = setup.root.load(fetch).eval()
        """Without its parameters, which are read when they are needed."""
        self.backbone = Backbone(self.load_root(), setup.feature_layer, setup.shape).to(device)
        self.backbone.drop_unused()
        self.reader = ExpertReader(
            partial(map_tensors, self.storage), self.root, setup.head, setup.cluster.max_resident_experts, device
        )
        self._known: tuple[Shipped, GateAndExperts] | None = None
        self._root_expert: Expert | None = None
        self.scratch = setup.scratch_folder
        self.stopping = threading.Event()
        """Set once the driver has been told to stop; what runs looks at it between batches."""
        _clear_earlier(setup)

    def load_root(self) -> nn.Module:
        """The root network, on the CPU, as the run began with it.

        Raises:
            StorageError: its file is missing, damaged or of another architecture.
        """
        network, artifact = blank(self.root), self.setup.root_weights
        try:
            network.load_state_dict(map_tensors(self.storage, artifact))
        except RuntimeError as error:
            raise StorageError(f"The root {artifact.path!r} does not fit this run's backbone: {error}") from error
        return network

    def root_expert(self) -> Expert:
        """The root network as an expert for its own outputs, numbered from 0; it stays in memory."""
        if self._root_expert is None:
            self._root_expert = expert_of_root(self.load_root().to(self.device).eval(), self.setup.shape)
        return self._root_expert

    def let_go(self) -> None:
        """Have nothing in memory that can be read again."""
        self.reader.clear()
        self._root_expert = None

    def known(self, shipped: Shipped) -> GateAndExperts:
        """What an evaluation chooses among; its requests, one an experience, all bring the same."""
        if self._known is None or self._known[0] != shipped:
            self._known = shipped, shipped.load(self.fetch)
        return self._known[1]

    def batches(self, reader: Reader) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and targets of all samples, in order, in batches of the run's feature batch size."""
        batch_size = self.setup.method.feature_batch_size
        for batch in DataLoader(reader, batch_size, sampler=range(len(reader)), collate_fn=reader.collate):
            if self.stopping.is_set():
                raise StoppedError("The driver was told to stop.")
            yield batch[0], batch[1]

    def features(self, images: Tensor, what: str, *, is_trained: bool = False) -> Tensor:
        """Features (n, num_features) of checked ``images``; ``what`` names them in errors, ``is_trained`` says that it
        is too late for another model.

        Raises:
            InputError: images of another shape than the backbone was built for, or NaN or infinite pixels.
        """
        require_shape(tuple(images.shape[1:]), self.setup.shape, what, is_trained=is_trained)
        if not bool(torch.isfinite(images).all()):
            raise InputError(f"The images of {what} hold NaN or infinite pixels; check its transforms.")
        features: Tensor = self.backbone(on_device(images, self.device))
        return features

    def scratch_file(self, key: str, part: str) -> Path:
        """Where the features of ``part`` ("train" or "valid") of a task's input are kept while they are needed."""
        return self.scratch / f"{key}-{part}.arrow"

    def feature_file(self, task_input: TaskInput, part: str, statistics: StatisticsRecord | None) -> FeatureFile:
        """A task's features, extracted again, bit for bit, where this node does not have them."""
        path = self.scratch_file(task_input.key, part)
        if not path.exists():
            data: TaskData = task_input.data.load(self.fetch)
            self.extract(task_input, data.gate_train if part == "train" else data.gate_valid, part)
        values = None if statistics is None else self.reader.statistics(statistics)
        return FeatureFile(path, values, self.device)

    def extract(self, task_input: TaskInput, dataset: Any, part: str) -> int:
        """Write a task's features of ``part`` to scratch; return how many samples there are."""
        what = f"task {task_input.record.task} (label {task_input.record.label})"
        allowed = torch.tensor(task_input.record.classes)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for images, targets in self.batches(Reader(dataset, what)):
                strangers = targets[~torch.isin(targets.cpu(), allowed)]
                if len(strangers):
                    raise InputError(
                        f"The targets of {what} hold the class {int(strangers[0])}, but the experience declares "
                        f"{list(task_input.record.classes)}; check its target transform."
                    )
                yield self.features(images, what), targets

        # A dataset may draw at random by itself: it must draw the same wherever and whenever it is read.
        seed = derive_seed(self.setup.method.seed, task_input.record.task, f"features {part}")
        with reproducible(seed, self.setup.cluster.threads, self.device):
            return write_features(self.scratch_file(task_input.key, part), batches())

    def drop_features(self, key: str, part: str) -> None:
        """Remove features that nobody needs any more."""
        self.scratch_file(key, part).unlink(missing_ok=True)

    def close(self) -> None:
        """Have what runs end at its next batch; remove this driver's scratch folder from this node."""
        self.stopping.set()
        shutil.rmtree(self.scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.scratch.parent.rmdir()


def _clear_earlier(setup: WorkerSetup) -> None:
    """Remove what earlier drivers of this run, which are gone, left on this node."""
    for folder in setup.scratch_of_run.glob("*"):
        if folder.name < setup.scratch_folder.name:
            shutil.rmtree(folder, ignore_errors=True)
