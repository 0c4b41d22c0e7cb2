"""``distributed-eg verify``: whether a run directory is as it was sealed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from distributed_eg.errors import InputError

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check every file of a run directory against the hash in its record, and the tables against the records."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory: a path, or any pyarrow.fs URI."""
    rebuild_tables: bool = False
    """Write tables/*.parquet anew first, from the records. They are exports for people: nothing rests on them."""
    json: bool = False
    """Print one JSON object as the last line of stdout; what people read goes to stderr."""


def verify(options: Annotated[VerifyOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> None:
    """Check every file of a run directory against what its records say; exit code 1 where one is damaged."""
    from distributed_eg.store import layout, verification
    from distributed_eg.store.storage import Storage

    storage = Storage(options.run)
    if not storage.exists(layout.RUN) and not storage.list(layout.TASKS):
        raise InputError(f"There is no run at {storage.shown!r}: it has neither {layout.RUN!r} nor any task.")
    if options.rebuild_tables:
        verification.rebuild_tables(storage)
    result = verification.verify(storage)
    out = sys.stderr if options.json else sys.stdout
    for damage in result.damages:
        print(f"{damage.path}: {damage.problem}", file=out)
    state = f"{len(result.damages)} damaged or missing" if result.damages else "all as they were sealed"
    print(f"Checked {result.num_files} files, {result.num_bytes:,} bytes intact: {state}.", file=out)
    if result.unchecked:
        others = f"{len(result.unchecked)} other file{'s' * (len(result.unchecked) != 1)}"
        print(
            f"{others}, which nothing rests on, not checked: {', '.join(result.unchecked[:_SHOWN])}", end="", file=out
        )
        print(", …" if len(result.unchecked) > _SHOWN else "", file=out)
    if options.json:
        print(json.dumps(asdict(result)))
    if result.damages:
        sys.exit(1)
