"""Avalanche's generic classes with the arguments that they have here; as bases and in annotations."""

from __future__ import annotations

from typing import Any, TypeAlias

from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from avalanche.core import SupervisedPlugin
from avalanche.evaluation import PluginMetric
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor

Template: TypeAlias = SupervisedTemplate[Any, Tensor, Tensor]
"""Any: experiences of Avalanche's older scenarios are not of the class that it is bound to."""
Plugin: TypeAlias = SupervisedPlugin[Template]
Metric: TypeAlias = PluginMetric[object]
LabelledDataset: TypeAlias = TaskAwareSupervisedClassificationDataset[object]
"""An experience's dataset: with targets, and in most benchmarks with task labels."""
