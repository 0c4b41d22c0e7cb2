"""Every error that this package raises on purpose.

ExpertGateError
├── InputError (ValueError)        what the caller gave cannot be used; nothing was changed
│   └── BackboneError              the backbone, its weights, its feature layer or its input shape
├── StorageError (OSError)         the run directory cannot be written or read, or its content is damaged
├── ResourceError (RuntimeError)   the cluster cannot provide what was asked for
├── WorkerLostError (RuntimeError) a worker process or its node went away
├── HookError (RuntimeError)       a plugin, a metric or a method of the user's own raised on a worker
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


class StorageError(ExpertGateError, OSError):
    """The run directory cannot be written or read, or a file in it is damaged."""


class ResourceError(ExpertGateError, RuntimeError):
    """The cluster cannot provide the resources that were asked for."""


class WorkerLostError(ExpertGateError, RuntimeError):
    """A worker process, or the node that it ran on, went away."""


class HookError(ExpertGateError, RuntimeError):
    """A plugin, a metric or an overridden method raised while an expert trained; it carries the worker's traceback."""


class DivergedError(ExpertGateError, ArithmeticError):
    """The loss of a task's training became NaN or infinite."""


class TaskFailedError(ExpertGateError, RuntimeError):
    """One or more tasks could not be trained; what other tasks committed is kept."""
