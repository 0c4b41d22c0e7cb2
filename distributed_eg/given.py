"""What users give, as plain Python values; what cannot be meant is refused by an ``InputError`` that names it."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TypeVar

from distributed_eg.errors import InputError
from distributed_eg.masking import masked

Word = TypeVar("Word", bound=str)

_SEEDS = range(-(2**63), 2**64)
"""What torch takes."""
_ONE_SLASH = re.compile(r"[A-Za-z][\w+.-]+:/(?!/)")


def whole(value: object, name: str, least: int | None = None) -> int:
    """An integer, of Python, numpy or torch."""
    number = _scalar(value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise InputError(f"{name} is {shown(value)}; it must be a whole number.")
    if least is not None and number < least:
        raise InputError(f"{name} is {shown(number)}; it must be at least {least}.")
    return int(number)


def seed(value: object, name: str = "seed") -> int:
    """An integer that torch takes as a seed."""
    number = whole(value, name)
    if number not in _SEEDS:
        raise InputError(f"{name} is {shown(number)}; it must be at least -2**63 and below 2**64.")
    return number


def number(value: object, name: str, rule: str = "be finite", fits: Callable[[float], bool] = math.isfinite) -> float:
    """A number for which ``fits`` is true, as ``rule`` says; an integer stays one."""
    found = _scalar(value)
    if isinstance(found, bool) or not isinstance(found, Real):
        raise InputError(f"{name} is {shown(value)}; it must be a number.")
    try:
        plain = int(found) if isinstance(found, Integral) else float(found)
        allowed = fits(float(plain))
    except OverflowError:
        allowed = False
    if not allowed:
        raise InputError(f"{name} is {shown(found)}; it must {rule}.")
    return plain


def flag(value: object, name: str) -> bool:
    """True or False, also as 1 or 0."""
    found = _scalar(value)
    if not isinstance(found, int) or found not in (0, 1):
        raise InputError(f"{name} is {shown(value)}; it must be True or False.")
    return bool(found)


def word(value: object, name: str, choices: tuple[Word, ...]) -> Word:
    """One of ``choices``."""
    for choice in choices:
        if isinstance(value, str) and value == choice:
            return choice
    *others, last = map(repr, choices)
    raise InputError(f"{name} is {shown(value)}; it must be {', '.join(others)} or {last}.")


def nearest(value: str, names: Sequence[str]) -> str:
    """The end of an error about an unknown name: those that it may be meant for; empty where none is near."""
    near = difflib.get_close_matches(value, names, n=3)
    return f"; the nearest {'is' if len(near) == 1 else 'are'} {', '.join(near)}" if near else ""


def text(value: object, name: str, what: str = "a str") -> str:
    """A str that is not empty."""
    if not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}; it must be {what}.")
    if not value.strip() or "\0" in value:
        raise InputError(f"{name} is {str(value)!r}, which names nothing; leave it out, or give one.")
    return str(value)


def path(value: object, name: str, what: str = "a path (str or pathlib.Path)") -> str:
    """A path as text, ``~`` put in full."""
    is_path = isinstance(value, os.PathLike)
    return os.path.expanduser(text(os.fsdecode(value) if is_path else value, name, what))  # type: ignore[arg-type]


def location(value: object, name: str) -> str:
    """A local path, or a URI of any file system, as text."""
    found = path(value, name, "a path (str or pathlib.Path) or a URI (str)")
    if _ONE_SLASH.match(found):
        raise InputError(
            f"{name} is {masked(found.replace(':/', '://', 1)).replace('://', ':/', 1)!r}, with one slash: a URI has "
            "two, of which pathlib.Path drops one; give URIs as str."
        )
    return found


def _scalar(value: object) -> object:
    """Scalars of numpy and torch as Python's own; anything else as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            return value.item()
        except RuntimeError:  # a meta tensor has no value
            return value
    return value


def shown(value: object) -> str:
    """A value for a message, on one line; only its type where that is long, or could hold secrets."""
    try:
        line = " ".join(repr(value).split())
    except ValueError:  # Python prints no integers of thousands of digits
        line = ""
    return line if 0 < len(line) <= 80 and "://" not in line else f"a value of type {type(value).__name__}"
