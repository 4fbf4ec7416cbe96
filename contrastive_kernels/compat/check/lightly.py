"""The cases of lightly."""

from __future__ import annotations

import importlib
from types import ModuleType

from contrastive_kernels.compat.check.case import Case

DISTRIBUTION = "lightly"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("lightly.loss")


CASES: tuple[Case, ...] = ()
