"""Losses of lightly under their own names: ``from contrastive_kernels.compat.lightly import NTXentLoss``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_kernels.compat._formulas import (
    are_empty,
    barlow_twins,
    mean_of_nothing,
    nt_xent,
    off_diagonal,
    promoted,
)
from contrastive_kernels.compat._memory_bank import MemoryBankModule
from contrastive_kernels.compat._peer import forwarding, warn_dense
from contrastive_kernels.compat._ranks import gather, is_gathered, rank, sum_over_ranks, world_size
from contrastive_kernels.compat._small import inverse, is_small
from contrastive_kernels.losses import (
    barlow_twins_loss,
    decoupled_loss,
    info_nce_loss,
    nt_xent_loss,
    uniformity_loss,
    vicreg_loss,
)
from contrastive_kernels.primitives import checks, compute_dtype, row_dot, unit_rows, wide_products

__all__ = [
    "BarlowTwinsLoss",
    "DCLLoss",
    "DCLWLoss",
    "DirectCLRLoss",
    "HypersphereLoss",
    "MemoryBankModule",
    "NTXentLoss",
    "VICRegLoss",
    "negative_mises_fisher_weights",
]

__getattr__ = forwarding(__name__, "lightly", "lightly.loss")


# So many numbers of a view VICReg takes from the formula.
_FEW = 32 * 128


def _check_gathering(gather_distributed: bool) -> None:
    """Raise ValueError if there is nothing to gather with."""
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed=True needs torch.distributed, which this build of PyTorch does not have")


class NTXentLoss(nn.Module):
    """NT-Xent, or against a bank of past keys the loss of MoCo: `lightly.loss.NTXentLoss`, without an N x N matrix.

    Args:
        temperature: of the softmax; may be negative.
        memory_bank_size: (K, D); 0: none, the negatives are those of the batch. With a bank the anchors are the rows of
            `out0` alone, their negatives the bank as it was, and `out1` enters it if `out0` requires a gradient.
        gather_distributed: the negatives of the batch are those of all ranks; of a bank, the rows that enter it.

    Raises:
        ValueError: a temperature of 0, a size that is none, or no torch.distributed to gather with.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.lightly import NTXentLoss
        >>> NTXentLoss(memory_bank_size=(64, 4))(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.cross_entropy = nn.CrossEntropyLoss(reduction="mean")
        self.eps = 1e-8
        if abs(temperature) < self.eps:
            raise ValueError(f"temperature {temperature} is too close to 0 to divide by")
        _check_gathering(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss of two views, ``(N, D)`` both."""
        if self.memory_bank.size[0] != 0 and are_empty(out0, out1):
            return mean_of_nothing(out0, out1)
        checks.paired("out0", out0, "out1", out1)
        if self.memory_bank.size[0] != 0:
            return self._against_bank(out0, out1)
        gathered = self.gather_distributed and is_gathered()
        criterion, n = self.cross_entropy, out0.shape[0]
        if not self._is_fused():
            warn_dense("NTXentLoss", "another cross_entropy")
            return self._dense(out0, out1)
        if not gathered and not criterion.label_smoothing and is_small(out0, 4 * n * n):
            return nt_xent(out0, out1, self.temperature, criterion.reduction)
        return nt_xent_loss(
            out0,
            out1,
            logit_scale=inverse(self.temperature, out0),
            label_smoothing=criterion.label_smoothing,
            reduction=criterion.reduction,
            group="world" if gathered else None,
        )

    def _against_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        with wide_products(out0):  # the bank takes rows as they are outside autocast
            query, key = unit_rows(out0), unit_rows(out1)
        key, bank = self.memory_bank(key, update=query.requires_grad)
        bank, criterion = bank.to(query).T, self.cross_entropy
        if self._is_fused() and not is_small(query, query.shape[0] * bank.shape[0]):
            return info_nce_loss(
                query,
                key,
                bank,
                logit_scale=inverse(self.temperature, query),
                label_smoothing=criterion.label_smoothing,
                reduction=criterion.reduction,
                normalize=False,
            )
        if not self._is_fused():
            warn_dense("NTXentLoss", "another cross_entropy")
        query, key, bank = (x.to(compute_dtype(x)) for x in (query, key, bank))
        with wide_products(query):
            logits = torch.cat([row_dot(query, key)[:, None], query @ bank.T], 1) / self.temperature
            loss: Tensor = criterion(logits, logits.new_zeros(logits.shape[0], dtype=torch.int64))
            return loss

    def _is_fused(self) -> bool:
        """Return whether the criterion is one that the fused losses know."""
        criterion = self.cross_entropy
        return type(criterion) is nn.CrossEntropyLoss and criterion.weight is None and criterion.ignore_index < 0

    def _dense(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return what the criterion makes of all logits, in the order that lightly has them in."""
        with wide_products(out0):
            gathered = self.gather_distributed and is_gathered()
            rows = tuple(unit_rows(out.to(compute_dtype(out))) for out in (out0, out1))
            everyone = tuple(map(gather, rows)) if gathered else rows
            n, before = rows[0].shape[0], rank() * rows[0].shape[0] if gathered else 0
            own = torch.arange(before, before + n, device=out0.device)
            others = torch.arange(everyone[0].shape[0], device=out0.device) != own[:, None]
            halves = [
                torch.cat([own_rows @ other.T, (own_rows @ same.T)[others].view(n, -1)], 1)
                for own_rows, same, other in zip(rows, everyone, reversed(everyone), strict=True)
            ]
            loss: Tensor = self.cross_entropy(torch.cat(halves) / self.temperature, own.repeat(2))
            return loss


class DirectCLRLoss(NTXentLoss):
    """`NTXentLoss` of the first numbers of every row: `lightly.loss.DirectCLRLoss`.

    Args:
        loss_dim: how many.
        temperature: see `NTXentLoss`, as the others.
        memory_bank_size: (K, loss_dim), or 0.
        gather_distributed: see `NTXentLoss`.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.lightly import DirectCLRLoss
        >>> DirectCLRLoss(loss_dim=4)(torch.randn(8, 16, 2, 2), torch.randn(8, 16, 2, 2)).shape
        torch.Size([])
    """

    def __init__(
        self,
        loss_dim: int = 64,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, memory_bank_size, gather_distributed)
        self.loss_dim = loss_dim

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss of two views, ``(N, ...)`` both."""
        return super().forward(*(out.flatten(start_dim=1)[:, : self.loss_dim] for out in (out0, out1)))


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    r"""Return ``2 - N softmax(<x_i, y_i> / sigma)``, without gradient: lightly's function of that name.

    Args:
        out0: x, ``(N, D)``.
        out1: y, ``(N, D)``.
        sigma: of the softmax over the samples.

    Returns:
        ``(N,)``, float32 (float64 for float64 inputs): small where the views of a sample are alike.

    Source: Yeh, Hong, Hsu, Liu, Chen, LeCun, ECCV 2022, arXiv:2110.06848.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.lightly import negative_mises_fisher_weights
        >>> negative_mises_fisher_weights(torch.randn(8, 4), torch.randn(8, 4)).mean().round(decimals=4)
        tensor(1.)
    """
    checks.paired("out0", out0, "out1", out1)
    similarity = row_dot(out0.detach(), out1.detach()) / sigma
    return 2 - out0.shape[0] * similarity.softmax(0)


class DCLLoss(nn.Module):
    """The decoupled contrastive loss: `lightly.loss.DCLLoss`, without an N x N matrix.

    Args:
        temperature: of the log-sum-exp.
        weight_fn: of the unit rows of two views, the anchors' first, returns the weights of the positives, ``(N,)``,
            and is differentiated. None: 1.
        gather_distributed: the negatives are those of all ranks.

    Raises:
        ValueError: no torch.distributed to gather with.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.lightly import DCLLoss
        >>> DCLLoss(weight_fn=lambda x, y: (x * y).sum(1))(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        _check_gathering(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss of two views, ``(N, D)`` both; ``-inf`` for one sample, which has no negatives."""
        checks.paired("out0", out0, "out1", out1)
        gathered = self.gather_distributed and is_gathered()
        n = out0.shape[0]
        small = not gathered and (n == 1 or is_small(out0, 4 * n * n))
        weights = None
        if small or self.weight_fn:
            out0, out1 = unit_rows(out0), unit_rows(out1)
            if self.weight_fn:
                weights = self._weights(out0, out1), self._weights(out1, out0)
        if not small:
            return decoupled_loss(
                out0,
                out1,
                logit_scale=inverse(self.temperature, out0),
                positive_weight=weights,
                normalize=weights is None,
                group="world" if gathered else None,
            )
        rows = torch.cat([out0, out1])
        rows = rows.to(compute_dtype(rows))
        with wide_products(rows):
            logits = rows @ rows.T / self.temperature
        positives = logits.diagonal(n).repeat(2)
        if weights is not None:
            positives = positives * torch.cat(weights)
        negatives = logits.masked_fill(torch.eye(n, dtype=torch.bool, device=rows.device).repeat(2, 2), -torch.inf)
        return (negatives.logsumexp(1) - positives).mean()

    def _weights(self, anchors: Tensor, others: Tensor) -> Tensor:
        """Return (N,), the weights of the anchors' positives: of several for each their mean, as the loss is one."""
        assert self.weight_fn is not None
        dtype, n = compute_dtype(anchors), anchors.shape[0]
        weights = torch.as_tensor(self.weight_fn(anchors, others), dtype=dtype, device=anchors.device)
        if weights.shape == (n,):
            return weights
        torch.broadcast_shapes(weights.shape, (n,))  # raises, as the product with the positives would
        for_all = weights.dim() == 0 or weights.shape[-1] == 1
        return weights.mean().expand(n) if for_all else weights.reshape(-1, n).mean(0)


class DCLWLoss(DCLLoss):
    """`DCLLoss` with `negative_mises_fisher_weights`: `lightly.loss.DCLWLoss`.

    Args:
        temperature: of the log-sum-exp.
        sigma: of the weights, which are those of this rank's samples.
        gather_distributed: the negatives are those of all ranks.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.lightly import DCLWLoss
        >>> DCLWLoss(sigma=0.4)(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)


class BarlowTwinsLoss(nn.Module):
    """The loss of Barlow Twins: `lightly.loss.BarlowTwinsLoss`.

    Args:
        lambda_param: weight of the redundancy term.
        gather_distributed: the correlations are the mean of those of all ranks, each of columns standardised there.

    Raises:
        ValueError: no torch.distributed to gather with.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.lightly import BarlowTwinsLoss
        >>> BarlowTwinsLoss()(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed
        _check_gathering(gather_distributed)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of two views, ``(N, D)`` both, N > 1; NaN for none.

        Raises:
            AssertionError: different D.
            ValueError: one row.
        """
        if z_a.shape[-1:] != z_b.shape[-1:]:
            raise AssertionError(f"z_a {tuple(z_a.shape)} and z_b {tuple(z_b.shape)} must have the same last dimension")
        gathered = self.gather_distributed and is_gathered()
        if are_empty(z_a, z_b) and not gathered:
            return mean_of_nothing(z_a, z_b)
        if not gathered and not is_small(z_a, z_a.shape[-1] ** 2):
            return barlow_twins_loss(z_a, z_b, lambd=self.lambda_param)
        checks.paired("z_a", z_a, "z_b", z_b)
        with wide_products(z_a):
            first, second = (F.batch_norm(z.to(compute_dtype(z)), None, None, training=True) for z in (z_a, z_b))
            correlation = first.T @ second / z_a.shape[0]
        if gathered:
            correlation = sum_over_ranks(correlation / world_size())
        return barlow_twins(correlation, self.lambda_param)


class VICRegLoss(nn.Module):
    """The loss of VICReg: `lightly.loss.VICRegLoss`.

    Args:
        lambda_param: weight of the invariance term.
        mu_param: of the variance term, the mean of both views.
        nu_param: of the covariance term, the sum of both views.
        gather_distributed: variance and covariance are those of the rows of all ranks.
        eps: added to the variance under the root.

    Raises:
        ValueError: no torch.distributed to gather with.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.lightly import VICRegLoss
        >>> VICRegLoss()(torch.randn(8, 7, 4), torch.randn(8, 7, 4)).shape
        torch.Size([])
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
    ) -> None:
        super().__init__()
        _check_gathering(gather_distributed)
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.gather_distributed = gather_distributed
        self.eps = eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of two views, ``(N, ..., D)`` both, N > 1: the mean over the dimensions between.

        Raises:
            AssertionError: one row, or different shapes.
        """
        if z_a.shape[0] <= 1 or z_b.shape[0] <= 1:
            raise AssertionError(f"z_a {tuple(z_a.shape)} and z_b {tuple(z_b.shape)} must have more than one row")
        if z_a.shape != z_b.shape:
            raise AssertionError(f"z_a {tuple(z_a.shape)} and z_b {tuple(z_b.shape)} must have the same shape")
        z_a, z_b = promoted(z_a, z_b)
        gathered = self.gather_distributed and is_gathered()
        few = z_a.dim() > 1 and z_a.numel() <= _FEW and is_small(z_a, z_a.shape[1:].numel() * z_a.shape[-1])
        if few and not gathered:
            (variance_a, covariance_a), (variance_b, covariance_b) = (_dense_spread(z, self.eps) for z in (z_a, z_b))
            invariance, variance = F.mse_loss(z_a, z_b), 0.5 * (variance_a + variance_b)
            loss: Tensor = self.lambda_param * invariance + self.mu_param * variance
            return loss + self.nu_param * (covariance_a + covariance_b)
        return vicreg_loss(
            z_a,
            z_b,
            sim_weight=self.lambda_param,
            var_weight=self.mu_param,
            cov_weight=self.nu_param,
            eps=self.eps,
            group="world" if gathered else None,
        )


def _dense_spread(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the variance and the covariance term of a view, in the order of the official code: the same bits."""
    centred, n, d = z - z.mean(0), z.shape[0], z.shape[-1]
    variance = F.relu(1 - (centred.var(0) + eps).sqrt()).mean()
    rows = centred if z.dim() == 2 else centred.movedim(0, -2)
    covariance = off_diagonal(rows.mT @ rows / (n - 1)).square().sum(-1) / d
    return variance, covariance if z.dim() == 2 else covariance.mean()


class HypersphereLoss(nn.Module):
    """Alignment and uniformity on the sphere: `lightly.loss.hypersphere_loss.HypersphereLoss`, without N x N distances.

    Args:
        t: of the Gaussian of the uniformity.
        lam: weight of the uniformity, the mean of both views.
        alpha: power of the distances of the pairs.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.lightly import HypersphereLoss
        >>> HypersphereLoss()(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    def __init__(self, t: float = 1.0, lam: float = 1.0, alpha: float = 2.0) -> None:
        super().__init__()
        self.t = t
        self.lam = lam
        self.alpha = alpha

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of two views, ``(N, D)`` both; NaN for one row, which has no distance, and for none."""
        if are_empty(z_a, z_b):
            return mean_of_nothing(z_a, z_b)
        z_a, z_b = promoted(z_a, z_b)
        checks.paired("z_a", z_a, "z_b", z_b)
        n = z_a.shape[0]
        with wide_products(z_a):
            if n == 1 or is_small(z_a, n * n, crossover=0.5):
                pairs = n * (n - 1) / 2
                x, y = unit_rows(torch.stack([z_a, z_b]).to(compute_dtype(z_a))).unbind(0)
                exponents = torch.stack([torch.pdist(x), torch.pdist(y)]).square() * -self.t
                uniformity = exponents.logsumexp(1).mean() - (math.log(pairs) if pairs else -math.inf)
            else:
                x, y = (unit_rows(z.to(compute_dtype(z))) for z in (z_a, z_b))
                uniformity = (uniformity_loss(x, t=self.t) + uniformity_loss(y, t=self.t)) / 2
            return self._alignment(x, y) + self.lam * uniformity

    def _alignment(self, x: Tensor, y: Tensor) -> Tensor:
        if self.alpha == 2:
            return F.mse_loss(x, y) * x.shape[1]
        distances: Tensor = (x - y).norm(dim=1)
        return distances.pow(self.alpha).mean()
