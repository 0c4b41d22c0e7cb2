"""The command ``distributed-eg``: the only place that prints."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, TextIO

_NOBODY_READS = 141
_TERMINATED = 143


_EXIT_CODES = """Exit codes:
  0    done
  1    the work failed, or what was checked is damaged
  2    what was asked for cannot be used: options, files, data, or a run that they do not fit
  130  interrupted
  141  nobody reads the output any more, as in | head
  143  terminated"""


class _ToStderr(logging.Handler):
    """Logs to what is stderr at the moment: while progress is drawn there, that prints above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record; where that fails, as other handlers do."""
        try:
            print(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a known error ends it with one sentence on stderr.

    It exits with one of ``_EXIT_CODES``; what a run has sealed by then is kept.
    """
    try:
        try:
            _command(arguments)
        finally:
            for stream in _streams():
                stream.flush()
    except OSError as error:
        if _nobody_reads(error):
            _stop_printing()
            sys.exit(_NOBODY_READS)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"distributed-eg: what it prints, or a file, cannot be written: {error}.", file=sys.stderr)
        _stop_printing()
        sys.exit(1)


def _command(arguments: list[str] | None) -> None:
    import tyro

    from distributed_eg import given
    from distributed_eg.cli.config_file import with_config
    from distributed_eg.cli.eval import evaluate
    from distributed_eg.cli.gc import gc
    from distributed_eg.cli.listings import backbones, benchmarks
    from distributed_eg.cli.log_json import logs_json
    from distributed_eg.cli.predict import predict
    from distributed_eg.cli.report import report
    from distributed_eg.cli.run import RunOptions, run
    from distributed_eg.cli.simulate import simulate
    from distributed_eg.cli.tasks import tasks
    from distributed_eg.cli.verify import verify
    from distributed_eg.errors import ExpertGateError, InputError

    handlers = [_ToStderr()]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=handlers)
    # Said by a library of Avalanche's at every start, and nothing here needs one.
    warnings.filterwarnings("ignore", message="no QP solver found")
    words = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[..., None]] = {
        "run": run,
        "eval": evaluate,
        "predict": predict,
        "tasks": tasks,
        "report": report,
        "verify": verify,
        "gc": gc,
        "simulate": simulate,
        "benchmarks": benchmarks,
        "backbones": backbones,
    }
    try:
        if words and not words[0].startswith("-") and words[0] not in commands:
            near = given.nearest(words[0], list(commands)) or f"; there are {', '.join(commands)}"
            raise InputError(f"There is no command {words[0]!r}{near}.")
        if words[:1] == ["run"] and (file := _config_in(words)) is not None:
            # Of a file that is named the values are the defaults, so that flags win, and the help shows them.
            commands["run"] = partial(run, options=with_config(RunOptions(), file))
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="distributed-eg",
            description=f"Expert Gate lifelong learning on Ray clusters.\n\n{_EXIT_CODES}",
            args=words,
        )
    except ExpertGateError as error:
        if logs_json():
            logging.getLogger(__name__).error("%s", error)
        else:
            print(f"distributed-eg: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except SystemExit as stop:
        if stop.code == _TERMINATED:
            _leave(_TERMINATED, "terminated")
        raise


def _config_in(words: Sequence[str]) -> str | None:
    """The file of ``--config``, the last one where there are several."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")  # one without a file is the command's own error
    config: str | None = parser.parse_known_args(words)[0].config
    return config


def _nobody_reads(error: OSError) -> bool:
    """Whether an error says that the reader of stdout or stderr went away; other pipes and sockets break, too."""
    if not isinstance(error, BrokenPipeError):
        return False
    ours = select.poll()
    for stream in _streams():
        with contextlib.suppress(OSError, ValueError):  # no stream of the system's
            ours.register(stream.fileno(), select.POLLERR)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in ours.poll(0))


def _streams() -> list[TextIO]:
    """What is printed to; a process may have been started without either."""
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _stop_printing() -> None:
    """Have nothing written any more, also not by what Python does at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in _streams():
        os.dup2(nowhere, stream.fileno())


def _leave(code: int, why: str) -> NoReturn:
    """End at once: everything is closed by now, and Python would tidy up for another second, which a job scheduler may
    not grant."""
    with contextlib.suppress(BrokenPipeError):
        print(f"distributed-eg: {why}", file=sys.stderr)
        logging.shutdown()
        for stream in _streams():
            stream.flush()
    os._exit(code)
