"""Opening a run: its directory, its identity, its engine."""

from __future__ import annotations

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
from distributed_eg.runtime.engine import Engine
from distributed_eg.runtime.inline import InlineEngine
from distributed_eg.runtime.requests import WorkerSetup
from distributed_eg.runtime.session import Observer, Session
from distributed_eg.store import layout
from distributed_eg.store.reading import ExpertReader
from distributed_eg.store.sealing import Storage
from distributed_eg.store.weights import save_tensors

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "torchvision", "avalanche-lib", "safetensors", "pyarrow")


class OpenRun:
    """A session with what has to be closed after it."""

    def __init__(self, storage: Storage, engine: Engine, session: Session, setup: WorkerSetup) -> None:
        self.storage = storage
        self.engine = engine
        self.session = session
        self.threads = setup.threads
        self.reader: ExpertReader | None = None
        """What the driver's model reads experts with, once it has a gate."""
        self._scratch_folder = setup.scratch_folder

    def close(self) -> None:
        """End workers, coordinator and, where we started it, Ray; the run directory stays."""
        self.engine.close()
        # Workers that went before they were asked could not clear it.
        shutil.rmtree(self._scratch_folder, ignore_errors=True)

    def discard(self) -> None:
        """Close a run that did not come to be: its storage can be used again."""
        self.close()
        self.storage.delete(layout.RUN)


def open_run(
    cluster: ClusterConfig,
    method: MethodConfig,
    *,
    root: nn.Module,
    backbone: dict[str, Any],
    feature_layer: str,
    shape: tuple[int, int, int],
    device: str | None,
    observer: Observer | None,
) -> OpenRun:
    """Start the engine, then write what the run is.

    Args:
        root: the pretrained root network; stored once and shipped to every worker.
        backbone: what tells one root network from another, for run.json.

    Raises:
        StorageError: the storage cannot be written, or already holds a run.
        ResourceError: the cluster cannot hold such workers.
    """
    uri = _absolute(cluster.storage) if cluster.storage else tempfile.mkdtemp(prefix="distributed-eg-run-")
    engine: Engine | None = None
    try:
        storage = Storage(uri)
        if storage.exists(layout.RUN):
            raise StorageError(f"The storage {uri!r} already holds a run; give another one, or remove it first.")
        run_id = uuid.uuid4().hex[:12]
        engine = _engine(cluster, uri, run_id)
        engine.start()
        artifact = save_tensors(storage, "root", root.state_dict())
        shipped, _ = engine.shipper.ship(root, "the backbone")
        setup = WorkerSetup(
            storage_uri=uri,
            session=uuid.uuid4().hex[:12],
            scratch=cluster.scratch,
            root=shipped,
            feature_layer=feature_layer,
            shape=shape,
            method=method,
            threads=cluster.threads,
            max_resident_experts=cluster.max_resident_experts,
            device=device,
        )
        identity = {
            "run_id": run_id,
            "method": asdict(method),
            "threads": cluster.threads,
            "backbone": {**backbone, "root": asdict(artifact), "feature_layer": feature_layer, "shape": list(shape)},
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
            "machine": {"cpu": torch.backends.cpu.get_cpu_capability(), "architecture": platform.machine()},
        }
        # Last: a run that could not be started is none, and its storage can be used again.
        storage.write_record(layout.RUN, identity)
        return OpenRun(storage, engine, Session(engine, setup, observer), setup)
    except BaseException:
        if engine is not None:
            engine.close()
        if cluster.storage is None:
            shutil.rmtree(uri, ignore_errors=True)
        raise


def _absolute(uri: str) -> str:
    """A local path as every process on this machine understands it, whatever folder it was started in."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def _engine(cluster: ClusterConfig, uri: str, run_id: str) -> Engine:
    if cluster.engine == "inline":
        return InlineEngine(uri)
    from distributed_eg.runtime.ray_engine import RayEngine  # Ray is not needed, nor loaded, for the inline engine

    return RayEngine(cluster, uri, run_id)
