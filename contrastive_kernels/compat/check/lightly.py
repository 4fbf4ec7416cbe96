"""The cases of lightly."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from contrastive_kernels.compat.check.case import Case, Draw

DISTRIBUTION = "lightly"


def peer() -> ModuleType:
    """Return what the adapter has the names of: `lightly.loss`, and what lightly has in modules of their own."""
    found = ModuleType("lightly.loss")
    modules = ("lightly.loss.dcl_loss", "lightly.loss.hypersphere_loss", "lightly.loss.memory_bank", "lightly.loss")
    for name in modules:
        vars(found).update(vars(importlib.import_module(name)))
    return found


def _views(draw: Draw, d: int = 6) -> tuple[Tensor, Tensor]:
    return draw.rows(draw.n, d), draw.rows(draw.n, d)


def _with(name: str, *arguments: Any, **options: Any) -> Any:
    """Return a call of two views."""

    def run(module: Any, draw: Draw) -> Any:
        return getattr(module, name)(*arguments, **options)(*_views(draw))

    return run


def _assigned(name: str, **attributes: Any) -> Any:
    """Return a call of two views by a module whose attributes are assigned later."""

    def run(module: Any, draw: Draw) -> Any:
        loss = getattr(module, name)()
        for attribute, value in attributes.items():
            setattr(loss, attribute, value)
        return loss(*_views(draw))

    return run


def _bank(module: Any, draw: Draw) -> list[Tensor]:
    """Steps that pass the end of the bank, some without update."""
    loss = module.NTXentLoss(0.2, memory_bank_size=(2 * draw.n + 3, 6))
    loss.memory_bank.to(draw.dtype)
    found = []
    for step in range(4):
        query, key = _views(draw)
        found.append(loss(query if step != 1 else query.detach(), key))
        found += [loss.memory_bank.bank.clone(), loss.memory_bank.bank_ptr.clone()]
    return found


def _bank_module(module: Any, draw: Draw) -> list[Tensor]:
    bank = module.MemoryBankModule((draw.n + 2, 4), feature_dim_first=False).to(draw.dtype)
    found = []
    for step in range(3):
        found += bank(draw.rows(draw.n, 4), update=step != 1)
    return [*found, *bank(draw.rows(draw.n, 4), labels=None)]


def _no_bank(module: Any, draw: Draw) -> Any:
    rows, bank = module.MemoryBankModule(0)(draw.rows(draw.n, 4), update=True)
    assert bank is None
    return rows


def _directclr(module: Any, draw: Draw) -> Any:
    loss = module.DirectCLRLoss(loss_dim=5, temperature=0.3)
    return loss(draw.rows(draw.n, 4, 2), draw.rows(draw.n, 4, 2))


def _positions(module: Any, draw: Draw) -> Any:
    return module.VICRegLoss(nu_param=2.0)(draw.rows(draw.n, 3, 2, 4), draw.rows(draw.n, 3, 2, 4))


def _weights(module: Any, draw: Draw) -> Any:
    return module.negative_mises_fisher_weights(*_views(draw), sigma=0.3)


def _pull(x: Tensor, y: Tensor) -> Tensor:
    """Weights that tell the anchors from their positives, with a gradient."""
    return (x * y).sum(1) + x[:, 0].square()


def _smoothed(module: Any, draw: Draw) -> Any:
    loss = module.NTXentLoss()
    loss.cross_entropy = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    return loss(*_views(draw))


def _other_criterion(module: Any, draw: Draw) -> Any:
    loss = module.NTXentLoss(0.3)
    loss.cross_entropy = nn.MultiMarginLoss()
    return loss(*_views(draw))


CASES = (
    Case("NTXentLoss", "", _with("NTXentLoss")),
    Case("NTXentLoss", "gather_distributed in one process", _with("NTXentLoss", 0.1, gather_distributed=True)),
    Case("NTXentLoss", "negative temperature", _with("NTXentLoss", -0.7)),
    Case("NTXentLoss", "temperature assigned", _assigned("NTXentLoss", temperature=0.3)),
    Case("NTXentLoss", "cross_entropy with label smoothing, per anchor", _smoothed),
    Case("NTXentLoss", "another cross_entropy: dense", _other_criterion),
    Case("NTXentLoss", "memory bank", _bank),
    Case("DirectCLRLoss", "more dimensions than two", _directclr),
    Case("DCLLoss", "", _with("DCLLoss")),
    Case("DCLLoss", "weight_fn with gradient", _with("DCLLoss", 0.3, _pull)),
    Case("DCLLoss", "one weight", _with("DCLLoss", 0.3, lambda x, y: torch.tensor(0.5, dtype=x.dtype))),
    Case("DCLLoss", "weights (N, 1)", _with("DCLLoss", 0.3, lambda x, y: (x * y).sum(1, keepdim=True))),
    Case("DCLLoss", "weight_fn assigned", _assigned("DCLLoss", weight_fn=_pull, temperature=0.2)),
    Case("DCLWLoss", "", _with("DCLWLoss", sigma=0.3)),
    Case("negative_mises_fisher_weights", "", _weights),
    Case("BarlowTwinsLoss", "", _with("BarlowTwinsLoss")),
    Case("BarlowTwinsLoss", "lambda_param assigned", _assigned("BarlowTwinsLoss", lambda_param=0.1)),
    Case("VICRegLoss", "", _with("VICRegLoss")),
    Case("VICRegLoss", "weights and eps", _with("VICRegLoss", 1.0, 2.0, 3.0, False, 0.01)),
    Case("VICRegLoss", "positions", _positions),
    Case("HypersphereLoss", "", _with("HypersphereLoss")),
    Case("HypersphereLoss", "options", _with("HypersphereLoss", t=2.0, lam=0.3, alpha=1.0)),
    Case("HypersphereLoss", "alpha between", _assigned("HypersphereLoss", alpha=1.5, t=0.5)),
    Case("MemoryBankModule", "past the end, without update", _bank_module),
    Case("MemoryBankModule", "size of 0", _no_bank),
)
