"""The model that users hold: the root network, and after training the gate and a handle to the run's experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distributed_eg.config import AutoencoderConfig
from distributed_eg.errors import BackboneError, InputError
from distributed_eg.method.backbone import Backbone, build_network, last_feature_layer
from distributed_eg.method.expert import find_head, freeze_norm, scatter_logits
from distributed_eg.method.gate import ABSENT_LOG_PROBABILITY, Routing, combine_experts
from distributed_eg.runtime.determinism import reproducible
from distributed_eg.strategy.predictor import TrainedRun, from_tensors, take_tensors
from distributed_eg.types import AutoencoderKind

_DEFAULT_LAYER = "features"
_IN_MEMORY = 4
"""Experts built at a time where a model holds all of their tensors anyway."""


class ExpertGate(nn.Module):
    """A backbone, an autoencoder and an expert for each task, and the gate between them.

    Before training, ``expert`` is the pretrained root network, so that an optimizer can be built from
    ``model.expert.parameters()``. It is never trained itself: experts are copies of it, and the backbone reads its
    feature layer. After training the model routes each image by itself.

    Source: Aljundi et al., CVPR 2017; the first five parameters are those of ``avalanche.models.ExpertGate``.

    Args:
        shape: (channels, height, width) of the images after their transforms.
        device: where the model computes in this process; None is the CPU.
        arch: a torchvision classification model, ``"efficientnet_lite0"``, or a module of your own.
        pretrained_flag: default pretrained weights of the architecture; ``False`` gives random ones, drawn from
            ``seed``.
        output_layer_name: the layer whose output are the features. Where an architecture has no layer "features",
            the default stands for the last one before pooling.
        weights: instead of the default weights, a torchvision weights name or the path of a state dict.
        autoencoder: "sgd", the paper's, or "linear", closed form: no learning rate, no epochs, no seed.
        seed: of random weights.

    Raises:
        BackboneError: the network is unknown, its weights cannot be had or do not fit, or it cannot take such images.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        device: torch.device | str | None = None,
        arch: str | nn.Module = "alexnet",
        pretrained_flag: bool = True,
        output_layer_name: str = _DEFAULT_LAYER,
        *,
        weights: str | None = None,
        autoencoder: AutoencoderKind = "sgd",
        seed: int = 0,
    ) -> None:
        super().__init__()
        AutoencoderConfig(kind=autoencoder)
        if len(shape) != 3:
            raise BackboneError(f"shape is {tuple(shape)}; it must be (channels, height, width) of one image.")
        self.shape: tuple[int, int, int] = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.arch = arch if isinstance(arch, str) else type(arch).__name__
        self.custom = not isinstance(arch, str)
        self.pretrained_flag = pretrained_flag
        self.weights = weights
        self.autoencoder: AutoencoderKind = autoencoder
        self.seed = seed
        self.device = torch.device(device or "cpu")
        if isinstance(arch, str):
            root = build_network(
                arch, pretrained=pretrained_flag, weights=weights, seed=seed, image_size=int(self.shape[1])
            )
        else:
            root = arch.eval()
        layers = dict(root.named_modules())
        if output_layer_name == _DEFAULT_LAYER and _DEFAULT_LAYER not in layers:
            output_layer_name = last_feature_layer(root, self.shape)
        self.output_layer_name = output_layer_name
        self.feature_shape = Backbone(root, output_layer_name, self.shape).feature_shape
        find_head(root)
        self.expert = root.to(self.device)
        self._run: TrainedRun | None = None

    def train(self, mode: bool = True) -> ExpertGate:
        """As in torch, but the root network stays in eval mode: it is a template, and the backbone."""
        super().train(mode)
        self.expert.eval()
        return self

    @staticmethod
    def load(
        run_uri: str,
        device: torch.device | str | None = None,
        *,
        arch: str | nn.Module | None = None,
        max_resident_experts: int = 4,
    ) -> ExpertGate:
        """Open a finished run; its experts are read on demand.

        Args:
            run_uri: the run directory, a path or any pyarrow.fs URI.
            device: where the model computes.
            arch: the network, where the run's was a module of your own.
            max_resident_experts: experts in memory at a time.

        Raises:
            StorageError: there is no such run, or a file of it is damaged.
            BackboneError: the run's network was a module of your own and ``arch`` is missing, or does not fit.
        """
        from distributed_eg.strategy.loading import load_model  # it needs this class

        return load_model(run_uri, device, arch, max_resident_experts)

    def attach(self, run: TrainedRun) -> None:
        """Take the gate over all tasks trained so far, and where their experts are read from on demand."""
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        """Gate and predict.

        Args:
            x: images (n, channels, height, width).

        Returns:
            (n, max class id + 1) log-probabilities over dataset class ids, log(1e-7) where no answering expert knows
            a class. Before training, or in training mode, the root network's own logits.
        """
        images = x.to(self.device)
        if self.training or self._run is None:
            return self.expert(images)
        run = self._run
        with torch.no_grad(), reproducible(0, run.threads):
            weights = run.gate.answering(self._route(run, images))
            return combine_experts(images, weights, lambda task: run.reader.expert(run.experts[task]), run.width)

    def gate(self, x: Tensor) -> Routing:
        """Route images (n, channels, height, width): (tasks, confidences, errors), one row a sample.

        Raises:
            InputError: nothing is trained yet.
        """
        if self._run is None:
            raise InputError("The model has no gate yet: train it with ExpertGateStrategy.")
        with torch.no_grad(), reproducible(0, self._run.threads):
            return self._route(self._run, x.to(self.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertGate:
        """As in torch; gate and experts follow the root network to its device."""
        super()._apply(fn, recurse)
        device = next((parameter.device for parameter in self.expert.parameters()), self.device)
        if device != self.device:
            self.device = device
            self._run = None if self._run is None else self._run.to(device, self.expert)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The root network's tensors, and after training the gate's and every expert's."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._run is not None:
            destination |= {prefix + name: value for name, value in self._run.tensors(self.autoencoder).items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        tensors = take_tensors(state_dict, prefix)
        run = None
        if tensors:
            run = from_tensors(tensors, self.expert, self.autoencoder, _IN_MEMORY, self.device, self.feature_shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._run = run

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: the run becomes tensors, experts included."""
        run = self._run
        return {**self.__dict__, "_run": None if run is None else run.tensors(self.autoencoder)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state["_run"]
        super().__setstate__({**state, "_run": None})
        if stored is not None:
            tensors = take_tensors(dict(stored), "")
            self._run = from_tensors(
                tensors, self.expert, self.autoencoder, _IN_MEMORY, self.device, self.feature_shape
            )

    def _route(self, run: TrainedRun, images: Tensor) -> Routing:
        return run.gate.route(Backbone(self.expert, self.output_layer_name, self.shape)(images))


class SingleExpert(nn.Module):
    """The expert in training, as a strategy's hooks see it on a worker: ``strategy.model.expert``.

    Its outputs stand for dataset class ids: in training mode logits with −inf at other tasks' classes (cross-entropy
    and its gradient are those of local logits), in eval mode finite log-probabilities.
    """

    def __init__(self, expert: nn.Module, classes: tuple[int, ...], width: int, *, freeze_norm: bool) -> None:
        super().__init__()
        self.expert = expert
        self.classes = classes
        self.width = width
        self._freeze_norm = freeze_norm

    def train(self, mode: bool = True) -> SingleExpert:
        """As in torch; normalisation statistics stay frozen where the run says so."""
        super().train(mode)
        if mode and self._freeze_norm:
            freeze_norm(self.expert)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (n, width) for images (n, channels, height, width)."""
        logits = self.expert(x)
        if self.training:
            return scatter_logits(logits, self.classes, self.width)
        output = logits.new_full((len(logits), self.width), ABSENT_LOG_PROBABILITY)
        output[:, list(self.classes)] = torch.log_softmax(logits, dim=1)
        return output
