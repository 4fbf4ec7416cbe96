"""The cases of stable_pretraining."""

from __future__ import annotations

import importlib
from types import ModuleType

from contrastive_kernels.compat.check.case import Case

DISTRIBUTION = "stable-pretraining"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("stable_pretraining.losses")


CASES: tuple[Case, ...] = ()
