"""Opening a run: its directory, its identity, its engine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import tempfile
import uuid
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from distributed_eg.config import ClusterConfig, MethodConfig
from distributed_eg.errors import StorageError
from distributed_eg.runtime.dispatcher import Observer
from distributed_eg.runtime.engine import Engine
from distributed_eg.runtime.inline import InlineEngine
from distributed_eg.runtime.messages import WorkerSetup
from distributed_eg.runtime.resuming import differences, refuse
from distributed_eg.runtime.session import Session
from distributed_eg.runtime.signals import uninterrupted
from distributed_eg.store import layout
from distributed_eg.store.experts import ExpertReader
from distributed_eg.store.lease import Lease, superseded
from distributed_eg.store.storage import Storage, artifact_of
from distributed_eg.store.weights import pack_tensors

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "torchvision", "avalanche-lib", "safetensors", "pyarrow")


class OpenRun:
    """A session with what has to be closed after it."""

    def __init__(
        self, storage: Storage, lease: Lease, engine: Engine, session: Session, setup: WorkerSetup, *, is_new: bool
    ) -> None:
        self.storage = storage
        self.engine = engine
        self.session = session
        self.threads = setup.threads
        self.reader: ExpertReader | None = None
        """What the driver's model reads experts with, once it has a gate."""
        self._lease = lease
        self._scratch = setup.scratch_of_run
        self._is_new = is_new

    def close(self) -> None:
        """End workers, coordinator and, where we started it, Ray; give the lease back. The run directory stays."""
        with uninterrupted(), contextlib.ExitStack() as last_first:
            last_first.callback(self._lease.release)
            last_first.callback(self._sweep)
            last_first.callback(shutil.rmtree, self._scratch, ignore_errors=True)
            last_first.callback(self.engine.close)

    def discard(self) -> None:
        """Close a run that did not come to be, so that its storage can be used again; one that was there stays."""
        with contextlib.ExitStack() as last_first:
            last_first.callback(self.close)
            for path in (layout.STATISTICS, layout.RUN):
                if self._is_new and self.storage.exists(path):
                    last_first.callback(self.storage.delete, path)

    def _sweep(self) -> None:
        """Remove what workers left that were ended in mid-write, and nothing of a driver that took the run over."""
        try:
            if not superseded(self.storage, self._lease.generation):
                self.storage.sweep()
        except StorageError as error:
            logger.warning("The storage was not swept of unfinished files; the next driver does it. %s", error)


def open_run(
    cluster: ClusterConfig,
    method: MethodConfig,
    *,
    settings: dict[str, Any],
    root: nn.Module,
    backbone: dict[str, Any],
    feature_layer: str,
    shape: tuple[int, int, int],
    device: str | None,
    observer: Observer | None,
) -> OpenRun:
    """Take the lease, start the engine, then write what the run is, or see that it is what the storage holds.

    Args:
        settings: what else makes a run what it is, for run.json.
        root: the pretrained root network; stored once and shipped to every worker.
        backbone: what tells one root network from another, for run.json.

    Raises:
        StorageError: the storage cannot be written, or holds a run that is not to be resumed.
        RunInUseError: another driver works on the run.
        ResumeError: the storage holds a run that was begun with something else.
        ResourceError: the cluster cannot hold such workers.
    """
    uri = _absolute(cluster.storage) if cluster.storage else tempfile.mkdtemp(prefix="distributed-eg-run-")
    path, weights = pack_tensors("root", root.state_dict())
    identity = {
        "method": asdict(method),
        "threads": cluster.threads,
        "backbone": {
            **backbone,
            "root": asdict(artifact_of(path, weights)),
            "feature_layer": feature_layer,
            "shape": list(shape),
        },
        "settings": settings,
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "machine": {"cpu": torch.backends.cpu.get_cpu_capability(), "architecture": platform.machine()},
    }
    with contextlib.ExitStack() as undo:
        if cluster.storage is None:
            undo.callback(shutil.rmtree, uri, ignore_errors=True)
        storage = Storage(uri)
        _known_run(storage, cluster.resume)  # a run that is refused is not touched
        lease = Lease.acquire(storage)
        undo.callback(lease.release)
        known = _known_run(storage, cluster.resume)
        run_id = _same_run(uri, known, identity) if known else uuid.uuid4().hex[:12]
        storage.sweep()
        engine = _engine(cluster, uri, run_id, lease.generation)
        undo.callback(engine.close)
        engine.start()
        storage.write(path, weights)
        shipped, _ = engine.shipper.ship(root, "the backbone")
        setup = WorkerSetup(
            storage_uri=uri,
            run_id=run_id,
            generation=lease.generation,
            scratch=cluster.scratch,
            root=shipped,
            feature_layer=feature_layer,
            shape=shape,
            method=method,
            threads=cluster.threads,
            max_resident_experts=cluster.max_resident_experts,
            device=device,
            checkpoint_every_s=cluster.checkpoint_every_s,
        )
        session = Session(engine, storage, setup, cluster.on_task_failure, observer)
        if known is None:
            # Last: a run that could not be started is none, and its storage can be used again.
            storage.write_record(layout.RUN, {"run_id": run_id, **identity})
        undo.pop_all()
        return OpenRun(storage, lease, engine, session, setup, is_new=known is None)


def _known_run(storage: Storage, resume: bool) -> dict[str, Any] | None:
    if not storage.exists(layout.RUN):
        return None
    if not resume:
        raise StorageError(
            f"The storage {storage.uri!r} already holds a run; ClusterConfig(resume=True) goes on with it, and another "
            "storage begins a new one."
        )
    return storage.read_record(layout.RUN)


def _same_run(uri: str, known: dict[str, Any], identity: dict[str, Any]) -> str:
    """The run's id, once it is clear that this is the same run."""
    decisive = ("method", "threads", "backbone", "settings")
    lines = differences(*({name: values.get(name) for name in decisive} for values in (known, identity)))
    if lines:
        raise refuse("other settings", uri, lines)
    around = ("libraries", "machine")
    for line in differences(*({name: values.get(name) for name in around} for values in (known, identity))):
        logger.warning("Resuming %r on a machine of another kind, which may give other bytes: %s.", uri, line)
    return str(known["run_id"])


def _absolute(uri: str) -> str:
    """A local path as every process on this machine understands it, whatever folder it was started in."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def _engine(cluster: ClusterConfig, uri: str, run_id: str, generation: int) -> Engine:
    if cluster.engine == "inline":
        return InlineEngine(uri, generation)
    from distributed_eg.runtime.ray_backend.engine import (
        RayEngine,  # Ray is not needed, nor loaded, for the inline engine
    )

    return RayEngine(cluster, uri, run_id, generation)
