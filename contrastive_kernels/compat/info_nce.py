"""InfoNCE of info-nce-pytorch under its own names: ``from contrastive_kernels.compat.info_nce import InfoNCE``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kernels.compat._peer import forwarding, warn_dense
from contrastive_kernels.compat._small import inverse, is_small
from contrastive_kernels.losses import info_nce_loss
from contrastive_kernels.primitives import row_dot, unit_rows

__all__ = ["InfoNCE", "info_nce"]

# Up to 512 queries with the keys of their batch, measured with D from 128 to 512.
CROSSOVER = 4.0

__getattr__ = forwarding(__name__, "info-nce-pytorch", "info_nce")


class InfoNCE(nn.Module):
    """`info_nce` as a module: `info_nce.InfoNCE` of info-nce-pytorch.

    Args:
        temperature: T, a float or a tensor (differentiable).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        negative_mode: ``"unpaired"`` or ``"paired"``.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.info_nce import InfoNCE
        >>> InfoNCE(temperature=0.07)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """Return the loss of queries, their positive keys, and further negatives or those of the batch."""
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    r"""Return the InfoNCE loss as info-nce-pytorch defines it; no N x M matrix.

    .. math:: L = \frac1N \sum_i \Bigl[ \log\bigl(e^{u_i^+} + \sum_j e^{u_{ij}}\bigr) - u_i^+ \Bigr],
        \qquad u_{ij} = \cos(q_i, k_j) / T

    Args:
        query: ``(N, D)``.
        positive_key: ``(N, D)``; row i is the positive of query i.
        negative_keys: ``(M, D)``, or ``(N, M, D)`` with ``negative_mode="paired"``; they replace the other rows'
            positives. None: those are the negatives.
        temperature: T, a float or a tensor (differentiable); one of several numbers, broadcast over the logits, stores
            them.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        negative_mode: ``"unpaired"`` or ``"paired"``; means nothing without negative_keys.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError: dimensions, rows or widths that do not fit.

    Source: van den Oord, Li, Vinyals 2018, arXiv:1807.03748; `info_nce.info_nce` of info-nce-pytorch.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.info_nce import info_nce
        >>> info_nce(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """
    _check(query, positive_key, negative_keys, negative_mode)
    paired = negative_keys is not None and negative_mode == "paired"
    keys = positive_key if negative_keys is None else negative_keys
    several = isinstance(temperature, Tensor) and temperature.numel() != 1
    if several:
        warn_dense("info_nce", "a temperature of several numbers")
    if not several and not is_small(query, query.shape[0] * keys.shape[-2], CROSSOVER):
        return info_nce_loss(
            query,
            positive_key,
            negative_keys,
            logit_scale=inverse(temperature, query),
            negative_mode="paired" if paired else "unpaired",
            reduction=reduction,
        )
    query, positive_key = unit_rows(query), unit_rows(positive_key)
    if negative_keys is None:
        logits, targets = query @ positive_key.T, torch.arange(query.shape[0], device=query.device)
    else:
        rows = query[:, None] if paired else query
        negatives = (rows @ unit_rows(negative_keys).transpose(-2, -1)).flatten(1)
        logits = torch.cat([row_dot(query, positive_key)[:, None], negatives], dim=1)
        targets = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
    return F.cross_entropy(logits / temperature, targets, reduction=reduction)


def _check(query: Tensor, positive_key: Tensor, negative_keys: Tensor | None, negative_mode: str) -> None:
    """Raise ValueError for what the peer refuses."""
    dimensions = {"query": (query, 2), "positive_key": (positive_key, 2)}
    if negative_keys is not None:
        if negative_mode not in ("unpaired", "paired"):
            raise ValueError(f"negative_mode must be 'unpaired' or 'paired', not {negative_mode!r}")
        dimensions["negative_keys"] = negative_keys, 3 if negative_mode == "paired" else 2
    for name, (x, expected) in dimensions.items():
        if x.dim() != expected:
            raise ValueError(f"{name} must have {expected} dimensions, not the shape {tuple(x.shape)}")
    for name, (x, expected) in dimensions.items():
        if (name == "positive_key" or expected == 3) and x.shape[0] != query.shape[0]:
            raise ValueError(f"{name} has {x.shape[0]} rows and query {query.shape[0]}; they must be as many")
        if x.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name} has {x.shape[-1]} columns and query {query.shape[-1]}; they must be as many")
