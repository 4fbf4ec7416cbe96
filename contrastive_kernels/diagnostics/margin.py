"""How well the support vector machines of MMCL were solved."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from contrastive_kernels.diagnostics.common import wide_rows, without_autocast
from contrastive_kernels.losses.mmcl import MMCLStats, mmcl_loss
from contrastive_kernels.primitives import checks

__all__ = ["mmcl_dual"]


@torch.no_grad()
@without_autocast
def mmcl_dual(z0: Tensor, *, solver: Literal["inverse", "pgd"] = "inverse", **options: Any) -> MMCLStats:
    """Sparsity, coefficients at the bound, dual objective and KKT residual of MMCL, which are those of view 1 alone.

    **It stores N x N matrices**, as `mmcl_loss` does, which documents them: the one diagnostic that needs more than
    O(N * D) memory. ``block_size`` is for larger N.

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
        >>> import torch
        >>> from contrastive_kernels import diagnostics
        >>> bool((diagnostics.mmcl_dual(torch.randn(16, 8), solver="pgd", sigma=5.0).kkt_residual < 1e-3).all())
        True
    """
    checks.features("z0", z0)
    for name in ("reduction", "weight", "return_stats"):
        if name in options:
            raise ValueError(f"{name} has no effect on the statistics; leave it out")
    options["return_stats"] = True
    rows = wide_rows(z0, False)
    stats: MMCLStats = mmcl_loss(rows, rows, solver=solver, **options)[1]
    return stats
