"""The model that users hold: the root network, and after training the gate and a handle to the run's experts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distributed_eg import given
from distributed_eg.config import AutoencoderConfig, MethodConfig
from distributed_eg.errors import BackboneError, InputError, StorageError
from distributed_eg.method.backbone import (
    DEFAULT_LAYER,
    Backbone,
    Weights,
    build_network,
    features_at,
    image_shape,
    last_feature_layer,
    torch_device,
    weights_text,
)
from distributed_eg.method.calibration import Calibration
from distributed_eg.method.expert import logits_of
from distributed_eg.method.gate import Routing
from distributed_eg.method.head import find_head, require_copies
from distributed_eg.method.image_transform import given_transform
from distributed_eg.runtime.determinism import settle_cublas
from distributed_eg.store import layout
from distributed_eg.store.experts import ExpertReader
from distributed_eg.store.registry import Registry
from distributed_eg.store.storage import Artifact, Storage
from distributed_eg.store.weights import map_tensors
from distributed_eg.strategy.networks import with_plain_head
from distributed_eg.strategy.predictions import Images, Prediction, TaskNotes, batches_of, notes_of, reader_for
from distributed_eg.strategy.predictor import Predictor, take_predictor
from distributed_eg.types import AutoencoderKind, GateScore, TaskId


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
        head: name of the layer that each expert gets a fresh one of, for its task's classes. None: the last layer that
            the answers come from.
        weights: instead of the default weights, a torchvision weights enum member or its name, or the path of a state
            dict.
        autoencoder: "sgd", the paper's, or "linear", closed form: no learning rate, no epochs, no seed.
        gate_score: "residual", the paper's, or "shared": distances to classes under one covariance; better and faster.
        seed: of random weights.

    Raises:
        InputError: a value is of another kind than it must be; the message names it.
        BackboneError: the network is unknown, its weights cannot be had or do not fit, or it cannot take such images.
    """

    def __init__(
        self,
        shape: Sequence[int],
        device: torch.device | str | int | None = None,
        arch: str | nn.Module = "alexnet",
        pretrained_flag: bool = True,
        output_layer_name: str = DEFAULT_LAYER,
        *,
        head: str | None = None,
        weights: Weights = None,
        autoencoder: AutoencoderKind = "sgd",
        gate_score: GateScore = "residual",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape = image_shape(shape)
        if not isinstance(arch, str | nn.Module):
            raise BackboneError(f"arch is of type {type(arch).__name__}; it must be a name, or a module that is built.")
        self.arch = given.text(arch, "arch") if isinstance(arch, str) else type(arch).__name__
        self.custom = not isinstance(arch, str)
        self.pretrained_flag = given.flag(pretrained_flag, "pretrained_flag")
        self.weights = weights_text(weights)
        if self.custom and self.weights is not None:
            raise BackboneError(f"weights={self.weights!r} is for networks by name: load them into your {self.arch}.")
        self.autoencoder: AutoencoderKind = AutoencoderConfig(kind=autoencoder).kind
        self.gate_score: GateScore = MethodConfig(gate_score=gate_score).gate_score
        self.seed = given.seed(seed)
        device = torch_device(device)
        settle_cublas()  # before its first product, which may be on a card
        output_layer_name = given.text(output_layer_name, "output_layer_name")
        if isinstance(arch, str):
            root = build_network(
                self.arch,
                pretrained=self.pretrained_flag,
                weights=self.weights,
                seed=self.seed,
                image_size=self.shape[1],
            )
        else:
            root = with_plain_head(arch).eval()
        self.head = find_head(root, self.shape, None if head is None else given.text(head, "head"))
        self.named_head = head is not None
        if self.custom:
            require_copies(root, self.shape)
        layers = dict(root.named_modules())
        if output_layer_name == DEFAULT_LAYER and DEFAULT_LAYER not in layers:
            output_layer_name = last_feature_layer(root, self.head, self.shape)
        self.output_layer_name = output_layer_name
        self.feature_shape = Backbone(root, output_layer_name, self.shape).feature_shape
        self.expert = root.to(device or torch.device("cpu"))
        self._predictor: Predictor | None = None

    @property
    def device(self) -> torch.device:
        """Where the root network's parameters are."""
        return next(self.expert.parameters()).device

    def train(self, mode: bool = True) -> ExpertGate:
        """As in torch, but the root network, which is a template, stays in eval mode."""
        super().train(mode)
        self.expert.eval()
        return self

    @staticmethod
    def load(
        run_uri: str | os.PathLike[str],
        device: torch.device | str | int | None = None,
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
            InputError: a value is of another kind than it must be.
            StorageError: there is no such run, or a file of it is damaged.
            BackboneError: the run's network was a module of your own and ``arch`` is missing, or does not fit.
        """
        max_resident_experts = given.whole(max_resident_experts, "max_resident_experts", least=1)
        storage = Storage(given.location(run_uri, "run_uri"))
        identity = storage.read_record(layout.RUN)
        backbone, settings = identity["backbone"], dict(identity["method"])
        method = MethodConfig(**{**settings, "autoencoder": AutoencoderConfig(**settings["autoencoder"])})
        if arch is None and backbone["custom"]:
            raise BackboneError(
                f"The run {storage.shown!r} was trained with a network of its own: give arch= that network."
            )
        model = ExpertGate(
            tuple(backbone["shape"]),
            device,
            arch if arch is not None else backbone["arch"],
            pretrained_flag=False,
            output_layer_name=backbone["feature_layer"],
            head=backbone.get("head"),
            autoencoder=method.autoencoder.kind,
            gate_score=method.gate_score,
        )
        # It is the run's: a strategy over it goes on with the run.
        model.weights, model.pretrained_flag = backbone["weights"], backbone["pretrained"]
        for name, parameter in model.expert.named_parameters():
            parameter.requires_grad_(name not in backbone.get("frozen", ()))
        try:
            model.expert.load_state_dict(map_tensors(storage, Artifact(**backbone["root"])))
        except RuntimeError as error:
            which = "The network given"
            if arch is None:
                which = f"The {model.arch} of the torchvision that is installed"
            says = f"{which} for {storage.shown!r} is another one than the run was trained with."
            raise BackboneError(says) from error
        registry = Registry.read(storage)
        if not registry.manifests:
            raise StorageError(f"The run {storage.shown!r} holds no finished task yet.")
        of_model = model.expert, model.head, max_resident_experts, model.device
        reader = ExpertReader(partial(map_tensors, storage), *of_model)
        gate = reader.gate(registry.gate_ref(method))
        model.attach(Predictor(gate, registry.expert_refs(), reader, identity["threads"], notes_of(registry)))
        return model.eval()

    def describe(self) -> dict[str, object]:
        """What tells the root network from others, beside its weights, as JSON values: how it came to be, and what
        differs from the ordinary: a head that was named, parameters that do not learn."""
        described: dict[str, object] = {"arch": self.arch, "custom": self.custom, "weights": self.weights}
        described["pretrained"] = self.pretrained_flag
        frozen = [name for name, parameter in self.expert.named_parameters() if not parameter.requires_grad]
        return described | ({"head": self.head} if self.named_head else {}) | ({"frozen": frozen} if frozen else {})

    def attach(self, predictor: Predictor) -> None:
        """Take the gate over all tasks trained so far, and where their experts are read from on demand."""
        self._predictor = predictor

    @property
    def calibration(self) -> Calibration | None:
        """The gate's temperature, and how far its confidences are off; None before training, and of a model that was
        copied, pickled or filled from a state dict, which keeps the temperature alone."""
        return None if self._predictor is None else self._predictor.gate.calibration

    def forward(self, x: Tensor) -> Tensor:
        """Gate and predict.

        Args:
            x: images (n, channels, height, width).

        Returns:
            (n, max class id + 1) log-probabilities over dataset class ids, log(1e-7) where no answering expert knows
            a class; in every mode. Before training, the root network's own logits.

        Raises:
            InputError: ``x`` are no images of the model's shape.
        """
        if self._predictor is None:
            return logits_of(self.expert, x.to(self.device))
        return self._predictor.answer(self._images(x), self._features)[1]

    def gate(self, x: Tensor) -> Routing:
        """Route images (n, channels, height, width): (tasks, confidences, errors), one row a sample.

        Raises:
            InputError: nothing is trained yet, or ``x`` are no images of the model's shape.
        """
        return self._trained().route(self._images(x), self._features)

    def predict(self, images: Images, *, transform: object = None, batch_size: int = 32) -> list[Prediction]:
        """What each image shows, in their order, in every mode.

        Args:
            images: tensors (n, channels, height, width) that went through the transform that the model was trained
                with, as in ``forward``; images of Pillow's or image files, which are taken through it; or several of
                these.
            transform: of torchvision's, in its place; where the run does not know it, it has to be given.
            batch_size: images a batch.

        Raises:
            InputError: nothing is trained yet, an image cannot be read, or what it goes through must be said.
        """
        predictor = self._trained()
        reader_of = partial(reader_for, predictor.notes, given_transform(transform, self.shape), self.shape)
        batches = batches_of(images, given.whole(batch_size, "batch_size", least=1), reader_of)
        return [found for batch in batches for found in predictor.predict(self._images(batch), self._features)]

    @property
    def is_trained(self) -> bool:
        """Whether it has a gate."""
        return self._predictor is not None

    @property
    def notes(self) -> dict[TaskId, TaskNotes]:
        """Of each task that the gate knows: its classes, their names, and what its images go through.

        Raises:
            InputError: nothing is trained yet.
        """
        return dict(self._trained().notes)

    def _trained(self) -> Predictor:
        if self._predictor is None:
            raise InputError(
                "The model has no gate yet: train it with ExpertGateStrategy, or take a run's with ExpertGate.load."
            )
        return self._predictor

    def _images(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            raise InputError(
                f"The images have shape {tuple(x.shape)}; the model takes (n, {', '.join(map(str, self.shape))})."
            )
        return x.to(self.device, torch.float32)

    def _features(self, images: Tensor) -> Tensor:
        # Whoever set a layer of the root to training mode gets the same features.
        modes = {module: module.training for module in self.expert.modules()}
        self.expert.eval()
        try:
            return features_at(self.expert, self.output_layer_name, images)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertGate:
        """As in torch; gate and experts follow the root network to its device."""
        before = self.device
        super()._apply(fn, recurse)
        if self.device != before and self._predictor is not None:
            self._predictor = self._predictor.to(self.device, self.expert)
        return self

    def _tensors(self) -> dict[str, Tensor]:
        """What the predictor holds; empty before training."""
        return {} if self._predictor is None else self._predictor.tensors(self.autoencoder)

    def _take(self, state: dict[str, Tensor], prefix: str) -> Predictor | None:
        of_model = self.expert, self.head, self.autoencoder, self.device, self.feature_shape
        predictor = take_predictor(state, prefix, *of_model)
        if predictor is not None:
            self.gate_score = "shared" if predictor.gate.summaries else "residual"
        return predictor

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """The root network's tensors, and after training the gate's and every expert's."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: value for name, value in self._tensors().items()}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        predictor = self._take(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._predictor = predictor

    def without_answers(self) -> ExpertGate:
        """The same network, without gate and experts: what a reference to a run holds of its model."""
        other = type(self).__new__(type(self))
        vars(other).update(vars(self), _predictor=None)
        return other

    def __getstate__(self) -> dict[str, object]:
        """For pickle and deepcopy: the predictor becomes tensors, experts included."""
        return {**self.__dict__, "_predictor": self._tensors()}

    def __setstate__(self, state: dict[str, object]) -> None:
        tensors = state["_predictor"]
        super().__setstate__({**state, "_predictor": None})
        assert isinstance(tensors, dict)
        self._predictor = self._take(dict(tensors), "")
