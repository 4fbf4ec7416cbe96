"""`min_view_similarity`: the least similar pair of views of every sample."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from contrastive_kernels.engine.autograd import call
from contrastive_kernels.engine.backends import choose
from contrastive_kernels.engine.spec import compute_dtype
from contrastive_kernels.primitives import checks
from contrastive_kernels.primitives.rows import cast_for_autocast, row_dot

__all__ = ["min_view_similarity", "view_similarity"]


def min_view_similarity(
    views: Tensor, *, reduce: Literal["min", "mean"] = "min", backend: str | None = None
) -> tuple[Tensor, Tensor | None]:
    r"""Return the least (or mean) similarity between two distinct views of each sample.

    .. math:: s_i = \min_{j < k} \langle z_{ij}, z_{ik} \rangle \quad \text{or} \quad
        s_i = \frac{2}{V (V - 1)} \sum_{j < k} \langle z_{ij}, z_{ik} \rangle

    Args:
        views: ``(N, V, D)`` with ``V >= 2``, rows of unit norm.
        reduce: ``"min"`` or ``"mean"``.
        backend: as in `similarity_logsumexp`.

    Returns:
        values ``(N,)``, float32 (float64 for float64 inputs), differentiable (the whole gradient of a minimum goes to
        its pair), and the pairs ``(N, 2)`` int64, j < k, the first in row-major order on a tie; None for ``"mean"``.

    Raises:
        ValueError: views is not (N, V, D) with V >= 2, or reduce is unknown.

    Source: Zhao, Du, Wang, Yao, Huang 2023 (ArCL), the alignment term.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> views = torch.nn.functional.normalize(torch.randn(8, 4, 16), dim=-1)
        >>> values, pairs = ck.min_view_similarity(views)
    """
    checks.views("views", views)
    checks.choice("reduce", reduce, ("min", "mean"))
    checks.backend(views, backend)
    return view_similarity(views, reduce, backend)


def view_similarity(views: Tensor, reduce: str, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """Return `min_view_similarity` of arguments that are checked."""
    views = cast_for_autocast(views)
    if reduce == "mean":
        wide, v = views.to(compute_dtype(views)), views.shape[1]
        # Each view with the sum of those before it: |sum|^2 minus the squares would cancel.
        return row_dot(wide[:, 1:], wide[:, :-1].cumsum(1), backend).sum(1) * (2 / (v * (v - 1))), None
    pairs = call(choose(views, backend).name, "views", views.detach())
    index = pairs.unsqueeze(-1).expand(-1, -1, views.shape[2])
    first, second = views.gather(1, index).unbind(1)
    return row_dot(first, second, backend), pairs
