"""SupConLoss of the SupContrast repository under its own name: `contrastive_kernels.compat.supcontrast.SupConLoss`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kernels.compat._small import inverse, is_small, scalar
from contrastive_kernels.losses import sup_con_loss
from contrastive_kernels.primitives import Pairs, checks, compute_dtype, row_dot, sweep, wide_products

# All that the repository's losses.py has: there is nothing to forward.
__all__ = ["SupConLoss"]


class SupConLoss(nn.Module):
    r"""The supervised contrastive loss of HobbitLong/SupContrast, ``losses.SupConLoss``; no N x N logits.

    .. math:: L = -\frac{T}{T_0} \, \frac1A \sum_a \frac{1}{w_a} \sum_{j \ne a} w_{aj} \Bigl[ u_{aj}
        - \log \sum_{k \ne a} e^{u_{ak}} \Bigr], \qquad u_{aj} = \langle z_a, z_j \rangle / T,
        \quad w_a = \sum_{j \ne a} w_{aj}

    over the A anchors a, rows j and k of all views, with weights w of the samples' pairs.

    Args:
        temperature: T, a float or a tensor (differentiable).
        contrast_mode: ``"all"``: the rows of all views are anchors; ``"one"``: those of the first view.
        base_temperature: :math:`T_0`.

    Source: Khosla et al., NeurIPS 2020, arXiv:2004.11362, eq. 2, as `losses.SupConLoss` of HobbitLong/SupContrast.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.supcontrast import SupConLoss
        >>> features = torch.nn.functional.normalize(torch.randn(8, 2, 4), dim=-1)
        >>> SupConLoss()(features, torch.randint(3, (8,))).shape
        torch.Size([])
    """

    def __init__(
        self, temperature: float | Tensor = 0.07, contrast_mode: str = "all", base_temperature: float | Tensor = 0.07
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            features: ``(N, V, ...)``, V views of each sample, flattened from dimension 2 on; not normalised.
            labels: N numbers of any dtype and shape; samples of one label are positives of each other, and every value
                is a label. None: the other views of a sample are its positives.
            mask: ``(N, N)``, the weight of sample j as a positive of sample i; any numbers, not needfully symmetric.
                The diagonal weighs the other views of the sample. An anchor whose weights sum to less than 1e-6 has
                a sum in place of the mean: without weights it contributes 0.

        Returns:
            0-dim, the mean over the anchors; float32 (float64 for float64 features).

        Raises:
            ValueError: less than three dimensions, no rows, labels beside a mask, another number of labels than of
                samples, an unknown contrast_mode.
            RuntimeError: a mask of another shape.
        """
        features, mask = _checked(features, labels, mask, self.contrast_mode)
        n, views = features.shape[:2]
        anchors = n if self.contrast_mode == "one" else n * views
        temperature, base_temperature = scalar(self.temperature), scalar(self.base_temperature)
        if is_small(features, anchors * n * views, crossover=4):
            loss = _small(features, labels, mask, anchors, temperature)
        elif mask is not None:
            loss = _weighted(features, mask, anchors, temperature).mean()
        else:
            return sup_con_loss(
                features,
                None if labels is None else labels.reshape(-1).to(features.device),
                unlabelled=None,
                logit_scale=inverse(temperature, features),
                base_temperature=base_temperature,
                contrast_mode="one" if self.contrast_mode == "one" else "all",
                normalize=False,
            )
        return (loss * (temperature / base_temperature)).to(loss.dtype)


def _checked(
    features: Tensor, labels: Tensor | None, mask: Tensor | None, contrast_mode: str
) -> tuple[Tensor, Tensor | None]:
    """Return the features (N, V, D) and the mask as the peer takes it; raise its errors."""
    if features.dim() < 3:
        raise ValueError(f"features {checks.shape(features)} must have at least 3 dimensions, (N, V, ...)")
    checks.not_empty("features", features)
    n = features.shape[0]
    if labels is not None and mask is not None:
        raise ValueError("labels and mask are both given; pass one of them")
    if labels is not None and labels.numel() != n:
        raise ValueError(f"labels {checks.shape(labels)} must have {n} entries, one per sample of the features")
    if contrast_mode not in ("all", "one"):
        raise ValueError(f"contrast_mode {contrast_mode!r} is unknown; choose 'all' or 'one'")
    if mask is not None:
        if tuple(mask.shape) != (n, n):
            raise RuntimeError(f"mask {checks.shape(mask)} must have shape {(n, n)}, samples by samples")
        # the peer's weights are float32, whatever they come as
        mask = mask.float().to(features.device, compute_dtype(features))
    return features.flatten(2), mask


def _small(
    features: Tensor, labels: Tensor | None, mask: Tensor | None, anchors: int, temperature: float | Tensor
) -> Tensor:
    """Return the mean loss of a small batch from its logits."""
    n, views = features.shape[:2]
    rows = features.transpose(0, 1).flatten(0, 1)
    if mask is not None:
        weights = mask
    elif labels is not None:
        ids = labels.reshape(-1)
        weights = (ids[:, None] == ids).to(rows)
    else:
        weights = torch.eye(n, dtype=rows.dtype, device=rows.device)
    weights = weights.repeat(anchors // n, views).fill_diagonal_(0)
    total = weights.sum(1, keepdim=True)
    # beside any other logit this one's exponential is exactly 0, and so is its product with the weight 0; a weight's
    # gradient is a multiple of it, and has to be finite
    logits = (rows[:anchors] @ rows.T / temperature).fill_diagonal_(torch.finfo(rows.dtype).min / 2**40)
    return F.cross_entropy(logits, weights / torch.where(total < 1e-6, 1, total))


def _weighted(features: Tensor, weights: Tensor, anchors: int, temperature: float | Tensor) -> Tensor:
    """Return (A,), the losses of the anchors, whose weighted logits are those of weighted sums of the rows."""
    n = features.shape[0]
    rows = features.transpose(0, 1).flatten(0, 1)
    heads = rows[:anchors]
    own = weights.diagonal().repeat(anchors // n)
    with wide_products(features):
        sums = weights @ features.sum(1, dtype=compute_dtype(features))
    logit = row_dot(heads, sums.repeat(anchors // n, 1)) - own * row_dot(heads, heads)
    total = features.shape[1] * weights.sum(1).repeat(anchors // n) - own
    if rows.shape[0] == 1:  # no other row, and no weight
        return 0 * logit
    columns = None if anchors == rows.shape[0] else rows
    lse = sweep(heads, columns, Pairs(diagonals=1), scale=inverse(temperature, rows)).row_lse.squeeze(0)
    return (total * lse - logit / temperature) / torch.where(total < 1e-6, 1, total)
