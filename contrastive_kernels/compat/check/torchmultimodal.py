"""The cases of torchmultimodal."""

from __future__ import annotations

import importlib
from types import ModuleType

from contrastive_kernels.compat.check.case import Case

DISTRIBUTION = "torchmultimodal-nightly"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("torchmultimodal.modules.losses.contrastive_loss_with_temperature")


CASES: tuple[Case, ...] = ()
