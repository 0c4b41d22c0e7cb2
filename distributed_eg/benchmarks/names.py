"""A task sequence's name, read apart: what is chained, and how each part is changed. Loads nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast

from distributed_eg import given
from distributed_eg.benchmarks.catalog import BENCHMARKS, EMBEDDED, IN_TURNS, MEDMNIST, PAPER
from distributed_eg.errors import InputError

Kind: TypeAlias = Literal["embedded", "torchvision", "paper", "medmnist", "folder", "hf"]
ChangeKind: TypeAlias = Literal["permuted", "rotated", "pairs"]

CHANGES: Mapping[ChangeKind, tuple[int, str]] = {
    "permuted": (10, "NAME as it is, and with its pixels in 9 other orders"),
    "rotated": (10, "NAME, turned by 10 angles"),
    "pairs": (24, "every two classes of NAME, turned by 24 angles: 1,080 tasks of ten classes"),
}
"""Prefixes: how often each is done where no number is given (as in rotated-36:NAME), and what it makes."""
_CHANGED = re.compile(rf"({'|'.join(CHANGES)})(?:-(\d{{1,9}}))?:(.*)", re.DOTALL)
_BY_PATH = ("folder", "hf")
_CHANGE = rf"(?:{'|'.join(CHANGES)})(?:-\d{{1,9}})?:"
_PATH = re.compile(rf"(?:{_CHANGE})?(?:{'|'.join(_BY_PATH)}):")
"""How a part that names a path begins."""
_PREFIX = re.compile(rf"{_CHANGE}|(?:medmnist|{'|'.join(_BY_PATH)}):")
"""How a part begins that is no name alone."""


@dataclass(frozen=True)
class Change:
    """What makes several tasks of the same classes."""

    kind: ChangeKind
    count: int
    """How many ways, the unchanged one among them."""


@dataclass(frozen=True)
class Part:
    """One part of a chain."""

    name: str
    """As the user wrote it."""
    kind: Kind
    what: str
    """A name of the catalogue, MedMNIST's own name, or a path."""
    change: Change | None


def parts_of_name(name: str) -> tuple[Part, ...]:
    """What ``a+b+c`` chains.

    Raises:
        InputError: a part is no benchmark's name; the nearest ones are told.
    """
    pieces: list[str] = []
    for piece in name.split("+"):
        before = pieces[-1] if pieces else ""
        # A plus may also stand in a path or in a name of its own.
        in_path = _PATH.match(before) is not None and piece not in BENCHMARKS and not _PREFIX.match(piece)
        if before and (in_path or f"{before.rpartition(':')[2]}+{piece}" in IN_TURNS):
            pieces[-1] = f"{before}+{piece}"
        else:
            pieces.append(piece)
    return tuple(_part(piece, name) for piece in pieces)


def _part(piece: str, whole: str) -> Part:
    changed = _CHANGED.fullmatch(piece)
    change, what = None, piece
    if changed is not None:
        kind, what = cast(ChangeKind, changed[1]), changed[3]
        change = Change(kind, int(changed[2] or CHANGES[kind][0]))
        if change.count < 1:
            raise InputError(f"The benchmark {piece!r} is done {change.count} times: give 1 or more.")
    if what in BENCHMARKS:
        if what == EMBEDDED and change is not None:
            raise InputError(f"The benchmark {piece!r} cannot be had: {EMBEDDED!r} comes as it is.")
        own: Kind = "embedded" if what == EMBEDDED else "paper" if what in PAPER else "torchvision"
        return Part(piece, own, what, change)
    head, _, rest = what.partition(":")
    if head == "medmnist" and rest in MEDMNIST:
        return Part(piece, "medmnist", rest, change)
    if head in _BY_PATH and rest:
        path = given.path(rest, f"The path of {piece!r}")
        if not Path(path).is_dir():
            raise InputError(f"The benchmark {piece!r} needs the folder {path}, and there is none.")
        return Part(piece, cast(Kind, head), path, change)
    names = [*BENCHMARKS, *(f"medmnist:{name}" for name in MEDMNIST)]
    near = given.nearest(what, names)
    where = "" if what == whole else f" (in {whole!r})"
    raise InputError(
        f"There is no benchmark {what!r}{where}{near}; `distributed-eg benchmarks` lists them, and folder:PATH, "
        f"hf:PATH and {', '.join(f'{kind}:NAME' for kind in CHANGES)} make others."
    )
