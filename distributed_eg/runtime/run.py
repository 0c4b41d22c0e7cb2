"""A run as its driver holds it: opened on a run directory, trained and evaluated on an engine's workers, closed."""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from distributed_eg.config import ClusterConfig, MethodConfig
from distributed_eg.errors import ExpertGateError, RunInUseError, StorageError
from distributed_eg.runtime.dispatcher import Dispatcher, TaskSource
from distributed_eg.runtime.engine import Engine
from distributed_eg.runtime.identity import Root, known_run, new_record
from distributed_eg.runtime.inline import InlineEngine
from distributed_eg.runtime.life import Life
from distributed_eg.runtime.messages import (
    Evaluated,
    EvaluateRequest,
    EvaluateResult,
    Observer,
    PartAnswer,
    ReferenceRequest,
    WorkerSetup,
)
from distributed_eg.runtime.pool import run_all
from distributed_eg.runtime.resuming import is_whole
from distributed_eg.runtime.shipping import Shipped, Shipper, hollow
from distributed_eg.runtime.signals import uninterrupted
from distributed_eg.schedule.events import WorkerJoined
from distributed_eg.schedule.machine import Machine
from distributed_eg.store import layout, records
from distributed_eg.store.lease import Lease, superseded
from distributed_eg.store.records import StatisticsRecord
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Storage
from distributed_eg.store.weights import hash_tensors, save_tensors

logger = logging.getLogger(__name__)

_TASKS_AHEAD = 4
_ATTEMPTS_PER_DRIVER = 10**9


class Run:
    """One driver's work on one run; made by ``open``.

    Args:
        storage: the run directory.
        lease: the right to write it.
        engine: where requests run; started.
        root: the network that ``setup`` ships, without its parameters.
        setup: what its workers are made from.
        observer: told of every stage that starts or ends, and of epochs of experts.
        is_new: whether the storage held no run before.
    """

    def __init__(
        self,
        storage: Storage,
        lease: Lease,
        engine: Engine,
        root: nn.Module,
        setup: WorkerSetup,
        observer: Observer | None,
        *,
        is_new: bool,
    ) -> None:
        self.storage = storage
        self._lease = lease
        self._engine = engine
        self._root = root
        self._setup = setup
        self._observer = observer
        self._is_new = is_new
        # Numbers of a later driver lie above all that an earlier one can have given out.
        self._first_attempt = setup.generation * _ATTEMPTS_PER_DRIVER
        self._has_reference = False
        self.recorded = engine.coordinator.registry().snapshot()
        """What earlier drivers left."""
        self.registry = Registry(statistics=self._whole_statistics(), retirements=dict(self.recorded.retirements))
        """What this driver has seen: a resumed run's tasks come in as the stream brings them again, those of one that
        is appended to are there."""
        follows = setup.cluster.resume == "append"
        if follows:
            self.registry = replace(self.recorded.of_sealed(), statistics=self.registry.statistics)
        self.life = Life(storage, lease.generation, self.recorded, self.registry, follows)
        """What becomes of its tasks beside their training."""
        self._num_ended: int | None = None

    @staticmethod
    def open(
        cluster: ClusterConfig,
        method: MethodConfig,
        root: Root,
        settings: Mapping[str, object] | None,
        device: str | None = None,
        observer: Observer | None = None,
    ) -> Run:
        """Take the lease, start the engine, then write what the run is, or see that it is what the storage holds.

        Args:
            cluster: where to run, and where the run is kept.
            method: the run's numbers.
            root: stored once, and shipped to every worker.
            settings: what else makes a run what it is, as JSON values; None: it is opened for what it holds.
            device: where workers compute; None: the GPU that each was given, else the CPU.
            observer: told of every stage that starts or ends, and of epochs of experts.

        Raises:
            StorageError: the storage cannot be written, or holds a run that is not to be resumed, or none or a damaged
                one where what it holds is needed.
            InputError: Ray Client is asked for.
            RunInUseError: another driver works on the run.
            ResumeError: the storage holds a run that was begun with something else.
            ResourceError: the cluster cannot hold such workers.
        """
        _refuse_client(cluster)
        storage = Storage(cluster.storage or tempfile.mkdtemp(prefix="distributed-eg-run-"))
        uri = storage.uri
        sealed = hash_tensors("root", root.network.state_dict())
        wanted = new_record(cluster, method, root, sealed, settings or {})
        with contextlib.ExitStack() as undo:
            if cluster.storage is None:
                undo.callback(shutil.rmtree, uri, ignore_errors=True)
            known_run(storage, cluster, wanted, settings)  # a run that is refused is not touched
            lease = _acquire(storage)
            undo.callback(lease.release)
            known = known_run(storage, cluster, wanted, settings)
            if known is not None:
                wanted = replace(wanted, run_id=known.run_id)
                method = replace(method, feature_batch_size=known.method["feature_batch_size"])
            run_id = wanted.run_id
            storage.sweep()
            engine = _engine(cluster, uri, run_id, lease.generation)
            undo.callback(engine.close)
            engine.start()
            save_tensors(storage, "root", root.network.state_dict())
            # Workers read the weights where they are sealed: sent along, every node would hold them twice.
            network = hollow(root.network, "The backbone")
            shipped, _ = engine.shipper.ship(network, "The backbone")
            cut = (root.head, root.feature_layer, root.shape)
            setup = WorkerSetup(uri, run_id, lease.generation, shipped, sealed, *cut, method, cluster, device)
            if settings is not None:  # a worker is seconds in coming: it need not wait for what comes here meanwhile
                engine.add_workers(setup, 1)
            run = Run(storage, lease, engine, network, setup, observer, is_new=known is None)
            if known is None:
                # Last: a run that could not be started is none, and its storage can be used again.
                records.seal(storage, wanted)
            undo.pop_all()
            return run

    @property
    def shipper(self) -> Shipper:
        """Ships datasets to the workers."""
        return self._engine.shipper

    def is_root(self, network: nn.Module) -> bool:
        """Whether ``network`` still has the weights that the run began with."""
        return hash_tensors("root", network.state_dict()) == self._setup.root_weights

    def workers(self) -> list[WorkerJoined]:
        """Workers that are ready, and stay."""
        return self._engine.workers()

    @contextlib.contextmanager
    def working(self) -> Iterator[Run]:
        """Around a call's first shipment and its last answer: what is not wanted any more is given up after it.

        Between calls others may end what the engine holds: the user by ``ray.shutdown()``, another strategy that needs
        the room. Then it is started again here; raises what ``open`` does of it.
        """
        if not self._engine.begin():
            try:
                self._engine.start()
                self._setup = replace(self._setup, root=self.shipper.ship(self._root, "The backbone")[0])
            except BaseException:
                self._engine.close()
                raise
        try:
            yield self
        finally:
            self._engine.end()

    def fit_reference(self, data: Shipped) -> None:
        """Statistics and the root's autoencoder from a reference dataset, where the run has none yet."""
        if self.registry.statistics is None:
            self._engine.add_workers(self._setup, 1)
            (record,) = run_all(self._engine, [ReferenceRequest(data)])
            assert isinstance(record, StatisticsRecord)
            self.adopt_reference(record)

    def adopt_reference(self, record: StatisticsRecord) -> None:
        """Take statistics, and the root's autoencoder, that are sealed in the run directory already."""
        if self.registry.statistics != record:
            self._engine.coordinator.record(record)
            self.registry.add(record)
        self._has_reference = True

    def train(self, source: TaskSource, num_tasks: int | None, trainer: Shipped) -> None:
        """Train every task of ``source``, pulled one by one as workers become free; ``num_tasks`` None: unknown.

        Raises:
            TaskFailedError: tasks failed; every task that did not need a failed one is committed. Where one task failed
                by an error of ours, that error is raised itself.
            Exception: what ``source`` raised, once everything that it gave before is done.
        """
        self.note_end()
        registry = self.registry
        known = registry.statistics
        final = known is not None and any(_is_final(known, seen) for seen in (registry, self.recorded))
        if not final and not self._has_reference:
            registry.statistics = None
        self._engine.add_workers(self._setup, num_tasks)
        machine = Machine(
            registry.manifests,
            has_statistics=registry.statistics is not None,
            # A stream of unknown length may not fit in memory: it is read a little ahead of the work only.
            tasks_per_worker=_TASKS_AHEAD if num_tasks is None else None,
            first_attempt=self._first_attempt,
            stop_on_failure=self._setup.cluster.on_task_failure == "stop",
        )
        way_on = self._setup.cluster.way_on
        dispatcher = Dispatcher(
            *(self._engine, self.storage, self.recorded, registry, source, trainer, self._observer),
            *(way_on, self._setup.method.unknown_quantile),
        )
        try:
            dispatcher.run(machine)
        except Exception:
            self._export_anyway()
            raise
        finally:
            self._first_attempt = machine.next_attempt
            self._engine.listener = None  # else what this call held would stay, and evaluations would be asked, too
        self._engine.coordinator.export()
        self._num_ended = max(registry.arrivals, default=-1) + 1

    def note_end(self) -> None:
        """Note that the last call that ended well did: when the next one begins, and when the user closes the run. A
        driver that dies before may be sent again with the same stream.

        Raises:
            StorageError: the run directory cannot be written.
        """
        if self._num_ended is not None:
            self.life.end_calls(self._num_ended)

    def evaluate(self, requests: Sequence[EvaluateRequest]) -> list[PartAnswer]:
        """Carry out ``requests`` on the workers; the answers for all of their parts, in order."""
        self._engine.add_workers(self._setup, len(requests))
        started = time.perf_counter()
        results = run_all(self._engine, requests)
        answers = [answer for result in results if isinstance(result, EvaluateResult) for answer in result.parts]
        num_samples = sum(len(answer.targets) for answer in answers)
        self._engine.observe(Evaluated(num_samples, time.perf_counter() - started))
        return answers

    def close(self) -> None:
        """End workers, coordinator and, where we started it, Ray; give the lease back. The run directory stays."""
        with uninterrupted(), contextlib.ExitStack() as last_first:
            last_first.callback(self._lease.release)
            last_first.callback(self._sweep)
            last_first.callback(shutil.rmtree, self._setup.scratch_of_run, ignore_errors=True)
            last_first.callback(self._engine.close)

    def discard(self) -> None:
        """Close a run that did not come to be, so that its storage can be used again; one that was there stays."""
        with contextlib.ExitStack() as last_first:
            last_first.callback(self.close)
            for path in (layout.STATISTICS, layout.RUN):
                if self._is_new and self.storage.exists(path):
                    last_first.callback(self.storage.delete, path)

    def _whole_statistics(self) -> StatisticsRecord | None:
        record = self.recorded.statistics
        if record is None or not _is_final(record, self.recorded):
            return None
        return record if all([is_whole(self.storage, artifact) for artifact in record.artifacts]) else None

    def _export_anyway(self) -> None:
        """Write the tables, after an error that must not be hidden by another one."""
        try:
            self._engine.coordinator.export()
        except ExpertGateError as error:
            logger.warning(
                "The tables were not written; they are exports only, and the next driver writes them. %s", error
            )

    def _sweep(self) -> None:
        """Remove what workers left that were ended in mid-write, and nothing of a driver that took the run over."""
        try:
            if not superseded(self.storage, self._lease.generation):
                self.storage.sweep()
        except StorageError as error:
            logger.warning("The storage was not swept of unfinished files; the next driver does it. %s", error)


def _is_final(statistics: StatisticsRecord, registry: Registry) -> bool:
    """Whether statistics are the run's for good. Those of a first task that failed before anything was learnt under
    them are not: its data may have been corrected since."""
    return statistics.root_autoencoder is not None or bool(registry.autoencoders)


def _acquire(storage: Storage) -> Lease:
    try:
        return Lease.acquire(storage)
    except RunInUseError:
        gc.collect()  # closes strategies that nobody can reach any more, as after a notebook's cell was run again
        return Lease.acquire(storage)


def _refuse_client(cluster: ClusterConfig) -> None:
    """Before anything is touched."""
    if cluster.engine == "ray":
        from distributed_eg.runtime.ray_backend.cluster import refuse_client

        refuse_client(cluster)


def _engine(cluster: ClusterConfig, uri: str, run_id: str, generation: int) -> Engine:
    if cluster.engine == "inline":
        return InlineEngine(uri, generation)
    from distributed_eg.runtime.ray_backend.engine import RayEngine  # the inline engine needs no Ray, nor loads it

    return RayEngine(cluster, uri, run_id, generation)
