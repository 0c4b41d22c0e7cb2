"""Whose mistake an exception in a training loop is: which plugin or metric, in which callback."""

from __future__ import annotations

from types import FrameType


def blame(error: BaseException) -> str | None:
    """Such as "the plugin X in before_forward", from the frames of Avalanche's own dispatch; None without one."""
    found: str | None = None
    traceback = error.__traceback__
    while traceback is not None:
        found = _dispatched(traceback.tb_frame) or found
        traceback = traceback.tb_next
    return found


def _dispatched(frame: FrameType) -> str | None:
    name, local = frame.f_code.co_name, frame.f_locals
    if name == "trigger_plugins" and {"p", "event"} <= local.keys():
        return f"the plugin {type(local['p']).__name__} in {local['event']}"
    if name == "_update_metrics_and_loggers" and {"metric", "callback"} <= local.keys():
        return f"the metric {local['metric']} in {local['callback']}"
    return None
