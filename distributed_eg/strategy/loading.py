"""Opening a finished run as a model."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from distributed_eg.config import AutoencoderConfig, MethodConfig
from distributed_eg.errors import BackboneError, StorageError
from distributed_eg.store import layout
from distributed_eg.store.experts import ExpertReader
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.weights import load_tensors
from distributed_eg.strategy.model import ExpertGate
from distributed_eg.strategy.predictor import TrainedRun


def load_model(
    run_uri: str, device: torch.device | str | None, arch: str | nn.Module | None, max_resident_experts: int
) -> ExpertGate:
    """The model of a finished run; see ``ExpertGate.load``."""
    storage = Storage(run_uri)
    identity = storage.read_record(layout.RUN)
    backbone, settings = identity["backbone"], dict(identity["method"])
    method = MethodConfig(**{**settings, "autoencoder": AutoencoderConfig(**settings["autoencoder"])})
    if arch is None and backbone["custom"]:
        raise BackboneError(f"The run {run_uri!r} was trained with a network of its own: give arch= that network.")
    model = ExpertGate(
        tuple(backbone["shape"]),
        device,
        arch if arch is not None else backbone["arch"],
        pretrained_flag=False,
        output_layer_name=backbone["feature_layer"],
        autoencoder=method.autoencoder.kind,
    )
    try:
        model.expert.load_state_dict(load_tensors(storage, Artifact(**backbone["root"])))
    except RuntimeError as error:
        raise BackboneError(
            f"The network given for {run_uri!r} is another one than the run was trained with."
        ) from error
    registry = Registry.read(storage)
    if not registry.manifests:
        raise StorageError(f"The run {run_uri!r} holds no finished task yet.")
    reader = ExpertReader(partial(load_tensors, storage), model.expert, max_resident_experts, model.device)
    gate = reader.gate(registry.gate_ref(method))
    model.attach(TrainedRun(gate, registry.expert_refs(), reader, identity["threads"]))
    return model.eval()
