"""Expert Gate behind Avalanche's interface: the same class drives the run here and trains each expert on a worker."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLExperience
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from torch import Tensor, nn
from torch.nn import CrossEntropyLoss
from torch.optim import Optimizer
from torch.utils.data import Dataset

from distributed_eg import given
from distributed_eg.config import AutoencoderConfig, AutoencoderOptimizer, ClusterConfig, MethodConfig
from distributed_eg.errors import InputError
from distributed_eg.method.backbone import torch_device
from distributed_eg.method.head import own_draws
from distributed_eg.runtime.messages import Observer
from distributed_eg.runtime.pickling import dumps
from distributed_eg.runtime.signals import terminable
from distributed_eg.strategy import checks, plugin_table
from distributed_eg.strategy.answers import Answers, adapt, ask_workers
from distributed_eg.strategy.avalanche_types import Plugin
from distributed_eg.strategy.driver import Driver
from distributed_eg.strategy.evaluation import keeping
from distributed_eg.strategy.metrics import RoutedBatch, check_comparing, measure_start
from distributed_eg.strategy.model import ExpertGate
from distributed_eg.strategy.run_holder import RunHolder
from distributed_eg.strategy.tasks.experiences import parts_of
from distributed_eg.strategy.tasks.intake import Intake, Streams, evaluation_parts
from distributed_eg.strategy.tasks.settings_identity import plain_values, settings_identity
from distributed_eg.strategy.tasks.told_of_images import Told
from distributed_eg.strategy.training.packing import pack
from distributed_eg.strategy.training.single_expert import SingleExpert
from distributed_eg.strategy.training.trainer import StrategyTrainer
from distributed_eg.types import OnRepeat, TransferRule, Unknown


class ExpertGateStrategy(RunHolder):
    """Expert Gate: an autoencoder and an expert a task, a gate that routes each test image by itself.

    Tasks of a stream train in parallel, as their dependencies allow, on Ray workers; each expert trains in a copy of
    this very strategy, with its hooks, plugins and overridden methods. The result is the same, byte for byte, however
    many workers there are.

    Source: Aljundi, Chakravarty, Tuytelaars, "Expert Gate: Lifelong Learning with a Network of Experts", CVPR 2017.
    The parameters up to ``rel_thresh`` are those of ``avalanche.training.ExpertGateStrategy``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] = CrossEntropyLoss(),  # noqa: B008 - Avalanche's own signature; it holds no state
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = None,
        device: torch.device | str | int | None = None,
        plugins: list[Plugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        eval_every: int = -1,
        ae_train_mb_size: int = 1,
        ae_train_epochs: int = 2,
        ae_latent_dim: int = 100,
        ae_lr: float = 1e-3,
        temp: float | None = None,
        rel_thresh: float = 0.85,
        ae_optimizer: AutoencoderOptimizer = "sgd",
        cluster: ClusterConfig | None = None,
        seed: int = 0,
        transfer: TransferRule = "threshold",
        distillation_weight: float = 1.0,
        distillation_temp: float = 2.0,
        confidence_threshold: float | None = None,
        unknown: Unknown = "expert",
        unknown_quantile: float = 0.99,
        validation_fraction: float = 0.1,
        freeze_norm: bool = True,
        on_repeat: OnRepeat = "continue",
        reference: Dataset[object] | str | os.PathLike[str] | None = None,
        observer: Observer | None = None,
        class_names: Mapping[int, str] | Sequence[str] | None = None,
        transform: object = None,
        **base_kwargs: object,
    ) -> None:
        """Check everything; nothing starts before ``train``.

        Args:
            model: an ``ExpertGate``.
            optimizer: over ``model.expert``'s parameters; each expert trains with a copy of it, over its own
                parameters of the same names, in the same groups.
            criterion: loss of outputs and targets. One that is no plain cross-entropy, or gets soft targets, gets the
                task's local logits and targets, for others' classes are at −inf; its weights are over all classes.
            train_mb_size: mini-batch size of an expert's training.
            train_epochs: epochs of an expert's training.
            eval_mb_size: mini-batch size of evaluation; None is ``train_mb_size``.
            device: None is the GPU that a worker is given, else the CPU.
            plugins: run around each expert's training, each task with its own copy and a clock that starts at 0;
                ``strategy/plugin_table.py`` says what becomes of Avalanche's.
            evaluator: metrics and loggers; None for none. Metrics that compare tasks speak in ``eval`` only.
            eval_every: as in Avalanche; inside training it measures the expert that trains, without the gate.
            ae_train_mb_size: mini-batch size of an autoencoder's training ("sgd" only, like the two below).
            ae_train_epochs: epochs of an autoencoder's training.
            ae_latent_dim: hidden units of an autoencoder.
            ae_lr: learning rate of an autoencoder's training.
            temp: temperature of the gate's softmax, the paper's is 2; None: fitted to held-out images.
            rel_thresh: relatedness above which an expert learns without forgetting from its parent.
            ae_optimizer: "sgd" (momentum 0.9), "adagrad" or "adam".
            cluster: where to run; None is Ray on this machine.
            seed: of everything that is drawn.
            transfer: how an expert learns from its parent: as ``rel_thresh`` says ("threshold"), or both ways, of
                which the better on the held-out part is kept, at a tie that of ``rel_thresh`` ("best").
            distillation_weight: λ of learning without forgetting.
            distillation_temp: its temperature.
            confidence_threshold: experts that are at least this confident answer together; None: the best alone.
            unknown: who answers for images that are strange to every task: the nearest "expert", the "root" network by
                its own outputs, or nobody ("abstain": outputs get a last column for none of the classes).
            unknown_quantile: share of its own held-out images that a task is to know.
            validation_fraction: share of a task's samples that relatedness is measured on.
            freeze_norm: keep running statistics of batch normalisation as the parent has them.
            on_repeat: what a label that comes again means: "continue" trains the next version of its task from its own
                expert, "new_expert" starts that version as a new task would, "error" refuses it.
            reference: a dataset, or a file of ``save_reference``, for the standardization statistics; it also makes
                the pretrained root a candidate parent. None: the first task's features give the statistics.
            observer: called on this process with every stage that starts or ends, and with epochs of experts.
            class_names: by class id, kept with each task for ``predict``; None: as the datasets say, such as
                torchvision's (``classes``).
            transform: what images go through before the network, kept with each task for ``predict``: torchvision's
                transforms, composed, or a preset of its weights. None: the datasets' own, where it is of such.

        Raises:
            InputError: a value cannot be used; the message names it.
        """
        before = set(vars(self))
        if not isinstance(model, ExpertGate):
            raise InputError(f"ExpertGateStrategy needs a distributed_eg.ExpertGate model, not {type(model).__name__}.")
        autoencoder = AutoencoderConfig(
            kind=model.autoencoder,
            latent_dim=ae_latent_dim,
            lr=ae_lr,
            epochs=ae_train_epochs,
            batch_size=ae_train_mb_size,
            optimizer=ae_optimizer,
        )
        checks.refuse_other_types(optimizer=optimizer, criterion=criterion, observer=observer)
        if cluster is not None and not isinstance(cluster, ClusterConfig):
            raise InputError(f"cluster is {given.shown(cluster)}; it must be a ClusterConfig.")
        train_mb_size = given.whole(train_mb_size, "train_mb_size", least=1)
        train_epochs = given.whole(train_epochs, "train_epochs", least=0)
        eval_mb_size = None if eval_mb_size is None else given.whole(eval_mb_size, "eval_mb_size", least=1)
        eval_every = given.whole(eval_every, "eval_every", least=-1)
        device, reference = torch_device(device), checks.given_reference(reference)
        cluster = checks.placed(cluster or ClusterConfig(), device)
        told = Told.given(model.shape, class_names, transform)
        checks.warn_of_ignored(autoencoder)
        checks.check_optimizer(optimizer, model)
        self.method = MethodConfig(
            autoencoder=autoencoder,
            gate_score=model.gate_score,
            temp=temp,
            rel_thresh=rel_thresh,
            confidence_threshold=confidence_threshold,
            unknown=unknown,
            unknown_quantile=unknown_quantile,
            transfer=transfer,
            distillation_weight=distillation_weight,
            distillation_temp=distillation_temp,
            freeze_norm=freeze_norm,
            validation_fraction=validation_fraction,
            feature_batch_size=max(32, train_mb_size if eval_mb_size is None else eval_mb_size),
            seed=seed,
        )
        self.ae_train_mb_size = autoencoder.batch_size
        self.ae_train_epochs = autoencoder.epochs
        self.ae_latent_dim = autoencoder.latent_dim
        self.ae_lr = autoencoder.lr
        self.rel_thresh = self.method.rel_thresh
        self.on_repeat: OnRepeat = given.word(on_repeat, "on_repeat", get_args(OnRepeat))
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=checks.driver_device(device, model.device),
            plugins=plugin_table.as_list(plugins),
            evaluator=evaluator,  # type: ignore[arg-type]  # Avalanche takes None, too
            eval_every=eval_every,
            **base_kwargs,
        )
        plugin_table.refuse_unfit(self)
        plugin_table.warn_of_memory(self)
        plugin_table.warn_of_clock(self)
        check_comparing(self.evaluator.metrics, eval_every)
        self.routed: RoutedBatch | None = None
        self._answers: deque[Answers] = deque()
        self._current: Answers | None = None
        own_names = frozenset(vars(self)) - before
        asked = None if device is None else str(device)
        self._driver = Driver(self, own_names, self.method, cluster, asked, reference, observer, told)

    def train(
        self,
        experiences: CLExperience | Iterable[CLExperience],
        eval_streams: Streams | None = None,
        *,
        valid_stream: Iterable[CLExperience] | None = None,
        **kwargs: object,
    ) -> dict[str, Any]:
        """Train the tasks of ``experiences``: one experience, a list, or a stream, in parallel where they allow it.

        Args:
            experiences: what to learn; a generator's experiences are read one by one. One with several task labels
                brings a task for each.
            eval_streams: what an expert is measured on while it trains (``eval_every``); None: its task's validation
                part.
            valid_stream: holds each experience's validation part, by index (``benchmark_with_validation_stream``'s has
                to be given here). None: the benchmark's own "valid" stream where an experience knows of one, as in
                Avalanche's older scenarios, else a part of the experience (``validation_fraction``).
            kwargs: loader arguments, as in Avalanche (``num_workers``, ``shuffle``, ``drop_last``, …).

        Returns:
            The last value of every metric.

        Raises:
            InputError: an experience cannot be used; those before it in the stream are committed, and nothing was begun
                where the stream's length is known.
            TaskFailedError: tasks failed; every task that did not need a failed one is committed.
            ResumeError: the storage holds a run that was begun with something else.
            RunInUseError: another driver works on that run.
        """
        driver = self._driver
        plugin_table.refuse_unfit(self)
        checks.check_loader_arguments(self, kwargs, "train")
        sized = [experiences] if not isinstance(experiences, Iterable) else experiences
        if hasattr(sized, "__len__"):
            sized = list(sized)
            driver.check(sized, self.on_repeat)
        dumps(kwargs, "An argument of train")  # before there is a run
        trainer = StrategyTrainer(pack(self, {"_driver"}, driver.fresh_metrics), kwargs)
        settings = {**self._settings(), "loader": plain_values(kwargs)}
        evaluations = evaluation_parts(eval_streams)
        measured = {"valid"} if evaluations is None else {part.info.stream for part in evaluations}
        plugin_table.warn_of_unmeasured(self.plugins, self.eval_every, measured)
        with terminable(), driver.open(settings).working() as run:
            shipped_trainer, _held = run.shipper.ship(trainer, "An argument of train")
            intake = Intake(
                self, run, self.method, self.on_repeat, settings, sized, evaluations, valid_stream, driver.told
            )
            if driver.follows and isinstance(sized, list):  # now that it is known what the run holds
                driver.check(sized, self.on_repeat)
            try:
                with driver.attaching():
                    run.train(intake, len(sized) if isinstance(sized, list) else None, shipped_trainer)
            finally:
                self._train_cleanup()
        driver.warn_of_unequal_tasks()
        return dict(self.evaluator.get_last_metrics())

    def update(self, experience: CLExperience, **kwargs: Any) -> dict[str, Any]:
        """Train the next version of a task that the run knows on new data, as ``on_repeat`` says.

        Arguments and the rest are ``train``'s.

        Raises:
            InputError: no finished task has the experience's label, or the run's stream is to be brought first.
        """
        run = self._driver.open_to_ask()
        for label in [part.label for part in parts_of(experience) if part.is_labelled]:
            self._driver.task_of(label)
            if run.registry.of_label(label) is None:
                raise InputError("resume=True wants the whole stream first; resume='append' goes on from its end.")
        return self.train([experience], **kwargs)

    @torch.no_grad()
    def eval(  # type: ignore[override]  # exp_list is the seed's name for Avalanche's own "experiences"
        self, exp_list: CLExperience | Iterable[CLExperience], **kwargs: object
    ) -> dict[str, Any]:
        """Evaluate on one experience, a list or a stream; each sample is routed by itself.

        Before any training the model's root network answers, as Avalanche's model does, or with
        ``ClusterConfig(resume=…)`` the run that the storage holds.

        Returns:
            The last value of every metric: the evaluator's, and ``Gate_Acc_…``, ``Expert_Acc_…``, ``EndToEnd_Acc_…``
            per experience and for the stream.
        """
        if isinstance(self.model, SingleExpert):
            # Loaders draw from torch's generator: whether an expert is measured must not change what it becomes.
            with own_draws(self.device):
                return self._eval(exp_list, **kwargs)
        checks.check_loader_arguments(self, kwargs, "eval")
        driver = self._driver
        self.device = checks.driver_device(torch_device(driver.device), self.model.device)  # it may have been moved
        if driver.run is None and not driver.cluster.resume:
            return self._eval(exp_list, **kwargs)
        run = driver.open_to_answer()
        # A generator can be read only once; its experiences are needed twice.
        keep = not isinstance(exp_list, Iterable) or hasattr(exp_list, "__len__") or hasattr(exp_list, "name")
        experiences = exp_list if keep else list(exp_list)
        asked = adapt(self, [experiences] if not isinstance(experiences, Iterable) else experiences, kwargs)
        with terminable(), own_draws(self.device):
            measure_start(self, asked, kwargs)
        with terminable(), run.working():
            self._answers.extend(ask_workers(run, driver.registry, asked, self.eval_mb_size, self.method))
        try:
            with terminable(), keeping(self, driver.reporter, run, driver.registry, asked, self.method.seed):
                return self._eval(experiences, **kwargs)
        finally:
            self._eval_cleanup()
            self.routed = None
            self._answers.clear()

    def _eval(self, experiences: Any, **kwargs: object) -> dict[str, Any]:
        """Avalanche's own evaluation."""
        metrics: dict[str, Any] = super().eval(experiences, **kwargs)
        return metrics

    def eval_epoch(self, **kwargs: object) -> None:
        """Avalanche's evaluation loop over the current experience."""
        self._current = self._answers.popleft() if self._answers else None
        try:
            super().eval_epoch(**kwargs)
        finally:
            self._current = None

    def forward(self) -> Tensor:
        """The model's output for the current mini-batch: on a worker the expert's, in ``eval`` the workers' answers."""
        if self._current is None:
            output: Tensor = super().forward()
            return output
        outputs, self.routed = self._current.take(self.mb_y)
        return outputs.to(self.device)

    def _settings(self) -> dict[str, object]:
        """What a resumed run is compared by, beside the method's numbers."""
        driver = self._driver
        # What a subclass gave this strategy may decide how it trains.
        added = {n: v for n, v in vars(self).items() if n not in driver.own_names and not n.startswith("_")}
        reference = driver.reference_identity()
        return settings_identity(self, on_repeat=self.on_repeat, reference=reference, added=added)
