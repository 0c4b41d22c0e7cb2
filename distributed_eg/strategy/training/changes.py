"""What of a strategy changes while it trains, and whether a checkpoint can hold it.

Every attribute of the strategy and of all that belongs to it is compared with what it was when the loop over the epochs
began. What did not change needs no storing: a retried stage comes to the same beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from distributed_eg.runtime.messages import ExpertJob
from distributed_eg.runtime.shipping import PICKLE_ERRORS
from distributed_eg.strategy.training.fingerprints import fingerprint, is_plain, parts_of_data

if TYPE_CHECKING:
    from distributed_eg.strategy.strategy import ExpertGateStrategy

_DONE_WITH = frozenset({"mbatch", "mb_output", "loss", "_checkpointing"})
"""Attributes of the strategy that mean nothing between two epochs."""
_KEPT = ("experience", "adapted_dataset", "dataloader")
"""Attributes of the strategy that are made before the first epoch: they must still be the same objects."""
_EVALUATOR = frozenset({"metrics", "loggers", "all_metric_results", "last_metric_results", "_metric_values"})
_OPTIMIZER = frozenset({"state", "param_groups", "step"})
_MODULE = frozenset(vars(nn.Module())) - {"training"}


class CannotResumeError(Exception):
    """A stage has state that a checkpoint cannot hold; the message names it."""


@dataclass(frozen=True)
class _Owner:
    """An object whose attributes may change in training; ``tells``: it may have a state_dict that is all of it."""

    name: str
    value: Any
    skip: frozenset[str] = frozenset()
    tells: bool = False
    is_part: bool = False
    """A module within another owner, whose state holds its tensors but not its attributes."""

    def attributes(self) -> dict[str, Any]:
        return {name: value for name, value in getattr(self.value, "__dict__", {}).items() if name not in self.skip}


class Beginning:
    """What a stage consisted of when its loop over the epochs began."""

    def __init__(self, job: ExpertJob, strategy: ExpertGateStrategy) -> None:
        self._strategy = strategy
        criterion = strategy._criterion
        self.networks: dict[str, nn.Module] = {"model": strategy.model}
        """All that has parameters: the model, the distillation's old head within it, and the criterion."""
        if isinstance(criterion, nn.Module) and not any(criterion is plugin for plugin in strategy.plugins):
            self.networks["criterion"] = criterion
        self._kept = {name: getattr(strategy, name) for name in _KEPT}
        self._layout = _layout(strategy, self.networks)
        self._parts, self._no_parts = _parts((*self._kept.values(), job.data.train, job.data.evaluations))
        self._reads = [fingerprint(part, {}) for part in self._parts]
        self._owners = list(_owners(strategy, self.networks))
        tensors = [tensor for net in self.networks.values() for tensor in (*net.parameters(), *net.buffers())]
        alone = [
            *(owner.value for owner in self._owners if not owner.is_part),
            *tensors,
            *self._parts,
            *self._kept.values(),
        ]
        # An id means something only as long as its object lives.
        self._alone = [value for value in (*alone, job.teacher, criterion) if not is_plain(value)]
        self._tokens = {id(value): f"{type(value).__name__} {i}" for i, value in enumerate(self._alone)}
        self._objects = {owner.name: owner.attributes() for owner in self._owners}
        self._before = {owner.name: self._look(owner) for owner in self._owners}

    @property
    def names(self) -> list[str]:
        """Everything whose changes are looked for."""
        return [owner.name for owner in self._owners]

    def changes(self) -> dict[str, Any]:
        """By owner: its own state, or the values and the states of those of its attributes that changed.

        Raises:
            CannotResumeError: something changed that cannot be put back exactly.
        """
        self._require_same()
        found = {owner.name: self._changes_of(owner) for owner in self._owners}
        return {name: change for name, change in found.items() if change}

    def put_back(self, found: Mapping[str, Any]) -> None:
        """Put back what ``changes`` gave."""
        for owner in self._owners:
            change = found.get(owner.name, {})
            if "own" in change:
                _load_state(owner.value, change["own"])
            for name, value in change.get("values", {}).items():
                vars(owner.value)[name] = value
            for name, state in change.get("states", {}).items():
                _load_state(vars(owner.value)[name], state)

    def _require_same(self) -> None:
        """Refuse what changed but is no attribute's value."""
        if self._no_parts is not None:
            raise CannotResumeError(f"what the data loader reads from cannot be compared ({self._no_parts})")
        for name, value in self._kept.items():
            if getattr(self._strategy, name) is not value:
                raise CannotResumeError(f"strategy.{name} is replaced between epochs")
        loader = self._kept["dataloader"]
        settings = getattr(loader, "loader_kwargs", None) or getattr(loader, "__dict__", {})
        if settings.get("persistent_workers") and settings.get("num_workers"):
            raise CannotResumeError("with persistent_workers=True the loader's processes draw on from epoch to epoch")
        if _layout(self._strategy, self.networks) != self._layout:
            raise CannotResumeError("layers of the network, or the optimizer's parameters, come or go between epochs")
        for part, before in zip(self._parts, self._reads, strict=True):
            if before is None or fingerprint(part, {}) != before:
                raise CannotResumeError(
                    f"what the data loader reads from, {type(part).__name__}, changes while it is read or cannot be "
                    "compared: it may count, cache, work in place or draw from a generator of its own"
                )

    def _look(self, owner: _Owner) -> dict[str, Any]:
        """Fingerprints of an owner's state, or of its attributes and of the states of those that have one."""
        if owner.tells and _has_state(owner.value):
            return {"own": self._entries(owner.value.state_dict())}
        attributes = self._objects[owner.name]
        stateful = {n: v for n, v in attributes.items() if _has_state(v) and id(v) not in self._tokens}
        return {
            "values": {name: fingerprint(value, self._tokens) for name, value in attributes.items()},
            "states": {name: self._entries(value.state_dict()) for name, value in stateful.items()},
        }

    def _changes_of(self, owner: _Owner) -> dict[str, Any]:
        before = self._before[owner.name]
        if owner.tells and _has_state(owner.value):
            return {"own": self._changed_state(owner.value, before["own"])}
        attributes, objects = owner.attributes(), self._objects[owner.name]
        values: dict[str, Any] = {}
        states: dict[str, Any] = {}
        for name in {**objects, **attributes}:
            value = attributes.get(name)
            now = fingerprint(value, self._tokens)
            if name in attributes and now is not None and now == before["values"].get(name):
                continue
            if name in before["states"] and value is objects[name]:
                states[name] = self._changed_state(value, before["states"][name])
            elif name in attributes and (is_plain(value) or _is_avalanche(owner.value)):
                # What Avalanche's own plugins keep, such as the best weights so far, nobody else refers to.
                values[name] = value
            else:
                raise CannotResumeError(
                    f"the attribute {name!r} ({type(value).__name__}) of {owner.name} changes, or cannot be compared; "
                    "give the plugin, or the attribute, state_dict() and load_state_dict()"
                )
        return {"values": values, "states": states} if values or states else {}

    def _entries(self, state: Any) -> dict[Any, str | None]:
        return {key: fingerprint(item, self._tokens) for key, item in state.items()} if isinstance(state, dict) else {}

    def _changed_state(self, value: Any, before: Mapping[Any, str | None]) -> dict[str, Any]:
        """What changed of an object's state: what did not need not be storable, such as a scheduler's functions."""
        state = value.state_dict()
        if not isinstance(state, dict):
            return {"whole": state}
        now = self._entries(state)
        changed = {key: item for key, item in state.items() if now[key] is None or now[key] != before.get(key)}
        return {"keys": list(state), "changed": changed}


def _owners(strategy: ExpertGateStrategy, networks: Mapping[str, nn.Module]) -> Iterator[_Owner]:
    """Everything that may remember something from one epoch to the next, but for the data."""
    evaluator, criterion = strategy.evaluator, strategy._criterion
    yield _Owner(f"the strategy {type(strategy).__name__}", strategy, _DONE_WITH | frozenset(_KEPT))
    yield _Owner("the evaluator", evaluator, _EVALUATOR)
    yield _Owner("the optimizer", strategy.optimizer, _OPTIMIZER)
    members = [("plugin", plugin) for plugin in strategy.plugins if plugin is not evaluator]
    # Avalanche's metrics reset themselves when an epoch or an evaluation begins.
    members += [("metric", metric) for metric in evaluator.metrics if not _is_avalanche(metric)]
    members += [] if isinstance(criterion, nn.Module) else [("criterion", criterion)]
    known = {id(module) for net in networks.values() for module in net.modules()}
    for position, (role, member) in enumerate(members):
        name = f"the {role} {type(member).__name__} ({position})"
        yield _Owner(name, member, tells=True)
        for path, module in _modules_within(member):
            if id(module) not in known and type(module).state_dict is nn.Module.state_dict:
                yield _Owner(f"{name}: {path}", module, _MODULE, is_part=True)
    for name, net in networks.items():
        for path, module in net.named_modules():
            yield _Owner(f"{name} {path}".rstrip(), module, _MODULE)


def _modules_within(member: Any) -> Iterator[tuple[str, nn.Module]]:
    """A member's modules, itself included, by a name each."""
    found = {"": member} if isinstance(member, nn.Module) else getattr(member, "__dict__", {})
    for name, value in found.items():
        if isinstance(value, nn.Module):
            for path, module in value.named_modules():
                yield ".".join(filter(None, (name, path))) or "itself", module


def _parts(data: Any) -> tuple[list[Any], str | None]:
    """What the data is read from, or why that cannot be told."""
    try:
        return parts_of_data(data), None
    except PICKLE_ERRORS as error:
        return [], str(error)


def _layout(strategy: ExpertGateStrategy, networks: Mapping[str, nn.Module]) -> list[Any]:
    """Which layers, tensors and parameters there are; a change of them cannot be put back by loading a state."""
    nets = networks.values()
    tensors = [name for net in nets for name, _ in (*net.named_parameters(), *net.named_buffers())]
    layers = [id(module) for net in nets for module in net.modules()]
    groups = [[id(parameter) for parameter in group["params"]] for group in strategy.optimizer.param_groups]
    return [tensors, layers, groups]


def _is_avalanche(value: Any) -> bool:
    return type(value).__module__.startswith("avalanche.")


def _has_state(value: Any) -> bool:
    names = ("state_dict", "load_state_dict")
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in names)


def _load_state(value: Any, state: Mapping[str, Any]) -> None:
    if "whole" in state:
        value.load_state_dict(state["whole"])
    else:
        own = value.state_dict()
        value.load_state_dict({key: state["changed"].get(key, own.get(key)) for key in state["keys"]})
