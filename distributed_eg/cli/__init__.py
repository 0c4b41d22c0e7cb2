"""The command ``distributed-eg``: the only place that prints."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import NoReturn


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a known error ends it with one sentence on stderr.

    Exit codes: 0 done, 1 the work failed, 2 what was asked for cannot be used, 130 interrupted, 143 terminated.
    """
    import tyro

    from distributed_eg.cli.gc import gc
    from distributed_eg.cli.run import run
    from distributed_eg.cli.simulate import simulate
    from distributed_eg.cli.verify import verify
    from distributed_eg.errors import ExpertGateError, InputError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Said by a library of Avalanche's at every start, and nothing here needs one.
    warnings.filterwarnings("ignore", message="no QP solver found")
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"run": run, "verify": verify, "gc": gc, "simulate": simulate},
            prog="distributed-eg",
            description="Expert Gate lifelong learning on Ray clusters.",
            args=arguments,
        )
    except ExpertGateError as error:
        print(f"distributed-eg: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except SystemExit as stop:
        if stop.code == _TERMINATED:
            _leave(_TERMINATED, "terminated")
        raise


_TERMINATED = 143


def _leave(code: int, why: str) -> NoReturn:
    """End at once: everything is closed by now, and Python would tidy up for another second, which a job scheduler may
    not grant."""
    print(f"distributed-eg: {why}", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
