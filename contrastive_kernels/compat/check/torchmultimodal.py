"""The cases of TorchMultimodal."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_kernels.compat.check.case import Case, Draw

DISTRIBUTION = "torchmultimodal-nightly"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("torchmultimodal.modules.losses.contrastive_loss_with_temperature")


def _mask(draw: Draw) -> Tensor:
    """Return a mask that keeps some rows, the first among them."""
    return (torch.arange(draw.n) % 3 == 0) | draw.integers(2, draw.n).bool()


def _module(module: Any, draw: Draw) -> list[Tensor]:
    loss = module.ContrastiveLossWithTemperature()
    value = loss(draw.rows(draw.n, 5), draw.rows(draw.n, 5))
    return [value, loss.logit_scale]


def _clamped(module: Any, draw: Draw) -> list[Tensor]:
    """The parameter that is given is used as it is, and moved to the bound."""
    scale = nn.Parameter(torch.tensor(3.0, dtype=draw.dtype))
    draw.leaves.append(scale)
    loss = module.ContrastiveLossWithTemperature(scale, logit_scale_min=None, logit_scale_max=2.5)
    return [loss(draw.rows(draw.n, 5), draw.rows(draw.n, 5)), scale]


def _masked(module: Any, draw: Draw) -> Tensor:
    a, b, mask = draw.rows(draw.n, 5), draw.rows(draw.n, 5), _mask(draw)
    loss: Tensor = module.ContrastiveLossWithTemperature(logit_scale=1)(a, b, mask=mask)
    return loss


def _smoothed(module: Any, draw: Draw) -> Tensor:
    a, b, options = draw.rows(draw.n, 5), draw.rows(draw.n, 5), {"label_smoothing": 0.1, "reduction": "sum"}
    kind = module.BackpropType.NONE
    loss: Tensor = module.ContrastiveLossWithTemperature(1.0)(a, b, kind, cross_entropy_kwargs=options)
    return loss


def _losses(module: Any, draw: Draw) -> list[Tensor]:
    a, b, scale = draw.rows(draw.n, 5), draw.rows(draw.n, 5), draw.leaf(0.7)
    output = module.contrastive_loss_with_temperature(a, b, scale, cross_entropy_kwargs={"reduction": "none"})
    return [output.loss, output.loss_a, output.loss_b]


def _masked_losses(module: Any, draw: Draw) -> list[Tensor]:
    a, b, mask = draw.rows(draw.n, 5), draw.rows(draw.n, 5), _mask(draw)
    options = {"reduction": "none", "label_smoothing": 0.2}
    output = module.contrastive_loss_with_temperature(a, b, draw.leaf(0.7), mask, cross_entropy_kwargs=options)
    return [output.loss, output.loss_a, output.loss_b]


def _logits(module: Any, draw: Draw) -> list[Tensor]:
    a, b, mask = draw.rows(draw.n, 5), draw.rows(draw.n, 5), _mask(draw)
    output = module.contrastive_loss_with_temperature(a, b, draw.leaf(0.7), mask)
    return [output.logits_a, output.logits_b, output.loss]


def _class_weights(module: Any, draw: Draw) -> list[Tensor]:
    a, b = draw.rows(draw.n, 5), draw.rows(draw.n, 5)
    options = {"weight": draw.rows(draw.n, grad=False).exp(), "ignore_index": 1}
    output = module.contrastive_loss_with_temperature(a, b, draw.leaf(0.7), None, cross_entropy_kwargs=options)
    return [output.loss, output.loss_a, output.loss_b, output.logits_a]


CASES = (
    Case("ContrastiveLossWithTemperature", "", _module),
    Case("ContrastiveLossWithTemperature", "a parameter beyond its bound", _clamped),
    Case("ContrastiveLossWithTemperature", "mask", _masked),
    Case("ContrastiveLossWithTemperature", "label_smoothing, reduction='sum'", _smoothed),
    Case("contrastive_loss_with_temperature", "reduction='none'", _losses),
    Case("contrastive_loss_with_temperature", "mask, label_smoothing, reduction='none'", _masked_losses),
    Case("ContrastiveLossOutput", "logits, which are dense", _logits),
    Case("contrastive_loss_with_temperature", "weight, ignore_index: dense", _class_weights),
)
