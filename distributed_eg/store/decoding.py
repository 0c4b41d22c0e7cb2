"""Frozen dataclasses from the JSON that ``dataclasses.asdict`` made of them, checked against their types."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def decode(kind: Any, value: Any, what: str) -> Any:
    """A value from JSON as ``kind``: a dataclass, or plain, a literal, a dict, a tuple of one type, or a type or None.

    Raises:
        ValueError: it is none, or something in it is not; the message begins with the name of that, or with ``what``.
    """
    if type(value) is kind or kind is Any or (kind is float and type(value) is int):
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(value, dict) and isinstance(kind, type) and is_dataclass(kind):
        types = _types_of_fields(kind)
        # Earlier versions did not write what has a default.
        needed = {field.name for field in fields(kind) if field.default is MISSING}
        if odd := sorted((needed - value.keys()) | (value.keys() - types.keys())):
            raise ValueError(f"{what} lacks fields or has others: {', '.join(odd)}")
        return kind(**{name: decode(types[name], item, name) for name, item in value.items()})
    if origin is tuple and isinstance(value, list):
        is_plain = set(map(type, value)) <= {arguments[0], *get_args(arguments[0])}  # columns of many numbers
        return tuple(value) if is_plain else tuple([decode(arguments[0], item, what) for item in value])
    if origin in (Union, UnionType):  # of something and None
        return None if value is None else decode(arguments[0], value, what)
    if (origin is Literal and value in arguments) or type(value) is origin:
        return value
    raise ValueError(f"{what} is {value!r:.80}, no {kind}")


@cache
def _types_of_fields(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}
