"""The cases of solo-learn, of release 1.0.6 and of those before it that have fewer functions and take two views."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.compat.check.case import Case, Draw

DISTRIBUTION = "solo-learn"


def peer() -> ModuleType:
    """Return the module whose names the adapter has."""
    return importlib.import_module("solo.losses")


def _simclr(module: Any, draw: Draw) -> Tensor:
    views, indexes = draw.rows(2, draw.n, 5), torch.arange(draw.n).repeat(2)
    loss: Tensor
    if "indexes" in inspect.signature(module.simclr_loss_func).parameters:
        loss = module.simclr_loss_func(views.flatten(0, 1), indexes, 0.2)
    else:
        loss = module.simclr_loss_func(*views, 0.2)
    return loss


def _simclr_side_by_side(module: Any, draw: Draw) -> Tensor:
    """The rows of a sample need not lie a batch apart, and -1 is an index as any other."""
    rows = draw.rows(2 * draw.n, 5)
    indexes = torch.arange(draw.n).repeat_interleave(2) - 1
    loss: Tensor
    if "indexes" in inspect.signature(module.simclr_loss_func).parameters:
        loss = module.simclr_loss_func(rows, indexes.to(torch.int16), temperature=0.2)
    else:
        loss = module.simclr_loss_func(rows[::2], rows[1::2], temperature=0.2)
    return loss


def _mocov2plus(module: Any, draw: Draw) -> Tensor:
    function = getattr(module, "mocov2plus_loss_func", None) or module.moco_loss_func
    loss: Tensor = function(draw.rows(draw.n, 5), draw.rows(draw.n, 5), draw.rows(5, draw.n + 3), temperature=0.3)
    return loss


def _mocov3(module: Any, draw: Draw) -> Tensor:
    query, key = draw.rows(draw.n, 5), draw.rows(draw.n, 5)
    loss: Tensor
    if hasattr(module, "mocov3_loss_func"):
        loss = module.mocov3_loss_func(query, key)
    else:
        loss = 2 * 0.2 * module.nnclr_loss_func(query, key, 0.2)
    return loss


def _nnclr(module: Any, draw: Draw) -> Tensor:
    loss: Tensor = module.nnclr_loss_func(draw.rows(draw.n, 5), draw.rows(draw.n, 5))
    return loss


def _temperature(module: Any, draw: Draw) -> Tensor:
    loss: Tensor = module.nnclr_loss_func(nn=draw.rows(draw.n, 5), p=draw.rows(draw.n, 5), temperature=draw.leaf(0.3))
    return loss


def _ressl(module: Any, draw: Draw) -> Tensor:
    loss: Tensor = module.ressl_loss_func(draw.rows(draw.n, 5), draw.rows(draw.n, 5), draw.rows(draw.n + 3, 5))
    return loss


def _ressl_temperatures(module: Any, draw: Draw) -> Tensor:
    q, k, queue = draw.rows(draw.n, 5), draw.rows(draw.n, 5), draw.rows(draw.n + 3, 5, grad=False)
    loss: Tensor = module.ressl_loss_func(q, k, queue, temperature_q=draw.leaf(0.3), temperature_k=0.5)
    return loss


def _barlow(module: Any, draw: Draw) -> Tensor:
    z1, z2 = draw.rows(draw.n, 5), draw.rows(draw.n, 5)
    before = torch.get_default_dtype()
    torch.set_default_dtype(draw.dtype)  # of the buffers of the peer's batch normalisation
    try:
        loss: Tensor = module.barlow_loss_func(z1, z2, lamb=0.1, scale_loss=0.3)
    finally:
        torch.set_default_dtype(before)
    return loss


def _vicreg(module: Any, draw: Draw) -> Tensor:
    loss: Tensor = module.vicreg_loss_func(draw.rows(draw.n, 5), draw.rows(draw.n, 5))
    return loss


def _vicreg_weights(module: Any, draw: Draw) -> Tensor:
    z1, z2 = draw.rows(draw.n, 5), draw.rows(draw.n, 5)
    loss: Tensor = module.vicreg_loss_func(z1, z2, sim_loss_weight=2.0, var_loss_weight=3.0, cov_loss_weight=4.0)
    return loss


CASES = (
    Case("simclr_loss_func", "two views", _simclr),
    Case("simclr_loss_func", "indexes side by side, -1 among them", _simclr_side_by_side),
    Case("mocov2plus_loss_func", "", _mocov2plus),
    Case("mocov3_loss_func", "", _mocov3),
    Case("nnclr_loss_func", "", _nnclr),
    Case("nnclr_loss_func", "temperature with gradient", _temperature),
    Case("ressl_loss_func", "queue with gradient", _ressl),
    Case("ressl_loss_func", "temperatures", _ressl_temperatures),
    Case("barlow_loss_func", "", _barlow),
    Case("vicreg_loss_func", "", _vicreg),
    Case("vicreg_loss_func", "weights", _vicreg_weights),
)
