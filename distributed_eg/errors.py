"""Every error that this package raises on purpose.

ExpertGateError
├── InputError (ValueError)        what the caller gave cannot be used; nothing was changed
│   ├── BackboneError              the backbone, its weights, its feature layer or its input shape
│   └── ResumeError                a run cannot be resumed with other settings, data or backbone than it was begun with
├── StorageError (OSError)         the run directory cannot be written or read
│   ├── DamagedFileError           a file in it is missing, torn or altered
│   └── RunInUseError              another driver works on it
├── ResourceError (RuntimeError)   the cluster cannot provide what was asked for
├── WorkerLostError (RuntimeError) a worker process or its node went away
├── StoppedError (RuntimeError)    a stage ended early because its driver was told to stop
├── HookError (RuntimeError)       a dataset, a plugin, a metric or a method of the user's own raised on a worker
├── DivergedError (ArithmeticError) the loss of a task's training is not finite
└── TaskFailedError (RuntimeError) one or more tasks could not be trained; the others are committed

Each takes one message, so that it crosses process borders by pickle unchanged.
"""


class ExpertGateError(Exception):
    """Base of every error raised on purpose by this package."""


class InputError(ExpertGateError, ValueError):
    """What the caller gave cannot be used; nothing was changed."""


class BackboneError(InputError):
    """The backbone is unknown, or its weights, feature layer or input shape do not fit."""


class ResumeError(InputError):
    """A run cannot be resumed with other settings, data or backbone than it was begun with; each is named."""


class StorageError(ExpertGateError, OSError):
    """The run directory cannot be written or read."""


class DamagedFileError(StorageError):
    """A file of the run directory is missing, torn or altered; the message names it and says how it is repaired."""


class RunInUseError(StorageError):
    """Another driver works on the run directory; the message names it."""


class ResourceError(ExpertGateError, RuntimeError):
    """The cluster cannot provide the resources that were asked for."""


class WorkerLostError(ExpertGateError, RuntimeError):
    """A worker process, or the node that it ran on, went away."""


class StoppedError(ExpertGateError, RuntimeError):
    """A stage ended early because its driver was told to stop; nothing of it is recorded."""


class HookError(ExpertGateError, RuntimeError):
    """A dataset, a plugin, a metric or another piece of the user's code raised on a worker: where, what, and the
    worker's traceback."""


class DivergedError(ExpertGateError, ArithmeticError):
    """The loss of a task's training became NaN or infinite."""


class TaskFailedError(ExpertGateError, RuntimeError):
    """One or more tasks could not be trained; what other tasks committed is kept."""


def told(error: BaseException) -> str:
    """An exception's class and text, without a full stop, whatever its own methods do."""
    try:
        text = str(error).rstrip(". ")
    except Exception as broken:
        text = f"(its text cannot be had: {type(broken).__name__})"
    return f"{type(error).__name__}: {text}"
