"""``distributed-eg report``: runs as a page to look at, which opens anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distributed_eg import given
from distributed_eg.errors import InputError, StorageError


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one self-contained HTML page about a run, or about several side by side; the runs are only read."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN…]")]
    """Run directories: paths, or any pyarrow.fs URIs."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.html"
    """The page, a file that ends in .html; one that is there is replaced."""


def report(options: Annotated[ReportOptions, tyro.conf.OmitArgPrefixes]) -> None:
    """Write one self-contained HTML page about a run, or about several side by side; the runs are only read."""
    if not options.runs:
        raise InputError("No run is given: distributed-eg report RUN -o page.html.")
    page = Path(given.path(options.output, "--output"))
    if page.suffix not in (".html", ".htm"):
        raise InputError(f"--output is {str(page)!r}; a page ends in .html.")
    if page.is_dir():
        raise InputError(f"--output is {str(page)!r}, a folder; give the name of a file.")
    from distributed_eg.cli.display import Display
    from distributed_eg.report.facts import read_run
    from distributed_eg.report.page import NO_EVALUATION, page_of, plotly_js

    library = plotly_js()
    runs = [read_run(run) for run in options.runs]
    text = page_of(runs, library)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"The page {str(page)!r} cannot be written: {error}.") from error
    display = Display(to_stderr=False)
    for run in runs:
        if run.newest is None:
            display.say(f"{run.shown}: {NO_EVALUATION}")
    display.say(f"{page} ({page.stat().st_size / 1e6:.1f} MB) tells of {len(runs)} run{'s' * (len(runs) > 1)}.")
