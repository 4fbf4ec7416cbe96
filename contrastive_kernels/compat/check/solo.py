"""The cases of solo."""

from __future__ import annotations

import importlib
from types import ModuleType

from contrastive_kernels.compat.check.case import Case

DISTRIBUTION = "solo-learn"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("solo.losses")


CASES: tuple[Case, ...] = ()
