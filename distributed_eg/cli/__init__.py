"""The command ``distributed-eg``: the only place that prints."""

from __future__ import annotations

import logging
import sys
import warnings


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a known error ends it with one sentence on stderr.

    Exit codes: 0 done, 1 the work failed, 2 what was asked for cannot be used, 130 interrupted.
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
        print("distributed-eg: interrupted", file=sys.stderr)
        sys.exit(130)
