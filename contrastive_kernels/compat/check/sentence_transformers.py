"""The cases of sentence_transformers."""

from __future__ import annotations

import importlib
from types import ModuleType

from contrastive_kernels.compat.check.case import Case

DISTRIBUTION = "sentence-transformers"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("sentence_transformers.sentence_transformer.losses")


CASES: tuple[Case, ...] = ()
