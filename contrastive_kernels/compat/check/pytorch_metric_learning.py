"""The cases of pytorch_metric_learning."""

from __future__ import annotations

import importlib
from types import ModuleType

from contrastive_kernels.compat.check.case import Case

DISTRIBUTION = "pytorch-metric-learning"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("pytorch_metric_learning.losses")


CASES: tuple[Case, ...] = ()
