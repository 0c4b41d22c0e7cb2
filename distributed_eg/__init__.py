"""Expert Gate lifelong learning on Ray clusters, behind Avalanche's interface.

The public names are resolved when they are first used: importing the package loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed_eg.benchmarks import make_benchmark as make_benchmark
    from distributed_eg.cli.display import Display as Display
    from distributed_eg.config import ClusterConfig as ClusterConfig
    from distributed_eg.strategy.metrics import gate_metrics as gate_metrics
    from distributed_eg.strategy.model import ExpertGate as ExpertGate
    from distributed_eg.strategy.predictions import Prediction as Prediction
    from distributed_eg.strategy.strategy import ExpertGateStrategy as ExpertGateStrategy

_HOMES = {
    "ClusterConfig": "distributed_eg.config",
    "Display": "distributed_eg.cli.display",
    "ExpertGate": "distributed_eg.strategy.model",
    "ExpertGateStrategy": "distributed_eg.strategy.strategy",
    "Prediction": "distributed_eg.strategy.predictions",
    "gate_metrics": "distributed_eg.strategy.metrics",
    "make_benchmark": "distributed_eg.benchmarks",
}

__all__ = [
    "ClusterConfig",
    "Display",
    "ExpertGate",
    "ExpertGateStrategy",
    "Prediction",
    "gate_metrics",
    "make_benchmark",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
