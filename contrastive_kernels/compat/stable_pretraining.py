"""Losses of stable_pretraining under their own names, as ``compat.stable_pretraining.CLIPLoss``.

Where there is a process group of several ranks they gather from it, `InfoNCELoss` excepted, as the originals do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kernels.compat._formulas import are_empty, barlow_twins, mean_of_nothing, nt_xent, promoted
from contrastive_kernels.compat._peer import forwarding, warn_dense
from contrastive_kernels.compat._ranks import gather, is_gathered, rank, sum_over_ranks, world_size
from contrastive_kernels.compat._small import inverse, is_small
from contrastive_kernels.losses import barlow_twins_loss, clip_loss, info_nce_loss, nt_xent_loss
from contrastive_kernels.primitives import (
    centred_rows,
    checks,
    compute_dtype,
    cross_moments,
    gather_rows,
    shards_for,
    unit_rows,
    wide_products,
)

__all__ = ["BarlowTwinsLoss", "CLIPLoss", "InfoNCELoss", "NTXEntLoss", "VCRegLoss", "VICRegLoss"]

__getattr__ = forwarding(__name__, "stable-pretraining", "stable_pretraining.losses")

# The target of an anchor that does not count.
IGNORED = -100
# Multiples of the crossover of other losses. Of anchors with targets the peer is one product, and the sweep has to look
# up the targets' candidates; of NT-Xent it is one product, too.
_TARGETS, _NT_XENT = 3.0, 1.5


class InfoNCELoss(nn.Module):
    """Cross-entropy of anchors over candidates: stable_pretraining's class of that name. It gathers nothing.

    Args:
        temperature: of the softmax, unless `forward` gets a logit_scale.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.stable_pretraining import InfoNCELoss
        >>> InfoNCELoss(0.1)(torch.randn(8, 4), torch.randn(16, 4), torch.arange(8)).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        anchors: Tensor,
        candidates: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        logit_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Return the mean loss of the anchors.

        Args:
            anchors: ``(N, D)``.
            candidates: ``(M, D)``.
            targets: ``(N,)``, the positive candidate of every anchor; -100 leaves an anchor out of the mean.
            mask: ``(N, M)``, True where a candidate is none. This stores the N x M logits.
            logit_scale: divides the similarities in place of the temperature.
        """
        temperature = self.temperature if logit_scale is None else logit_scale
        option = _unfused(temperature)
        if mask is not None:
            option = "mask"
        elif targets.is_floating_point() or targets.dim() != 1:
            option = "targets that are no indices"
        if option:
            warn_dense("InfoNCELoss", option)
        if option or is_small(anchors, anchors.shape[0] * candidates.shape[0], _TARGETS):
            return _cross_entropy(anchors, candidates, targets, temperature, mask)
        ignored = targets == IGNORED
        chosen = targets.masked_fill(ignored, 0).long()
        anchors, candidates = unit_rows(anchors), unit_rows(candidates)
        counted = (~ignored).to(compute_dtype(anchors))
        total = info_nce_loss(
            anchors,
            gather_rows(candidates, chosen),
            candidates,
            logit_scale=inverse(temperature, anchors),
            in_batch_negatives=False,
            query_ids=chosen,
            key_ids=torch.arange(candidates.shape[0], device=candidates.device),
            weight=counted,
            normalize=False,
            reduction="sum",
        )
        number = counted.sum()
        # without any anchor that counts NaN, with a gradient of 0
        return total / number.clamp(min=1) + (number / number - 1)


class NTXEntLoss(InfoNCELoss):
    """NT-Xent, against the rows of all ranks: `stable_pretraining.losses.NTXEntLoss`, without an N x N matrix.

    Args:
        temperature: of the softmax.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.stable_pretraining import NTXEntLoss
        >>> NTXEntLoss(0.1)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__(temperature)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:  # type: ignore[override]  # as the original
        """Return the loss of two views, ``(N, D)`` both; NaN for none."""
        gathered = is_gathered()
        if are_empty(z_i, z_j) and not gathered:
            return mean_of_nothing(z_i, z_j)
        z_i, z_j = promoted(z_i, z_j)
        checks.paired("z_i", z_i, "z_j", z_j)
        if not gathered and is_small(z_i, 4 * z_i.shape[0] ** 2, _NT_XENT):
            return nt_xent(z_i, z_j, self.temperature)
        return nt_xent_loss(z_i, z_j, logit_scale=inverse(self.temperature, z_i), group="world" if gathered else None)


class CLIPLoss(InfoNCELoss):
    """The loss of CLIP, against the rows of all ranks: `stable_pretraining.losses.CLIPLoss`, without an N x N matrix.

    Args:
        temperature: of the softmax, unless `forward` gets a logit_scale.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.stable_pretraining import CLIPLoss
        >>> CLIPLoss()(torch.randn(8, 4), torch.randn(8, 4), logit_scale=0.1).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__(temperature)

    def forward(  # type: ignore[override]  # as the original
        self, feats_i: Tensor, feats_j: Tensor, logit_scale: Tensor | float | None = None
    ) -> Tensor:
        """Return the mean loss of both directions.

        Args:
            feats_i: ``(N, D)``.
            feats_j: ``(N, D)``.
            logit_scale: divides the similarities in place of the temperature.
        """
        if are_empty(feats_i, feats_j) and not is_gathered():
            return mean_of_nothing(feats_i, feats_j)
        checks.paired("feats_i", feats_i, "feats_j", feats_j)
        temperature = self.temperature if logit_scale is None else logit_scale
        n, gathered = feats_i.shape[0], is_gathered()
        option = _unfused(temperature)
        if option:
            warn_dense("CLIPLoss", option)
            own = rank() * n + torch.arange(n, device=feats_i.device)
            directions = (feats_i, gather(feats_j)), (feats_j, gather(feats_i))
            return torch.stack([_cross_entropy(x, y, own, temperature) for x, y in directions]).mean()
        if not gathered and is_small(feats_i, n * n):
            logits = unit_rows(feats_i) @ unit_rows(feats_j).T / temperature
            own = torch.arange(n, device=feats_i.device)
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return clip_loss(
            feats_i, feats_j, inverse(temperature, feats_i), normalize=True, group="world" if gathered else None
        )


class BarlowTwinsLoss(nn.Module):
    """The loss of Barlow Twins, of columns over their deviation + 1e-5: `stable_pretraining.losses.BarlowTwinsLoss`.

    Over several ranks the correlation is the mean of those of all, each of columns standardised there.

    Args:
        lambd: weight of the redundancy term.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.stable_pretraining import BarlowTwinsLoss
        >>> BarlowTwinsLoss()(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    def __init__(self, lambd: float = 5e-3) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        """Return the loss of two views, ``(N, D)`` both; NaN for one row or none.

        Raises:
            AssertionError: different D.
        """
        if z_i.shape[-1:] != z_j.shape[-1:]:
            raise AssertionError(f"z_i {tuple(z_i.shape)} and z_j {tuple(z_j.shape)} must have the same last dimension")
        if are_empty(z_i, z_j) and not is_gathered():
            return mean_of_nothing(z_i, z_j)
        checks.paired("z_i", z_i, "z_j", z_j)
        n = z_i.shape[0]
        if n > 1 and not is_gathered() and not is_small(z_i, z_i.shape[1] ** 2):
            return barlow_twins_loss(z_i, z_j, lambd=self.lambd, std="unbiased", std_eps=1e-5)
        first, second = (z.to(compute_dtype(z)) for z in (z_i, z_j))
        first, second = ((z - z.mean(0)) / (z.std(0) + 1e-5) for z in (first, second))
        with wide_products(first):
            correlation = first.T @ second / (n * world_size())
        return barlow_twins(sum_over_ranks(correlation), self.lambd)


class VCRegLoss(nn.Module):
    """Variance and covariance of the rows of all ranks: `stable_pretraining.losses.VCRegLoss`, half of VICReg's.

    Args:
        std_coeff: weight of the variance term, which counts half.
        cov_coeff: weight of the covariance term.
        epsilon: added to the variance under the root.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.stable_pretraining import VCRegLoss
        >>> VCRegLoss()(torch.randn(8, 4)).shape
        torch.Size([])
    """

    def __init__(self, std_coeff: float = 25, cov_coeff: float = 1, epsilon: float = 1e-4) -> None:
        super().__init__()
        self.std_coeff = std_coeff
        self.cov_coeff = cov_coeff
        self.epsilon = epsilon

    def forward(self, z_i: Tensor) -> Tensor:
        """Return the loss of rows ``(N, D)``; NaN for one row or none."""
        if are_empty(z_i, z_i) and not is_gathered():
            return mean_of_nothing(z_i)
        checks.features("z_i", z_i)
        shards = shards_for("world" if is_gathered() else None, "VCRegLoss", z_i)
        centred = centred_rows(z_i.to(compute_dtype(z_i)), shards)
        n, d = shards.total(z_i.shape[0]), z_i.shape[1]
        diagonal, off_diagonal = cross_moments(centred, centred, shards)
        variance = (1 - (diagonal / (n - 1) + self.epsilon).sqrt()).relu().mean() / 2
        covariance = off_diagonal / ((n - 1) ** 2 * d)
        return (self.std_coeff * variance + self.cov_coeff * covariance).to(centred.dtype)


class VICRegLoss(nn.Module):
    """The loss of VICReg: `stable_pretraining.losses.VICRegLoss`.

    Args:
        sim_coeff: weight of the invariance term, which is this rank's own.
        std_coeff: see `VCRegLoss`, which both views get, as the others.
        cov_coeff: see `VCRegLoss`.
        epsilon: see `VCRegLoss`.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.stable_pretraining import VICRegLoss
        >>> VICRegLoss()(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    def __init__(
        self, sim_coeff: float = 25, std_coeff: float = 25, cov_coeff: float = 1, epsilon: float = 1e-4
    ) -> None:
        super().__init__()
        self.sim_coeff = sim_coeff
        self.vcreg_loss = VCRegLoss(std_coeff, cov_coeff, epsilon)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        """Return the loss of two views, ``(N, D)`` both; NaN for one row or none."""
        if are_empty(z_i, z_j) and not is_gathered():
            return mean_of_nothing(z_i, z_j)
        z_i, z_j = promoted(z_i, z_j)
        checks.paired("z_i", z_i, "z_j", z_j)
        similarity = F.mse_loss(z_i.to(compute_dtype(z_i)), z_j.to(compute_dtype(z_j)))
        loss: Tensor = self.sim_coeff * similarity + self.vcreg_loss(z_i) + self.vcreg_loss(z_j)
        return loss


def _unfused(temperature: float | Tensor) -> str:
    """Return what of a temperature the fused losses do not take; an empty string for nothing."""
    several = isinstance(temperature, Tensor) and temperature.numel() != 1
    return "a logit_scale of several numbers" if several else ""


def _cross_entropy(
    anchors: Tensor, candidates: Tensor, targets: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the loss from all logits."""
    with wide_products(anchors):
        rows, columns = (unit_rows(x.to(compute_dtype(x))) for x in (anchors, candidates))
        logits = rows @ columns.T / temperature
        if mask is not None:
            logits = logits.masked_fill(mask, -torch.inf)
        return F.cross_entropy(logits, targets)
