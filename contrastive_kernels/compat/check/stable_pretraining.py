"""The cases of stable_pretraining."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.compat.check.case import Case, Draw

DISTRIBUTION = "stable-pretraining"


def peer() -> ModuleType:
    """Return what the adapter has the names of: the losses, and those that the library does not export."""
    found = ModuleType("stable_pretraining.losses")
    for name in ("stable_pretraining.losses.joint_embedding", "stable_pretraining.losses"):
        vars(found).update(vars(importlib.import_module(name)))
    return found


def _views(draw: Draw) -> tuple[Tensor, Tensor]:
    return draw.rows(draw.n, 6), draw.rows(draw.n, 6)


def _with(name: str, *arguments: Any, **options: Any) -> Any:
    """Return a call of two views."""

    def run(module: Any, draw: Draw) -> Any:
        return getattr(module, name)(*arguments, **options)(*_views(draw))

    return run


def _info_nce(module: Any, draw: Draw) -> Any:
    targets = draw.integers(draw.n + 4, draw.n)
    return module.InfoNCELoss(0.2)(draw.rows(draw.n, 6), draw.rows(draw.n + 4, 6), targets)


def _ignored(module: Any, draw: Draw) -> Any:
    targets = draw.integers(draw.n + 4, draw.n)
    targets[::3] = -100
    return module.InfoNCELoss()(draw.rows(draw.n, 6), draw.rows(draw.n + 4, 6), targets)


def _scale(module: Any, draw: Draw) -> Any:
    anchors, candidates, targets = draw.rows(draw.n, 6), draw.rows(draw.n + 4, 6), draw.integers(draw.n, draw.n)
    return module.InfoNCELoss()(anchors, candidates, targets, logit_scale=draw.leaf(torch.tensor([0.4])))


def _masked(module: Any, draw: Draw) -> Any:
    anchors, candidates, targets = draw.rows(draw.n, 6), draw.rows(draw.n + 4, 6), torch.arange(draw.n)
    mask = draw.integers(2, draw.n, draw.n + 4).bool()
    mask[targets, targets] = False
    return module.InfoNCELoss(0.3)(anchors, candidates, targets, mask)


def _probabilities(module: Any, draw: Draw) -> Any:
    anchors, candidates = draw.rows(draw.n, 6), draw.rows(draw.n + 4, 6)
    return module.InfoNCELoss(0.3)(anchors, candidates, draw.rows(draw.n, draw.n + 4).softmax(1))


def _clip_scale(module: Any, draw: Draw) -> Any:
    return module.CLIPLoss(3.0)(*_views(draw), logit_scale=draw.leaf(0.2))


def _clip_scales(module: Any, draw: Draw) -> Any:
    feats_i, feats_j = _views(draw)
    return module.CLIPLoss()(feats_i=feats_i, feats_j=feats_j, logit_scale=draw.rows(draw.n).exp())


def _assigned(module: Any, draw: Draw) -> list[Tensor]:
    losses = module.NTXEntLoss(), module.CLIPLoss(), module.BarlowTwinsLoss(), module.VICRegLoss()
    losses[0].temperature = losses[1].temperature = 0.3
    losses[2].lambd, losses[3].sim_coeff = 0.1, 2.0
    losses[3].vcreg_loss.std_coeff, losses[3].vcreg_loss.epsilon = 3.0, 0.01
    views = _views(draw)
    return [loss(*views) for loss in losses]


def _constant_column(module: Any, draw: Draw) -> Any:
    views = [torch.cat([view, torch.ones_like(view[:, :1])], 1) for view in _views(draw)]
    return module.BarlowTwinsLoss(0.02)(*views)


def _one_view(module: Any, draw: Draw) -> Any:
    return module.VCRegLoss(2.0, 3.0, 0.01)(draw.rows(draw.n, 6))


CASES = (
    Case("InfoNCELoss", "", _info_nce),
    Case("InfoNCELoss", "targets of -100", _ignored),
    Case("InfoNCELoss", "logit_scale with gradient", _scale),
    Case("InfoNCELoss", "mask: dense", _masked),
    Case("InfoNCELoss", "targets that are probabilities: dense", _probabilities),
    Case("NTXEntLoss", "", _with("NTXEntLoss")),
    Case("NTXEntLoss", "attributes assigned, as of others", _assigned),
    Case("CLIPLoss", "", _with("CLIPLoss")),
    Case("CLIPLoss", "logit_scale with gradient", _clip_scale),
    Case("CLIPLoss", "logit_scale per candidate: dense", _clip_scales),
    Case("BarlowTwinsLoss", "", _with("BarlowTwinsLoss")),
    Case("BarlowTwinsLoss", "a constant column", _constant_column),
    Case("VICRegLoss", "", _with("VICRegLoss")),
    Case("VICRegLoss", "options", _with("VICRegLoss", 1.0, 2.0, 3.0, 0.01)),
    Case("VCRegLoss", "", _one_view),
)
