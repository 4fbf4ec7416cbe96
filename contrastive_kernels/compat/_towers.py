"""The losses of CLIP and SigLIP as training code calls them: small batches by the plain formula, others fused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels.compat._small import is_small, scalar
from contrastive_kernels.losses import clip_loss, info_nce_loss, siglip_loss
from contrastive_kernels.primitives import compute_dtype

__all__ = ["clip", "clip_own_rows", "fit", "siglip", "single"]

# Up to 384 rows, measured with D from 128 to 512.
CROSSOVER = 2.25


def fit(x: Tensor, y: Tensor) -> bool:
    """Return whether these are two batches of paired rows; of all others the peer says what is wrong."""
    return (
        x.dim() == 2
        and x.shape == y.shape
        and x.shape[0] > 0
        and x.device == y.device
        and x.is_floating_point()
        and (x.dtype == y.dtype or torch.is_autocast_enabled(x.device.type))
    )


def single(*numbers: float | Tensor | None) -> bool:
    """Return whether these are single numbers; several would be broadcast over the logits."""
    return all(not isinstance(number, Tensor) or number.numel() == 1 for number in numbers)


def clip(x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor | None = None) -> Tensor:
    """Return `clip_loss`."""
    if not is_small(x, x.shape[0] ** 2, CROSSOVER):
        return _with(bias, clip_loss(x, y, scalar(scale)))
    logits = (scalar(scale) * x) @ y.T
    directions = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
    return _with(bias, -0.5 * directions.mean())


def clip_own_rows(
    x: Tensor, y: Tensor, all_x: Tensor, all_y: Tensor, first: int, scale: float | Tensor, bias: float | Tensor | None
) -> Tensor:
    """Return the same of the rows of one rank, which start at `first`, among those of all ranks."""
    n, columns = x.shape[0], all_y.shape[0]
    own = torch.arange(first, first + n, device=x.device)
    loss = x.new_zeros((), dtype=compute_dtype(x))
    for rows, candidates in ((x, all_y), (y, all_x)):
        if is_small(x, n * columns, CROSSOVER):
            loss = loss + F.cross_entropy((scalar(scale) * rows) @ candidates.T, own) / 2
        else:
            loss = loss + 0.5 * info_nce_loss(
                rows,
                candidates[first : first + n],
                candidates,
                logit_scale=scalar(scale),
                normalize=False,
                query_ids=own,
                key_ids=torch.arange(columns, device=x.device),
            )
    return _with(bias, loss)


def siglip(
    x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor | None = None, negative_only: bool = False
) -> Tensor:
    """Return `siglip_loss`."""
    if not is_small(x, x.shape[0] ** 2, CROSSOVER):
        return siglip_loss(x, y, scalar(scale), _scalar(bias), negative_only=negative_only)
    logits = (scalar(scale) * x) @ y.T
    if bias is not None:
        logits = logits + scalar(bias)
    signs = torch.full_like(logits, -1.0)
    if not negative_only:
        signs.fill_diagonal_(1.0)
    return -F.logsigmoid(signs * logits).sum() / x.shape[0]


def _scalar(bias: float | Tensor | None) -> float | Tensor | None:
    return None if bias is None else scalar(bias)


def _with(bias: float | Tensor | None, loss: Tensor) -> Tensor:
    """Return a loss in which the bias cancels: its gradient is 0, one that is not finite makes the loss NaN."""
    if isinstance(bias, Tensor):
        bias = bias.reshape(()).to(loss.dtype)
    return loss if bias is None else loss + 0 * bias
