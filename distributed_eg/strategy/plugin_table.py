"""Avalanche's plugins, and what becomes of each where an expert learns one task alone: it works, it starts empty, or it
is refused."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType

from avalanche.core import BasePlugin, BaseSGDPlugin, SupervisedPlugin
from avalanche.evaluation import PluginMetric
from avalanche.models.packnet import PackNetPlugin
from avalanche.training import plugins as avalanche
from avalanche.training.losses import ICaRLLossPlugin, MaskedCrossEntropy

from distributed_eg.errors import InputError
from distributed_eg.strategy.avalanche_types import Plugin, Template


@dataclass(frozen=True)
class Works:
    """Does for each expert what it does for a task in Avalanche."""

    but_for: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    """Settings that are refused: by attribute, the value and why it cannot be."""


@dataclass(frozen=True)
class StartsEmpty(Works):
    """Runs as for Avalanche's first task, which does nothing: what it keeps of earlier tasks is not there."""

    keeps: str = ""


@dataclass(frozen=True)
class Refused:
    """Cannot do what it is for."""

    why: str
    instead: str = "leave it out"


_CLASSIFIER = Refused(
    "it sets the class means of model.eval_classifier, which an expert has not, and which nobody would ask: the gate "
    "and the experts' own heads answer"
)
_FIRST_TASK = "to schedule the first task alone, train it by itself, then take the plugin out of strategy.plugins"

PLUGINS: Mapping[type, Works | Refused] = {
    # What acts within one task.
    BasePlugin: Works(),
    BaseSGDPlugin: Works(),
    SupervisedPlugin: Works(),
    avalanche.EarlyStoppingPlugin: Works(),
    avalanche.LRSchedulerPlugin: Works(
        but_for={
            "reset_lr": (False, "it carries the learning rate from one task to the next"),
            "reset_scheduler": (False, "it carries the schedule from one task to the next"),
            "first_exp_only": (True, f"every expert's training is a first one; {_FIRST_TASK}"),
        }
    ),
    # What remembers earlier tasks, and does nothing before there is one.
    avalanche.ReplayPlugin: StartsEmpty(keeps="samples of earlier tasks"),
    avalanche.RARPlugin: StartsEmpty(keeps="samples of earlier tasks"),
    avalanche.AGEMPlugin: StartsEmpty(keeps="samples of earlier tasks"),
    avalanche.GEMPlugin: StartsEmpty(keeps="samples of earlier tasks"),
    avalanche.EWCPlugin: StartsEmpty(keeps="weights of earlier tasks"),
    avalanche.MASPlugin: StartsEmpty(keeps="weights of earlier tasks"),
    avalanche.SynapticIntelligencePlugin: StartsEmpty(keeps="weights of earlier tasks"),
    avalanche.FeatureDistillationPlugin: StartsEmpty(keeps="the model of the task before"),
    avalanche.GenerativeReplayPlugin: StartsEmpty(
        keeps="a generator of earlier samples",
        but_for={"untrained_solver": (False, "an expert that has learnt nothing yet would label what is generated")},
    ),
    # What fails, or would make something else of the expert than what it is for.
    avalanche.LwFPlugin: Refused(
        "it distils from the model of the task before, which an expert's copy of it never sees",
        "the strategy learns without forgetting by itself, from the parent, above rel_thresh "
        "(distillation_weight, distillation_temp)",
    ),
    avalanche.LFLPlugin: Refused("it needs a model with get_features(), and the model of the task before"),
    avalanche.RWalkPlugin: Refused(
        "it has no weights of earlier tasks to keep to, and leaves the network in evaluation mode while it learns, "
        "without dropout"
    ),
    avalanche.MIRPlugin: Refused(
        "it has no samples of earlier tasks, and fails at the end of a task whose last mini-batch has all its classes"
    ),
    avalanche.GSS_greedyPlugin: Refused(
        "it has no samples of earlier tasks, and the gradients that it takes of the task's own stay in the step; with "
        "learning without forgetting it fails"
    ),
    avalanche.GDumbPlugin: Refused(
        "it trains from scratch on a memory of all tasks; here it would only train each expert on mem_size samples",
        "to train on fewer samples, override train_dataset_adaptation",
    ),
    avalanche.FromScratchTrainingPlugin: Refused(
        "it takes an expert's start for the initial weights; that start is the parent's, so nothing would be reset"
    ),
    avalanche.BiCPlugin: Refused(
        "it corrects the outputs of one network over the classes of all tasks, and holds samples of its task back"
    ),
    avalanche.CoPEPlugin: Refused(
        "it replaces the criterion and the last layer by prototypes of the classes of all tasks, which neither sealed "
        "experts nor the gate know"
    ),
    avalanche.CWRStarPlugin: Refused("it consolidates the last layer of one network over the classes of all tasks"),
    avalanche.TrainGeneratorAfterExpPlugin: Refused(
        "the generator that it trains is lost with the expert's copy of it"
    ),
    avalanche.CurrentDataNCMUpdate: _CLASSIFIER,
    avalanche.MemoryNCMUpdate: _CLASSIFIER,
    avalanche.NCMOracle: _CLASSIFIER,
    avalanche.CurrentDataFeCAMUpdate: _CLASSIFIER,
    avalanche.MemoryFeCAMUpdate: _CLASSIFIER,
    avalanche.FeCAMOracle: _CLASSIFIER,
    avalanche.EvaluationPlugin: Refused(
        "an expert's copy of it would keep its values to itself", "give its metrics and loggers to evaluator="
    ),
    # What Avalanche has elsewhere.
    MaskedCrossEntropy: Refused(
        "it masks by dataset class ids what reaches a criterion here as the task's own classes",
        "give CrossEntropyLoss(): an expert's loss is over its own classes anyway",
    ),
    ICaRLLossPlugin: Refused("it needs the model of the task before, and outputs for the classes of all tasks"),
    PackNetPlugin: Refused("it prunes one network for all tasks; here each task has its own"),
}
"""By class; a subclass is what the nearest of its bases in this table is."""

_SEQUENCE = frozenset({"train_exp_counter", "train_iterations", "total_iterations"})
"""What of the clock counts over the whole sequence in Avalanche, and over one expert's training here."""


def as_list(plugins: object) -> list[Plugin]:
    """What a user gave as plugins.

    Raises:
        InputError: it is no list.
    """
    if isinstance(plugins, str) or not isinstance(plugins, Iterable | None):
        raise InputError(f"plugins is one {type(plugins).__name__}; give a list.")
    return list(plugins or ())


def refuse_unfit(strategy: Template) -> None:
    """Refuse plugins, or a criterion that is one, that cannot do their work here.

    Raises:
        InputError: the first of them, why, and what to do instead.
    """
    for plugin in strategy.plugins:
        if isinstance(plugin, type):
            raise InputError(f"plugins holds the class {plugin.__name__}; give an instance of it.")
        found, name = _look_up(plugin), type(plugin).__name__
        if isinstance(found, Refused) and id(plugin) != id(strategy.evaluator):
            raise InputError(f"{name} cannot work where experts learn alone: {found.why}; {found.instead}.")
        for attribute, (value, why) in found.but_for.items() if isinstance(found, Works) else ():
            if getattr(plugin, attribute, not value) == value:
                raise InputError(
                    f"{name} has {attribute}={value}, but experts learn alone: {why}. Set it to {not value}."
                )


def warn_of_memory(strategy: Template) -> None:
    """Name the plugins that start empty with each expert."""
    for plugin in strategy.plugins:
        found = _look_up(plugin)
        if isinstance(found, StartsEmpty):
            warnings.warn(
                f"{type(plugin).__name__} keeps {found.keeps}, but each expert learns one task from its own data: it "
                "starts empty with every task and has nothing to add.",
                stacklevel=4,
            )


def warn_of_clock(strategy: Template) -> None:
    """Name the user's own plugins, metrics and methods that read what the clock counts over the sequence."""
    for owner in (strategy, *strategy.plugins, *strategy.evaluator.metrics):
        # The positions of a metric's values are moved to the sequence's; train and eval are called where its clock is.
        counts = _SEQUENCE - {"train_iterations"} if isinstance(owner, PluginMetric) else _SEQUENCE
        for cls in type(owner).__mro__:
            own = {} if cls.__module__.startswith(("avalanche.", "distributed_eg.")) else vars(cls)
            for name, method in own.items():
                code = method.__code__ if isinstance(method, FunctionType) and name not in ("train", "eval") else None
                for count in sorted(counts.intersection(code.co_names)) if code else ():
                    warnings.warn(
                        f"{cls.__name__}.{name} reads clock.{count}, which starts at 0 in each expert's training here. "
                        "The task's place in the stream is strategy.experience.current_experience.",
                        stacklevel=4,
                    )


def warn_of_unmeasured(plugins: Iterable[object], eval_every: int, streams: Collection[str]) -> None:
    """Name the plugins that wait for what no expert is measured on while it trains: they never act.

    ``streams`` are the names of those that are measured every ``eval_every`` epochs.
    """
    measured = [f"{stream}_stream" for stream in streams if eval_every > -1]
    for plugin in plugins:
        if isinstance(plugin, avalanche.EarlyStoppingPlugin):
            waits_for = plugin.val_stream_name
        elif isinstance(plugin, avalanche.LRSchedulerPlugin) and plugin.metric == "val_loss":
            waits_for = ""
        else:
            continue
        if not any(name.startswith(waits_for) or waits_for.startswith(name) for name in measured):
            warnings.warn(
                f"{type(plugin).__name__} waits for {waits_for or 'an evaluation'} and never acts: with "
                f"eval_every={eval_every} experts are measured on {', '.join(measured) or 'nothing'} in training.",
                stacklevel=4,
            )


def _look_up(plugin: object) -> Works | Refused | None:
    return next((PLUGINS[cls] for cls in type(plugin).__mro__ if cls in PLUGINS), None)
