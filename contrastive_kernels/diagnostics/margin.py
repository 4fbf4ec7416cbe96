"""How well the support vector machines of MMCL were solved."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from contrastive_kernels.losses.mmcl import MMCLStats, mmcl_loss

__all__ = ["mmcl_dual"]


@torch.no_grad()
def mmcl_dual(z0: Tensor, *, solver: Literal["inverse", "pgd"] = "inverse", **options: Any) -> MMCLStats:
    """Sparsity, coefficients at the bound, dual objective and KKT residual of MMCL, which are those of view 1 alone.

    Args:
        z0: ``(N, D)``, the view that the machines are trained on.
        solver: ``"inverse"`` or ``"pgd"``.
        options: further keyword arguments of `mmcl_loss`: kernel, sigma, C, reg, kxx, block_size, ...

    Returns:
        `MMCLStats`.

    Raises:
        ValueError, TypeError: as `mmcl_loss`.

    Source: Shah, Sra, Chellappa, Cherian, AAAI 2022.

    Example:
        >>> bool((mmcl_dual(torch.randn(16, 8), solver="pgd", sigma=5.0).kkt_residual < 1e-3).all())
        True
    """
    options["return_stats"] = True
    stats: MMCLStats = mmcl_loss(z0, z0, solver=solver, **options)[1]
    return stats
