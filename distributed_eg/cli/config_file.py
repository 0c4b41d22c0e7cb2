"""Options from a YAML file, and back: its keys are the options' names, whatever group the help shows them in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from distributed_eg import given
from distributed_eg.errors import InputError, told
from distributed_eg.masking import masked

Options = TypeVar("Options", bound=Any)
"""A frozen dataclass of groups of options, each a frozen dataclass."""

_ON_THE_COMMAND_LINE_ONLY = ("config", "print_config")


def with_config(options: Options, file: str) -> Options:
    """The options with the file's values; both ``batch_size`` and ``batch-size`` are the key of ``--batch-size``.

    Raises:
        InputError: the file cannot be read or is no YAML mapping, or a key is unknown, comes twice, or has a value of
            another type.
    """
    path = Path(given.path(file, "--config"))
    groups = {field.name: getattr(options, field.name) for field in fields(options)}
    known = {
        field.name: group
        for group, values in groups.items()
        for field in fields(values)
        if field.name not in _ON_THE_COMMAND_LINE_ONLY
    }
    changed: dict[str, dict[str, object]] = {group: {} for group in groups}
    for key, value in _read(path):
        name = str(key).replace("-", "_")
        if name not in known:
            near = given.nearest(name, list(known)) or f"; the keys are {', '.join(known)}"
            raise InputError(f"{path}: there is no option {key!r}{near}.")
        if name in changed[known[name]]:
            raise InputError(f"{path}: {key!r} is there twice; leave one of them out.")
        hints = get_type_hints(type(groups[known[name]]))
        changed[known[name]][name] = _as_type(value, hints[name], f"{path}: {key}")
    return replace(options, **{group: replace(groups[group], **values) for group, values in changed.items()})


def config_text(options: Any, left_out: tuple[str, ...] = ()) -> str:
    """The options as YAML that ``with_config`` reads; a URI that holds a secret is left out, and a comment says so."""
    import yaml

    values = {key: value for group in asdict(options).values() for key, value in group.items()}
    for name in (*_ON_THE_COMMAND_LINE_ONLY, *left_out):
        del values[name]
    secret = [key for key, value in values.items() if isinstance(value, str) and masked(value) != value]
    comments = [f"# {key}: {masked(values.pop(key))}  # holds a secret: give it as --{key}\n" for key in secret]
    plain = json.loads(json.dumps(values))  # tuples become lists, as YAML has them
    return "".join(comments) + str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _read(path: Path) -> list[tuple[object, object]]:
    """Keys and values in their order, of which a key may come twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's, but for what its version 1.1 takes 1e-3 for (text), 010 (8), 1:30 (90), and 2026-01-01 (a day)."""

        yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]  # a class variable there, too
            first: [(tag, fits) for tag, fits in resolvers if tag.rpartition(":")[2] not in ("int", "timestamp")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))
    try:
        with path.open("rb") as file:
            loader = Loader(file)
            node = loader.get_single_node()
            if node is None:
                return []
            if not isinstance(node, yaml.MappingNode):
                raise InputError(f"{path} holds no options: write one a line, as in `epochs: 5`.")
            return [
                (loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value
            ]
    except OSError as error:
        raise InputError(f"The file of --config cannot be read: {error}.") from error
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:  # of values under a tag: Python's own
        raise InputError(f"{path} is no YAML: {' '.join(told(error).split())}.") from error


def _as_type(value: object, hint: Any, what: str) -> object:
    """The value where it is of that type, with tuples for YAML's lists."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except TypeError as error:  # what only a tag makes, such as bytes
        raise InputError(f"{what} is {given.shown(value)}; it must be written without a tag.") from error
    except ValidationError as error:
        wanted = dict.fromkeys(_wanted(found) for found in error.errors())
        raise InputError(f"{what} is {given.shown(value)}; it must be {' or '.join(wanted)}.") from error


def _wanted(found: Mapping[str, Any]) -> str:
    """What a finding of pydantic's asks for, as a part of a sentence."""
    return str(found["msg"]).removeprefix("Input should be ").split(", ")[0]
