"""The cases of open_clip."""

from __future__ import annotations

import importlib
from types import ModuleType

from contrastive_kernels.compat.check.case import Case

DISTRIBUTION = "open-clip-torch"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("open_clip")


CASES: tuple[Case, ...] = ()
