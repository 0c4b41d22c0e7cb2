"""The log as JSON, one object a line on stderr, for whoever collects logs."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

_KNOWN = ("task", "label", "stage", "state", "attempt", "worker", "seconds")
"""What a record may carry beside its message."""


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time (UTC), level, logger, message, run, and what else is known of it."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run

    def format(self, record: logging.LogRecord) -> str:
        """The object, on one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "run": self._run,
            **{name: getattr(record, name) for name in _KNOWN if hasattr(record, name)},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_as_json(run: str) -> None:
    """Have this process log as JSON from here on, warnings included, and each stage's start and end, too.

    Args:
        run: where the run is kept, without secrets.
    """
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter(run))
    logging.getLogger("distributed_eg").setLevel(logging.DEBUG)
    logging.captureWarnings(True)


def logs_json() -> bool:
    """Whether this process does."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
