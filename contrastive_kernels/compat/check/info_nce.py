"""The cases of info-nce-pytorch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import Tensor

from contrastive_kernels.compat.check.case import Case, Draw

DISTRIBUTION = "info-nce-pytorch"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("info_nce")


def _in_batch(module: Any, draw: Draw) -> Tensor:
    loss: Tensor = module.InfoNCE()(draw.rows(draw.n, 5), draw.rows(draw.n, 5))
    return loss


def _unpaired(module: Any, draw: Draw) -> Tensor:
    query, key, negatives = draw.rows(draw.n, 5), draw.rows(draw.n, 5), draw.rows(draw.n + 3, 5)
    loss: Tensor = module.InfoNCE(0.2, "none")(query, key, negatives)
    return loss


def _paired(module: Any, draw: Draw) -> Tensor:
    query, key, negatives = draw.rows(draw.n, 5), draw.rows(draw.n, 5), draw.rows(draw.n, 3, 5)
    loss: Tensor = module.InfoNCE(0.2, negative_mode="paired")(query, key, negatives)
    return loss


def _temperature(module: Any, draw: Draw) -> Tensor:
    query, key = draw.rows(draw.n, 5), draw.rows(draw.n, 5)
    loss: Tensor = module.info_nce(query, key, temperature=draw.leaf(0.3), reduction="sum", negative_mode="paired")
    return loss


def _temperatures(module: Any, draw: Draw) -> Tensor:
    temperature = draw.leaf(0.2 + draw.rows(draw.n, 1, grad=False).square())
    loss: Tensor = module.InfoNCE(temperature)(draw.rows(draw.n, 5), draw.rows(draw.n, 5), draw.rows(3, 5))
    return loss


CASES = (
    Case("InfoNCE", "in-batch negatives", _in_batch),
    Case("InfoNCE", "negative_keys, reduction='none'", _unpaired),
    Case("InfoNCE", "negative_mode='paired'", _paired),
    Case("InfoNCE", "a dense temperature for every query", _temperatures),
    Case("info_nce", "temperature with gradient", _temperature),
)
