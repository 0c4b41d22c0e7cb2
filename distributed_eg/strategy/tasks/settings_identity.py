"""What tells one run's data and settings from another's, as JSON values, and how two such descriptions differ."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
import stat
import weakref
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.benchmarks.utils.flat_data import ConstantSequence, FlatData
from avalanche.training.templates.base_sgd import PeriodicEval
from PIL.Image import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import ConcatDataset, Dataset, Subset

from distributed_eg.errors import InputError
from distributed_eg.strategy.reporting import GateReporter

if TYPE_CHECKING:
    from distributed_eg.strategy.strategy import ExpertGateStrategy

_SAMPLES_NDIM = 2
"""Arrays of so many dimensions, the lists around them counted, may hold samples; flatter ones are their labels."""


class DataIdentities:
    """Identities of datasets; what a leaf holds is hashed once while the leaf is alive, however many views share it."""

    def __init__(self) -> None:
        # By id(), which is safe: an entry counts only while its weak reference still gives that very leaf.
        self._contents: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._reading: set[int] = set()

    def of(self, dataset: Any) -> dict[str, str | int]:
        """What tells ``dataset`` from others, without reading a sample; the same in every process.

        Transforms count by their class only, those that a view adds not at all. A leaf that changes its own attributes
        while it is read is another one after that.

        Returns:
            ``class``: the leaves' classes in the order of their first rows; ``length``; ``targets``, where there are
            any; ``indices``: which row of which leaf; ``content``: what those leaves hold. The last three are sha256.

        Raises:
            InputError: a view asks for a row that is not there.
        """
        leaves, which, rows = _rows(dataset)
        numbers, first = np.unique(which, return_index=True)
        # In the order of their rows: Avalanche may keep the parts of a dataset in the order of a set.
        used = {id(leaf): leaf for leaf in (leaves[number] for number in numbers[np.argsort(first)])}
        position = {key: place for place, key in enumerate(used)}
        renumbered = np.array([position.get(id(leaf), -1) for leaf in leaves], dtype="<i8")
        identity: dict[str, str | int] = {
            "class": " + ".join(_named(type(leaf)) for leaf in used.values()),
            "length": len(rows),
            "indices": _array_sha256(np.stack([renumbered[which], rows])),
            "content": _json_sha256([self._content(leaf) for leaf in used.values()]),
        }
        targets = getattr(dataset, "targets", None)
        if targets is not None:
            values = targets.tolist() if hasattr(targets, "tolist") else list(targets)
            identity["targets"] = _LeafHash(self).attribute(values)[0]
        return identity

    def _content(self, leaf: Any) -> str:
        key, contents = id(leaf), self._contents
        if key in contents and contents[key][0]() is leaf:
            return contents[key][1]
        if key in self._reading:  # it refers to itself
            return ""
        self._reading.add(key)
        try:
            content = _LeafHash(self).of(leaf)
        finally:
            self._reading.remove(key)
        # A list, or a class with slots, cannot tell when its id is used again: it is hashed each time.
        if getattr(type(leaf), "__weakrefoffset__", 0):
            contents[key] = (weakref.ref(leaf, lambda _: contents.pop(key, None)), content)
        return content


def settings_identity(strategy: ExpertGateStrategy, identities: DataIdentities) -> dict[str, Any]:
    """What decides how experts train and is not in ``MethodConfig``, as JSON values; read before training begins.

    Objects count by their class; criterion, plugins and a subclass of the strategy by their public attributes too,
    learning rate schedulers and dataclasses by all of theirs.

    Raises:
        InputError: the reference's file cannot be read.
    """
    own = (strategy.evaluator, strategy.clock, strategy._criterion)
    names = {id(parameter): name for name, parameter in strategy.model.named_parameters()}
    plugins = [plugin for plugin in strategy.plugins if not any(plugin is other for other in own)]
    return {
        "strategy": {"class": _named(type(strategy)), **_added_attributes(strategy)},
        "train_mb_size": _setting(strategy.train_mb_size),
        "train_epochs": _setting(strategy.train_epochs),
        "eval_every": _setting(strategy.eval_every),
        "peval_mode": ", ".join(plugin.peval_mode for plugin in plugins if isinstance(plugin, PeriodicEval)),
        "on_repeat": strategy.on_repeat,
        "optimizer": {
            "class": _named(type(strategy.optimizer)),
            "groups": [
                plain_values({name: value for name, value in group.items() if name != "params"})
                | {"params": _json_sha256([names.get(id(parameter), "another's") for parameter in group["params"]])}
                for group in strategy.optimizer.param_groups
            ],
        },
        "criterion": _object(strategy._criterion),
        "reference": _reference(strategy.reference, identities),
        "plugins": [_object(plugin) for plugin in plugins if not isinstance(plugin, PeriodicEval | GateReporter)],
    }


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Named settings, such as loader arguments, as JSON values: arrays by sha256, objects by their class."""
    return {name: _setting(value) for name, value in values.items()}


def _added_attributes(strategy: ExpertGateStrategy) -> dict[str, Any]:
    """Public attributes that a subclass of the strategy gave it."""
    ours = strategy._own_names
    return plain_values({n: v for n, v in vars(strategy).items() if n not in ours and not n.startswith("_")})


def _reference(reference: Any, identities: DataIdentities) -> Any:
    if not isinstance(reference, str | Path):
        return None if reference is None else identities.of(reference)
    try:
        return hashlib.sha256(Path(reference).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"The reference {str(reference)!r} cannot be read: {error}") from error


def _rows(dataset: Any) -> tuple[list[Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The leaves of a dataset, and for each of its samples the leaf's number and the row in it."""
    children: list[Any]
    indices: Any = None
    if isinstance(dataset, AvalancheDataset):
        return _rows(dataset._flat_data)
    if isinstance(dataset, Subset):
        children, indices = [dataset.dataset], dataset.indices
    elif isinstance(dataset, ConcatDataset):
        children = dataset.datasets
    elif isinstance(dataset, FlatData):
        children, indices = dataset._datasets, dataset._indices
    else:
        return [dataset], np.zeros(len(dataset), dtype="<i8"), np.arange(len(dataset), dtype="<i8")
    leaves: list[Any] = []
    parts = [np.empty((2, 0), dtype="<i8")]
    for child in children:
        own, which, rows = _rows(child)
        parts.append(np.stack([which + len(leaves), rows]))
        leaves += own
    table = np.concatenate(parts, axis=1)
    if indices is not None:
        try:
            table = table[:, np.fromiter((int(index) for index in indices), dtype="<i8")]
        except IndexError as error:
            raise InputError(
                f"A view over {', '.join(_named(type(child)) for child in children)} asks for a row that its "
                f"{table.shape[1]} samples do not have ({error}): correct the indices it was made with."
            ) from error
    return leaves, table[0], table[1]


class _LeafHash:
    """Hashes what one leaf holds: its values and the files that it names.

    Where the samples are in memory, a folder or file named by itself is only where they came from, and may be another.
    """

    def __init__(self, identities: DataIdentities) -> None:
        self._identities = identities
        self._listed_files = hashlib.sha256()
        self._single_files = hashlib.sha256()
        self._num_numbers = 0.0

    def of(self, leaf: Any) -> str:
        """sha256 of the leaf's attributes, in name order."""
        attributes = {"": leaf} if isinstance(leaf, list | tuple) else dict(getattr(leaf, "__dict__", {}))
        hashes: dict[str, tuple[str, str, str]] = {}
        # One object may have two names, such as ImageFolder's samples and imgs.
        known: dict[int, tuple[str, str, str]] = {}
        for name, value in sorted(attributes.items()):
            if isinstance(getattr(type(leaf), name, None), cached_property):
                continue
            if id(value) not in known:
                # torchvision's name for a folder is a path even as "data"
                given = Path(value) if name == "root" and isinstance(value, str) else value
                known[id(value)] = self.attribute(given)
            hashes[name] = known[id(value)]
        # Fewer are means, boxes and the like beside samples that lie in files.
        in_memory = self._num_numbers >= 2 * max(1, len(leaf))
        return _json_sha256({name: parts[:2] if in_memory else parts for name, parts in hashes.items()})

    def attribute(self, value: Any) -> tuple[str, str, str]:
        """sha256 of a value but for the paths in it, of the files in lists, and of a file or folder by itself."""
        values, self._listed_files, self._single_files = (hashlib.sha256() for _ in range(3))
        if isinstance(value, list | tuple):
            # Item by item: such a list may be as long as the dataset.
            for item in value:
                values.update(json.dumps(self._described(item, 1)).encode() + b"\n")
        else:
            values.update(json.dumps({"": self._described(value, 0)}).encode())
        return values.hexdigest(), self._listed_files.hexdigest(), self._single_files.hexdigest()

    def _described(self, value: Any, depth: int) -> Any:
        """``value`` as JSON without what differs between processes; ``depth`` is how many lists it lies in."""
        inner = depth + 1
        if isinstance(value, enum.Enum):
            return {"enum": f"{_named(type(value))}.{value.name}"}
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str | os.PathLike):
            return self._text(value, depth)
        if isinstance(value, list | tuple):
            return [self._described(item, inner) for item in value]
        if isinstance(value, dict):
            items = [[self._described(key, inner), self._described(item, inner)] for key, item in value.items()]
            return {"items": sorted(items, key=lambda item: json.dumps(item[0]))}
        if isinstance(value, set | frozenset):
            return {"set": sorted((self._described(item, inner) for item in value), key=json.dumps)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type | Dataset):
            fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
            return {"class": _named(value), "fields": self._described(fields, depth)}
        if isinstance(value, DataAttribute | ConstantSequence):
            return [self._described(item, inner) for item in value]
        if isinstance(value, Dataset | AvalancheDataset | FlatData):
            self._num_numbers = math.inf
            return {"dataset": self._identities.of(value)}
        return self._array(value, depth)

    def _array(self, value: Any, depth: int) -> Any:
        if isinstance(value, bytes | bytearray):
            value = np.frombuffer(value, dtype=np.uint8)
        elif isinstance(value, Image):
            header = f"{value.mode} {value.size} {value.getpalette()}"
            self._num_numbers += value.width * value.height
            return {"image": hashlib.sha256(header.encode() + value.tobytes()).hexdigest()}
        elif hasattr(value, "to_numpy"):  # columns of a table
            value = np.asarray(value)
        if not isinstance(value, np.ndarray | np.generic | Tensor):
            return {"object": _named(value)}
        if isinstance(value, np.ndarray) and value.dtype.kind in "OU":
            return self._described(value.tolist(), depth)
        plain = _number(value)
        if plain is not None:
            return plain
        if depth + value.ndim >= _SAMPLES_NDIM:
            self._num_numbers += math.prod(value.shape)
        return {"array": _array_sha256(value)}

    def _text(self, value: str | os.PathLike[Any], depth: int) -> Any:
        """A string; a path leaves nothing here but a mark, for what it leads to is hashed apart."""
        text = os.fsdecode(value)
        certain = not isinstance(value, str) or os.sep in text or "/" in text
        # A bare name in a list is a name in some folder, not in the current one.
        if not certain and depth > 0:
            return text
        try:
            found = os.stat(text)
        except (OSError, ValueError):  # not there, not readable, or no path at all
            found = None
        if not certain and (found is None or not stat.S_ISREG(found.st_mode)):
            return text
        entry: list[Any] = [text, None]
        if found is not None:
            is_folder = stat.S_ISDIR(found.st_mode)
            entry = [os.path.abspath(text), *(["folder"] if is_folder else [found.st_size, found.st_mtime_ns])]
        files = self._listed_files if depth > 0 else self._single_files
        files.update(json.dumps(entry).encode() + b"\n")
        return {"path": None}


def _setting(value: Any) -> Any:
    """A setting as a JSON value: plain ones as they are, arrays by sha256, objects by their class."""
    if isinstance(value, enum.Enum):
        return f"{_named(type(value))}.{value.name}"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray | np.generic):
        plain = _number(value)
        return _array_sha256(value) if plain is None else plain
    if isinstance(value, Mapping):
        return {name if isinstance(name, str) else json.dumps(_setting(name)): _setting(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_setting(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_setting(item) for item in value), key=json.dumps)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, torch.device | torch.dtype):
        return str(value)
    if isinstance(value, Optimizer):  # a scheduler's
        return _named(value)
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return _object(value) if is_data or isinstance(value, LRScheduler | partial) else _named(value)


def _object(value: Any) -> dict[str, Any]:
    """Class and public attributes of an object, all of a scheduler's; of a module its weights and children too."""
    attributes = getattr(value, "__dict__", None) or {name: getattr(value, name) for name in _field_names(value)}
    private = isinstance(value, LRScheduler)
    described = plain_values({name: v for name, v in attributes.items() if private or not name.startswith("_")})
    if isinstance(value, partial):
        described |= {"func": _object(value.func), "args": _setting(value.args), "keywords": _setting(value.keywords)}
    if isinstance(value, nn.Module):
        for weights in (value.named_parameters(recurse=False), value.named_buffers(recurse=False)):
            described |= {name: _array_sha256(tensor) for name, tensor in weights}
        described |= {name: _object(child) for name, child in value.named_children()}
    return {"class": _named(value), **described}


def _field_names(value: Any) -> list[str]:
    """A dataclass's fields, which one with slots keeps in no ``__dict__``."""
    return [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []


def _named(value: Any) -> str:
    """Qualified name of a class or function, or of an object's class; never an address."""
    named = value if isinstance(getattr(value, "__qualname__", None), str) else type(value)
    return f"{getattr(named, '__module__', None) or 'builtins'}.{named.__qualname__}"


def _number(value: Tensor | np.ndarray[Any, Any] | np.generic) -> bool | int | float | str | None:
    """The Python scalar in an array without dimensions; None where there is none."""
    plain = value.item() if value.ndim == 0 and not (isinstance(value, Tensor) and value.is_meta) else None
    return plain if isinstance(plain, bool | int | float | str) else None


def _array_sha256(value: Tensor | np.ndarray[Any, Any] | np.generic) -> str:
    """sha256 of dtype, shape and bytes; copies only what is not contiguous."""
    if isinstance(value, Tensor):
        dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    kind = value.dtype if isinstance(value, Tensor) else value.dtype.str
    digest = hashlib.sha256(f"{kind} {tuple(value.shape)}\n".encode())
    digest.update(flat.data)
    return digest.hexdigest()


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
