"""What a run is: the record that a new one begins with, and whether a storage holds one that may be gone on with."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn

from distributed_eg.config import ClusterConfig, MethodConfig
from distributed_eg.errors import StorageError
from distributed_eg.method.calibration import UNFITTED
from distributed_eg.runtime.resuming import differences, refuse
from distributed_eg.store import layout, records
from distributed_eg.store.records import RunRecord
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact, Storage

logger = logging.getLogger(__name__)

_FORMER_WAYS = {"gate_score": "residual", "unknown": "expert", "unknown_quantile": 0.99, "transfer": "threshold"}
"""The only ones that earlier versions had, and did not write down."""

_LIBRARIES = ("torch", "torchvision", "avalanche-lib", "safetensors", "pyarrow")


@dataclass(frozen=True)
class Root:
    """The pretrained network that experts are copies of, its head, where the backbone ends in it, for images of what
    shape.

    ``described`` tells one root from another, as JSON values.
    """

    network: nn.Module
    head: str
    feature_layer: str
    shape: tuple[int, int, int]
    described: Mapping[str, object]


def new_record(
    cluster: ClusterConfig, method: MethodConfig, root: Root, weights: Artifact, settings: Mapping[str, object]
) -> RunRecord:
    """What a new run would be."""
    return RunRecord(
        run_id=uuid.uuid4().hex[:12],
        method=asdict(method),
        threads=cluster.threads,
        backbone={
            **root.described,
            "root": asdict(weights),
            "feature_layer": root.feature_layer,
            "shape": list(root.shape),
        },
        settings=dict(settings),
        libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
        machine={"cpu": torch.backends.cpu.get_cpu_capability(), "architecture": platform.machine()},
    )


def known_run(
    storage: Storage, cluster: ClusterConfig, wanted: RunRecord, settings: Mapping[str, object] | None
) -> RunRecord | None:
    """What the storage holds, where this driver may go on with it; None: no run yet.

    Args:
        storage: the run directory.
        cluster: says whether it may be gone on with, and how.
        wanted: what a new run would be.
        settings: as in ``Run.open``.

    Raises:
        StorageError: it holds a run that is not to be resumed, or a damaged one, or none where it is to hold one.
        ResumeError: it is another run.
    """
    known = records.read(storage, RunRecord) if storage.exists(layout.RUN) else None
    if known is None:
        if settings is None:
            raise StorageError(
                f"There is no run at {storage.shown!r} yet, and so nothing that could answer: train first."
            )
        return None
    if not cluster.resume:
        raise StorageError(
            f"The storage {storage.shown!r} already holds a run; ClusterConfig(resume=True) goes on with its stream, "
            "resume='append' adds what follows, and another storage begins a new one."
        )
    same_stream = cluster.resume is True and settings is not None
    _require_same(storage.shown, known, wanted, same_stream=same_stream)
    if not same_stream:
        _require_whole(storage)
    return known


def _require_same(shown: str, known: RunRecord, wanted: RunRecord, *, same_stream: bool) -> None:
    """See that this is the same run.

    Without ``same_stream`` each task may be trained in its own way, as its record says: of the settings, only a
    reference that is given is compared, and batches of features are as the run has them.

    Raises:
        ResumeError: it is not.
    """
    then, now = asdict(known), asdict(wanted)
    if "gate_score" not in then["method"] and now["method"]["temp"] is None and then["method"]["temp"] == UNFITTED:
        then["method"]["temp"] = None
    then["method"] = _FORMER_WAYS | then["method"]
    if not same_stream:
        now["method"]["feature_batch_size"] = then["method"].get("feature_batch_size")
        is_given = now["settings"].get("reference") is not None
        for side in (then, now):
            side["settings"] = {"reference": side["settings"].get("reference")} if is_given else {}
    decisive, around = ("method", "threads", "backbone", "settings"), ("libraries", "machine")
    lines = differences(*({name: values[name] for name in decisive} for values in (then, now)))
    if lines:
        raise refuse("other settings", shown, lines)
    for line in differences(*({name: values[name] for name in around} for values in (then, now))):
        logger.warning("Resuming %r on a machine of another kind, which may give other bytes: %s.", shown, line)


def _require_whole(storage: Storage) -> None:
    """What the run holds, all of which must be as it was sealed where its tasks' data are not brought again.

    Raises:
        DamagedFileError: a record, or the statistics, is damaged.
    """
    registry = Registry.read(storage)
    for artifact in registry.statistics.artifacts if registry.statistics is not None else ():
        storage.read_artifact(artifact)
