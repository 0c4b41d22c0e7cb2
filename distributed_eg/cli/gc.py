"""``distributed-eg gc``: remove what no record of a run names."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class GcOptions:
    """Remove the files of a run directory that no record names: weights of attempts that failed, checkpoints of
    finished tasks, what killed writers left. Refused while a driver works on the run."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory: a path, or any pyarrow.fs URI."""
    dry_run: bool = False
    """Only list them."""
    json: bool = False
    """Print one JSON object as the last line of stdout; what people read goes to stderr."""


def gc(options: Annotated[GcOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> None:
    """Remove the files of a run directory that no record names."""
    from distributed_eg.store import verification
    from distributed_eg.store.registry import read_run_record
    from distributed_eg.store.storage import Storage

    storage = Storage(options.run)
    read_run_record(storage)  # says where there is none
    sizes = verification.collect(storage, dry_run=options.dry_run)
    out = sys.stderr if options.json else sys.stdout
    for path, size in sizes.items():
        print(f"{path}: {size:,} bytes", file=out)
    did = "Would remove" if options.dry_run else "Removed"
    print(f"{did} {len(sizes)} file{'s' * (len(sizes) != 1)}, {sum(sizes.values()):,} bytes.", file=out)
    if options.json:
        answer = {"dry_run": options.dry_run, "num_bytes": sum(sizes.values()), "files": sizes}
        print(json.dumps(answer))
