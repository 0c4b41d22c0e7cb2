"""What of a strategy never travels to a worker: the run, the model's reader of it, what it reports and remembers."""

from __future__ import annotations

import logging
import pickle
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, replace
from functools import partial

import pyarrow as pa
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from torch import nn
from torch.utils.data import Dataset

from distributed_eg import given
from distributed_eg.config import ClusterConfig, MethodConfig
from distributed_eg.errors import InputError, StorageError
from distributed_eg.runtime.identity import Root
from distributed_eg.runtime.life import Life
from distributed_eg.runtime.messages import Observer
from distributed_eg.runtime.pickling import dumps, load
from distributed_eg.runtime.run import Run
from distributed_eg.runtime.signals import terminable
from distributed_eg.store import layout
from distributed_eg.store.experts import ExpertReader
from distributed_eg.store.records import TaskManifest
from distributed_eg.store.reference import Reference
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import map_tensors
from distributed_eg.strategy.avalanche_types import Template
from distributed_eg.strategy.checks import unequal_sizes, warn_of_sizes
from distributed_eg.strategy.metrics import GateReporter
from distributed_eg.strategy.model import ExpertGate
from distributed_eg.strategy.predictions import notes_of
from distributed_eg.strategy.predictor import Predictor
from distributed_eg.strategy.tasks.data_identity import reference_identity
from distributed_eg.strategy.tasks.intake import check_experiences
from distributed_eg.strategy.tasks.told_of_images import Told
from distributed_eg.strategy.training.packing import pack_metrics
from distributed_eg.types import OnRepeat, TaskId

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Driver:
    """The run behind a strategy: opened by the first ``train``, closed with the strategy."""

    strategy: InitVar[Template]
    """Its model gets gate and experts after training."""
    own_names: frozenset[str]
    """Attributes of the strategy that no subclass gave it."""
    method: MethodConfig
    cluster: ClusterConfig
    device: str | None
    """Where workers compute; None: the GPU that each was given, else the CPU."""
    reference: Dataset[object] | str | None
    """A dataset or a file of ``save_reference``; None: the first task's features give the statistics."""
    observer: Observer | None
    told: Told
    """What the user says of all images."""

    def __post_init__(self, strategy: Template) -> None:
        self.reporter = GateReporter(strategy.evaluator)
        self.fresh_metrics = pack_metrics(strategy)
        """The evaluator's metrics as they are before they have seen anything: what every expert starts with."""
        self.run: Run | None = None
        """None before there is one."""
        self._model: ExpertGate = strategy.model
        self._told_sizes: tuple[int, ...] = ()
        """What was last said of unequal tasks."""
        self._close: weakref.finalize[[], Driver] | None = None
        self._reader: ExpertReader | None = None
        self._layers: list[tuple[str, type, list[bool]]] = []
        self._referred: Registry | None = None
        """What the run held when this driver was unpickled, which refers to it; None: it begins the run itself."""

    def __getstate__(self) -> dict[str, object]:
        """A reference to the run, where there is one: ``attach_to`` makes a driver of it that goes on."""
        state = {**vars(self), "run": None, "_model": None, "_close": None, "_reader": None}
        if self.run is not None:
            cluster = replace(self.cluster, storage=self.run.storage.uri, resume="append")
            state |= {"cluster": cluster, "reference": None, "_referred": Registry()}  # what it gave is in the run
        return state

    def attach_to(self, model: ExpertGate) -> None:
        """Go on as the driver of an unpickled strategy; ``model`` gets the run's gate, where it holds none itself.

        Raises:
            StorageError: the run cannot be read.
        """
        self._model = model
        if self._referred is not None:
            storage = self._storage_of_run()
            if storage is not None:
                self._referred = Registry.read(storage, without_damaged=True).of_sealed()
                self._attach_from(storage, self._referred)
            elif not model.is_trained:
                raise self._gone()

    def _storage_of_run(self) -> Storage | None:
        """The run directory that this refers to, where it is there still."""
        storage = Storage(str(self.cluster.storage))
        return storage if storage.exists(layout.RUN) else None

    def _gone(self) -> StorageError:
        return StorageError(
            f"The run {Storage(str(self.cluster.storage)).shown!r} is gone, to which this strategy refers, which was "
            "copied or pickled: it cannot go on. Give the next one ClusterConfig(storage=…), a folder that stays."
        )

    @property
    def registry(self) -> Registry:
        """What the run's driver has seen, or before it has been given anything what the run holds; empty before there
        is a run."""
        if self.run is None:
            return self._referred or Registry()
        return self.run.registry if self.run.registry.manifests else self.run.recorded.of_sealed()

    @property
    def run_dir(self) -> str | None:
        """Path or URI of the run directory; None before there is a run."""
        if self.run is None:
            return None if self._referred is None else str(self.cluster.storage)
        return self.run.storage.uri

    @property
    def follows(self) -> bool:
        """Whether what is given follows what the run holds, rather than being all of it."""
        return self.cluster.resume == "append"

    @property
    def retired(self) -> set[int]:
        """Labels of the tasks that the gate does without."""
        registry = self.registry
        return {registry.newest[task].label for task in registry.newest.keys() - registry.active.keys()}

    def check(self, experiences: list[CLExperience], on_repeat: OnRepeat) -> None:
        """Find what cannot be used of the next call's experiences, as far as is known of the run.

        Raises:
            InputError: an experience cannot be used, or brings a label again where that is refused.
        """
        # A stream that is brought again may hold what was retired since.
        retired = set() if self.cluster.resume is True else self.retired
        check_experiences(experiences, self.settled, on_repeat, retired)

    def task_of(self, label: int) -> TaskId:
        """The number that users see of the sealed task with that label.

        Raises:
            InputError: there is none.
        """
        found = self.registry.of_label(given.whole(label, "label"))
        if found is None:
            known = ", ".join(str(manifest.label) for manifest in self.registry.newest.values())
            raise InputError(f"No finished task has the label {label}; those that are finished have {known or 'none'}.")
        return found.versions[0]

    @property
    def settled(self) -> dict[TaskId, TaskManifest]:
        """The newest versions of sealed tasks, but for those that a call brought that was cut off."""
        again = set() if self.run is None else {record.task for record in self.run.life.interrupted()}
        newest = {} if self.run is None else self.run.registry.newest
        return {task: manifest for task, manifest in newest.items() if manifest.task not in again}

    @property
    def is_closed(self) -> bool:
        """Whether there was a run and its workers are gone."""
        return self._close is not None and not self._close.alive

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """Registry and relatedness table; of a run that is to be resumed before it is opened, too."""
        if self.run is None and self.cluster.resume and (storage := self._storage_of_run()) is not None:
            return Registry.read(storage, without_damaged=True).of_sealed().tables()
        return self.registry.tables()

    def open(self, settings: Mapping[str, object] | None) -> Run:
        """The run; made at the first call, from ``settings`` beside what this driver was made with, None: to be asked.

        Without a storage it lies in a temporary folder that lives as long as the model.

        Raises:
            InputError: it was closed, the reference cannot be used, or the network was changed since the run began.
            ExpertGateError: what ``Run.open`` raises.
        """
        if self.is_closed:
            raise InputError("This strategy was closed; make a new one.")
        if self.run is None:
            if self._referred is not None and self._storage_of_run() is None:
                raise self._gone()
            model, cluster = self._model, self.cluster
            root = Root(model.expert, model.head, model.output_layer_name, model.shape, model.describe())
            run = Run.open(cluster, self.method, root, settings, self.device, self.observer)
            if cluster.storage is None:
                weakref.finalize(model, shutil.rmtree, run.storage.uri, ignore_errors=True)
            try:
                self._adopt_reference(run)
            except BaseException:
                run.discard()
                raise
            self._close = weakref.finalize(self, run.close)
            self.run, self._layers = run, _layers(model.expert)
            if settings is None or self.follows:
                self._attach()
        elif _layers(self._model.expert) != self._layers or not self.run.is_root(self._model.expert):
            raise InputError(
                "The network model.expert was changed since the run began (layers, weights, which parameters learn), "
                "and its experts come from what it was: make a new model and strategy for a new run."
            )
        return self.run

    def open_to_ask(self) -> Run:
        """The run, which holds an answer.

        Raises:
            InputError: it was closed.
            StorageError: there is none, or no task of it is finished.
            ExpertGateError: what ``open`` raises.
        """
        if self.is_closed:
            kept = "" if self.cluster.storage is None else ", or ExpertGate.load(run_dir)"
            raise InputError(f"This strategy was closed; make a new one, or predict with strategy.model{kept}.")
        with terminable():
            run = self.open(None) if self.run is None else self.run
        if not self.registry.manifests:
            raise StorageError(f"The run {run.storage.shown!r} holds no finished task yet: train first.")
        return run

    def open_to_answer(self) -> Run:
        """The run, whose gate knows a task.

        Raises:
            StorageError: all are retired; and what ``open_to_ask`` raises.
        """
        run = self.open_to_ask()
        if not self.registry.active:
            raise StorageError(
                f"Every finished task of the run {run.storage.shown!r} is retired, and the gate has nothing to choose "
                "from: strategy.restore(label) takes one back."
            )
        return run

    def change(self, change: Callable[[Life], None]) -> None:
        """Change which tasks the gate knows; the model hears of it.

        Raises:
            ExpertGateError: what ``change`` and ``open_to_ask`` raise.
        """
        run = self.open_to_ask()
        change(run.life)
        self._attach()

    def close(self, *, in_error: bool = False) -> None:
        """End the workers, and Ray where it was started here. The model keeps its gate and its experts.

        ``in_error``: the last call, or what follows it, is going to be given again.
        """
        if self._close is None or not self._close.alive:
            return
        try:
            if self.run is not None and not in_error:
                self.run.note_end()
        except StorageError as error:
            logger.warning("It was not noted that the last training ended. %s", error)
        finally:
            self._close()

    @contextmanager
    def attaching(self) -> Iterator[None]:
        """After the block, hand the model the gate over all sealed tasks; whoever interrupts it waits for nothing."""
        try:
            yield
        except Exception:
            self._attach()
            raise
        self._attach()

    def reference_identity(self) -> dict[str, str | int] | str | None:
        """What the reference is recognised by; a dataset is read from a copy, for it may count what is read."""
        what = "The reference dataset"
        return reference_identity(load(partial(pickle.loads, dumps(self.reference, what)), what))

    def save_reference(self, path: str) -> None:
        """Write the run's statistics, and the root's autoencoder where it has one, for another run.

        Raises:
            InputError: nothing is trained yet.
            StorageError: the file cannot be written.
        """
        if self.run is None or self.registry.statistics is None:
            raise InputError("There are no statistics to save yet: call train first.")
        reference = Reference.of_run(self.run.storage, self.registry.statistics)
        reference.save(path, self.method.autoencoder.kind)

    def warn_of_unequal_tasks(self) -> None:
        """Say where the gate is known to be weak; once, however many calls bring the tasks."""
        extremes = unequal_sizes(self.registry, self.method.gate_score)
        if extremes != self._told_sizes and extremes:
            self._told_sizes = extremes
            warn_of_sizes(extremes)

    def _adopt_reference(self, run: Run) -> None:
        """Give the run its statistics, and the root its autoencoder."""
        reference = self.reference
        if isinstance(reference, str):
            run.adopt_reference(Reference.load(reference, self.method.autoencoder.kind).store(run.storage))
        elif reference is not None:
            dataset = reference.eval() if hasattr(reference, "eval") else reference
            shipped, _held = run.shipper.ship(dataset, "The reference dataset")
            run.fit_reference(shipped)

    def _attach(self) -> None:
        if self.run is not None:
            self._attach_from(self.run.storage, self.registry)

    def _attach_from(self, storage: Storage, registry: Registry) -> None:
        """Give the model the gate over the tasks of a registry, and where their experts are."""
        model = self._model
        if registry.manifests and registry.statistics is not None:
            if self._reader is None or self._reader.device != model.device:  # somebody may have moved it
                load = partial(map_tensors, storage)
                self._reader = ExpertReader(
                    load, model.expert, model.head, self.cluster.max_resident_experts, model.device
                )
            gate = self._reader.gate(registry.gate_ref(self.method))
            experts = registry.expert_refs()
            model.attach(Predictor(gate, experts, self._reader, self.cluster.threads, notes_of(registry)))


def _layers(network: nn.Module) -> list[tuple[str, type, list[bool]]]:
    """Each layer with its class, and which of its parameters learn."""
    return [(n, type(m), [p.requires_grad for p in m.parameters(recurse=False)]) for n, m in network.named_modules()]
