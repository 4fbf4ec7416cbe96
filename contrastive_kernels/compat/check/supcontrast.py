"""The cases of SupContrast, a repository whose ``losses.py`` people copy: compared where a project has that file."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.compat.check.case import Case, Draw

DISTRIBUTION = "supcontrast"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("losses")


def _unlabelled(module: Any, draw: Draw) -> Tensor:
    loss: Tensor = module.SupConLoss()(0.3 * draw.rows(draw.n, 2, 5))
    return loss


def _maps(module: Any, draw: Draw) -> Tensor:
    loss: Tensor = module.SupConLoss(0.5, base_temperature=0.2)(draw.rows(draw.n, 3, 2, 3))
    return loss


def _one(module: Any, draw: Draw) -> Tensor:
    features, labels = draw.rows(draw.n, 2, 5), draw.integers(4, draw.n, 1) - 1
    loss: Tensor = module.SupConLoss(0.5, "one", 1.0)(features, labels)
    return loss


def _labels(module: Any, draw: Draw) -> Tensor:
    features, labels = draw.rows(draw.n, 2, 5), draw.integers(4, draw.n) / 2
    loss: Tensor = module.SupConLoss(0.5)(features, labels=labels)
    return loss


def _single_views(module: Any, draw: Draw) -> Tensor:
    """Some rows have no positive."""
    features = draw.rows(draw.n + 1, 1, 5)
    loss: Tensor = module.SupConLoss(temperature=0.5)(features, draw.integers(draw.n + 1, draw.n + 1))
    return loss


def _mask(module: Any, draw: Draw) -> Tensor:
    """Asymmetric weights, rows without any, and a weight between the views of a sample that is not 1."""
    features, mask = draw.rows(draw.n, 2, 5), draw.integers(3, draw.n, draw.n)
    mask[draw.n // 2] = 0
    loss: Tensor = module.SupConLoss(draw.leaf(0.5), base_temperature=0.3)(features, mask=mask)
    return loss


def _mask_one(module: Any, draw: Draw) -> Tensor:
    features, mask = draw.rows(draw.n, 3, 5), draw.integers(2, draw.n, draw.n).bool()
    loss: Tensor = module.SupConLoss(0.5, contrast_mode="one")(features, None, mask)
    return loss


def _mask_weights(module: Any, draw: Draw) -> Tensor:
    """Negative numbers and a row whose sum is small, in eighths, which float32 adds up exactly."""
    features, mask = draw.rows(draw.n, 2, 5), (draw.integers(9, draw.n, draw.n) - 2) / 8
    mask[0] = -torch.eye(draw.n)[0]
    loss: Tensor = module.SupConLoss(0.5)(features, mask=mask)
    return loss


CASES = (
    Case("SupConLoss", "unlabelled", _unlabelled),
    Case("SupConLoss", "feature maps, base_temperature", _maps),
    Case("SupConLoss", "contrast_mode='one', labels (N, 1), -1 among them", _one),
    Case("SupConLoss", "floating labels", _labels),
    Case("SupConLoss", "one view", _single_views),
    Case("SupConLoss", "mask, temperature with gradient", _mask),
    Case("SupConLoss", "mask, contrast_mode='one'", _mask_one),
    Case("SupConLoss", "mask of any numbers", _mask_weights),
)
