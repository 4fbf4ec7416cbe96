"""Loss functions of solo-learn under their own names: ``from contrastive_kernels.compat.solo import simclr_loss_func``.

As in release 1.0.6, whose functions gather the rows of all ranks as soon as there is a process group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive_kernels.compat._formulas import are_empty, mean_of_nothing, promoted
from contrastive_kernels.compat._peer import forwarding
from contrastive_kernels.compat._ranks import gather_constant, is_gathered, is_initialised, rank, world, world_size
from contrastive_kernels.compat._small import inverse, is_small
from contrastive_kernels.losses import barlow_twins_loss, info_nce_loss, sup_con_loss, vicreg_loss
from contrastive_kernels.losses._options import detached
from contrastive_kernels.primitives import (
    checks,
    compute_dtype,
    row_dot,
    shards_for,
    similarity_logsumexp,
    similarity_softmax_mean,
    unit_rows,
    wide_products,
)

__all__ = [
    "barlow_loss_func",
    "mocov2plus_loss_func",
    "mocov3_loss_func",
    "nnclr_loss_func",
    "ressl_loss_func",
    "simclr_loss_func",
    "vicreg_loss_func",
]

__getattr__ = forwarding(__name__, "solo-learn", "solo.losses")

# Up to here no exponential of a cosine, times this and less its largest value, leaves the range of float32.
LARGEST_SCALE = 40.0


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Return the loss of SimCLR with any positives: rows of one index; no N x N matrix.

    .. math:: L = \frac1N \sum_i \Bigl[ \log \sum_{j \ne i} e^{u_{ij}} - \log \sum_{p \in P(i)} e^{u_{ip}} \Bigr],
        \qquad u_{ij} = \cos(z_i, z_j) / T

    with P(i) the other rows of i's index. A row without any makes the loss infinite; of one row or none it is NaN.

    Args:
        z: ``(N, D)``, the rows of all views.
        indexes: ``(N,)``, the sample or the class of every row; every value is one, -1 too. Or ``(N, D)``, the other
            view of z, as releases before 1.0.4 take it: then row i of both is one sample.
        temperature: T, a float or a tensor (differentiable).

    Returns:
        0-dim, the mean over this process's rows; float32 (float64 for float64 rows). With a process group the rows of
        all ranks are candidates, and have a gradient.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: rows that are not floating.

    Source: Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv:2002.05709; `simclr_loss_func` of solo-learn.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.solo import simclr_loss_func
        >>> simclr_loss_func(torch.randn(16, 8), torch.arange(8).repeat(2)).shape
        torch.Size([])
    """
    if indexes.dim() == 2:
        checks.paired("z1", z, "z2", indexes)
        z, indexes = torch.cat([z, indexes]), torch.arange(z.shape[0], device=z.device).repeat(2)
    checks.features("z", z)
    if tuple(indexes.shape) != (z.shape[0],):
        raise ValueError(f"indexes {checks.shape(indexes)} must have shape ({z.shape[0]},), one index per row of z")
    if z.shape[0] <= 1 and not is_gathered():
        return mean_of_nothing(z)  # no pair at all
    scale = inverse(temperature, z)
    small = is_small(z, z.shape[0] ** 2, crossover=4) and not is_gathered()  # against two sweeps
    if small and isinstance(scale, float) and 0 < scale <= LARGEST_SCALE:
        z = unit_rows(z)
        exponentials = torch.addmm(z.new_tensor(-scale), z, z.T, alpha=scale).fill_diagonal_(-torch.inf).exp()
        positives = exponentials.masked_fill(indexes[:, None] != indexes, 0)
        return (exponentials.sum(1) / positives.sum(1)).log().mean()
    return sup_con_loss(z, indexes, logit_scale=scale, positives="sum", unlabelled=None, group=world())


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Return the loss of MoCo: every query picks its key among the queue's; no N x K matrix.

    .. math:: L = \frac1N \sum_i \Bigl[ \log\bigl(e^{u_i^+} + \sum_{j=1}^K e^{u_{ij}}\bigr) - u_i^+ \Bigr],
        \qquad u_i^+ = \langle q_i, k_i \rangle / T,\quad u_{ij} = \langle q_i, \mathrm{queue}_j \rangle / T

    Args:
        query: ``(N, D)``, taken as it is, not normalised.
        key: ``(N, D)``; keeps the gradient that it comes with.
        queue: ``(D, K)``.
        temperature: T, a float or a tensor (differentiable).

    Returns:
        0-dim; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that differ or are not floating.

    Source: He, Fan, Wu, Xie, Girshick, CVPR 2020, arXiv:1911.05722; `mocov2plus_loss_func` of solo-learn.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.solo import mocov2plus_loss_func
        >>> mocov2plus_loss_func(torch.randn(16, 8), torch.randn(16, 8), torch.randn(8, 64)).shape
        torch.Size([])
    """
    # For a sweep the queue has to be turned; the logits of few queries take less time and less memory than it.
    few = 8 * query.shape[0] <= 3 * query.shape[-1]
    if is_small(query, query.shape[0] * queue.shape[-1], crossover=1024 if few else 1):
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], dim=1)
        targets = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
        return F.cross_entropy(logits / temperature, targets)
    return info_nce_loss(query, key, queue.T, logit_scale=inverse(temperature, query), normalize=False)


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    r"""Return the loss of MoCo v3: InfoNCE of unit rows against the keys of all ranks, times 2 T; no N x N matrix.

    .. math:: L = \frac{2 T}{N} \sum_i \Bigl[ \log \sum_j e^{u_{ij}} - u_{ii} \Bigr],
        \qquad u_{ij} = \cos(q_i, k_j) / T

    Args:
        query: ``(N, D)``.
        key: ``(N, D)``; row i is the positive of query i. In one process it keeps the gradient that it comes with, of
            several ranks' keys none has one.
        temperature: T, a float or a tensor (differentiable).

    Returns:
        0-dim; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that differ or are not floating.

    Source: Chen, Xie, He, ICCV 2021, arXiv:2104.02057; `mocov3_loss_func` of solo-learn.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.solo import mocov3_loss_func
        >>> mocov3_loss_func(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """
    if not is_initialised():
        return _in_batch(query, key, temperature) * (2 * temperature)
    n, key = query.shape[0], unit_rows(key.detach())
    every = torch.arange(n * world_size(), device=key.device)
    loss = info_nce_loss(
        unit_rows(query),
        key,
        gather_constant(key),
        logit_scale=inverse(temperature, query),
        query_ids=every[n * rank() :][:n],
        key_ids=every,
        normalize=False,
    )
    return loss * (2 * temperature)


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Return the loss of NNCLR: InfoNCE from the nearest neighbours to the predictions; no N x N matrix.

    .. math:: L = \frac1N \sum_i \Bigl[ \log \sum_j e^{u_{ij}} - u_{ii} \Bigr],
        \qquad u_{ij} = \cos(\mathrm{nn}_i, p_j) / T

    Args:
        nn: ``(N, D)``, the neighbours of the first view.
        p: ``(N, D)``, the predictions of the second.
        temperature: T, a float or a tensor (differentiable).

    Returns:
        0-dim, the mean over this process's rows; float32 (float64 for float64 rows). With a process group the
        predictions of all ranks are candidates, and have a gradient.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that differ or are not floating.

    Source: Dwibedi, Aytar, Tompson, Sermanet, Zisserman, ICCV 2021, arXiv:2104.14548; `nnclr_loss_func` of solo-learn.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.solo import nnclr_loss_func
        >>> nnclr_loss_func(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """
    return _in_batch(nn, p, temperature)


def ressl_loss_func(
    q: Tensor, k: Tensor, queue: Tensor, temperature_q: float = 0.1, temperature_k: float = 0.04
) -> Tensor:
    r"""Return the loss of ReSSL: q has the similarities to the queue that k has; no N x K matrix.

    .. math:: L = -\frac1N \sum_i \sum_{j=1}^K \mathrm{softmax}_j(\langle k_i, \mathrm{queue}_j \rangle / T_k)
        \log \mathrm{softmax}_j(\langle q_i, \mathrm{queue}_j \rangle / T_q)

    Args:
        q: ``(N, D)``, taken as it is, not normalised.
        k: ``(N, D)``; its softmax is constant.
        queue: ``(K, D)``.
        temperature_q: :math:`T_q`, a float or a tensor (differentiable).
        temperature_k: :math:`T_k`, a float or a tensor (constant).

    Returns:
        0-dim; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that differ or are not floating.

    Source: Zheng, You, Wang, Qian, Zhang, Wang, Xu, NeurIPS 2021, arXiv:2107.09282; `ressl_loss_func` of solo-learn.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.solo import ressl_loss_func
        >>> ressl_loss_func(torch.randn(16, 8), torch.randn(16, 8), torch.randn(64, 8)).shape
        torch.Size([])
    """
    # against a sweep and a mean; the logits of few queries take less memory than the queue
    few = 2 * q.shape[0] <= q.shape[-1]
    if is_small(q, q.shape[0] * queue.shape[0], crossover=1024 if few else 16):
        target = ((k.detach() @ queue.detach().T) / detached(temperature_k)).softmax(1)
        return F.cross_entropy(q @ queue.T / temperature_q, target)
    scale_q, scale_k = inverse(temperature_q, q), inverse(detached(temperature_k), k)
    lse = similarity_logsumexp(q, queue, scale=scale_q)
    expected = similarity_softmax_mean(k.detach(), queue.detach(), queue, scale=scale_k)
    return (lse - scale_q * row_dot(q, expected)).mean()


def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    r"""Return the loss of Barlow Twins, scaled.

    .. math:: L = s \Bigl[ \sum_a (1 - C_{aa})^2 + \lambda \sum_{a \ne b} C_{ab}^2 \Bigr],
        \qquad C = \hat z_1^\top \hat z_2 / N

    with :math:`\hat z` the columns of z without their mean, over the root of their biased variance plus 1e-5.

    Args:
        z1: ``(N, D)``, N >= 2, the first view.
        z2: ``(N, D)``, the second view.
        lamb: :math:`\lambda`.
        scale_loss: s.

    Returns:
        0-dim; float32 (float64 for float64 rows). With a process group C is the mean of the ranks' correlations, each
        of columns that the rank standardises by itself, with the gradient of this rank's part alone.

    Raises:
        ValueError: shapes that do not fit, fewer than two rows.
        TypeError: dtypes that differ or are not floating.

    Source: Zbontar, Jing, Misra, LeCun, Deny, ICML 2021, arXiv:2103.03230; `barlow_loss_func` of solo-learn.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.solo import barlow_loss_func
        >>> barlow_loss_func(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """
    if are_empty(z1, z2) and not is_gathered():
        return mean_of_nothing(z1, z2)
    if not (is_gathered() or is_small(z1, z1.shape[-1] ** 2)):
        return barlow_twins_loss(z1, z2, lambd=lamb) * scale_loss
    checks.paired("z1", z1, "z2", z2)
    checks.two_rows("z1", z1, "the loss is one of variances")
    first, second = (F.batch_norm(z.to(compute_dtype(z)), None, None, training=True) for z in (z1, z2))
    with wide_products(z1):
        correlation = first.T @ second / z1.shape[0]
    if is_gathered():
        # the sum of all ranks, the gradient of this one
        total = shards_for("world", "barlow_loss_func", z1).sum(correlation.detach())
        correlation = (total + (correlation - correlation.detach())) / world_size()
    squares = (correlation - torch.eye(z1.shape[1], device=z1.device)).square()
    diagonal = squares.diagonal().sum()
    return scale_loss * (diagonal + lamb * squares.fill_diagonal_(0).sum())


def vicreg_loss_func(
    z1: Tensor,
    z2: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 1.0,
) -> Tensor:
    r"""Return the loss of VICReg; the variance terms of the views are added, not averaged.

    .. math:: L = \alpha\, \mathrm{mse}(z_1, z_2)
        + \beta \sum_z \frac1D \sum_a \max\bigl(0, 1 - \sqrt{\mathrm{var}_a z + 10^{-4}}\bigr)
        + \frac{\gamma}{D} \sum_z \sum_{a \ne b} \mathrm{cov}(z)_{ab}^2

    Args:
        z1: ``(N, D)``, the first view. Of a single row or none the loss is NaN.
        z2: ``(N, D)``, the second view.
        sim_loss_weight: :math:`\alpha`.
        var_loss_weight: :math:`\beta`.
        cov_loss_weight: :math:`\gamma`.

    Returns:
        0-dim; float32 (float64 for float64 rows). With a process group variance and covariance are those of the rows
        of all ranks, the invariance term is this rank's.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: dtypes that differ or are not floating.

    Source: Bardes, Ponce, LeCun, ICLR 2022, arXiv:2105.04906; `vicreg_loss_func` of solo-learn.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.solo import vicreg_loss_func
        >>> vicreg_loss_func(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """
    z1, z2 = promoted(z1, z2)
    if (z1.shape[0] == 1 or are_empty(z1, z2)) and not is_gathered():
        return torch.nan * F.mse_loss(z1, z2)  # variances over N - 1 rows
    return vicreg_loss(
        z1,
        z2,
        sim_weight=sim_loss_weight,
        var_weight=2 * var_loss_weight,
        cov_weight=cov_loss_weight,
        group=world(),
    )


def _in_batch(query: Tensor, key: Tensor, temperature: float | Tensor) -> Tensor:
    """Return InfoNCE of unit rows; the keys of all ranks are candidates."""
    if not is_gathered() and is_small(query, query.shape[0] * key.shape[0]):
        logits = unit_rows(query) @ unit_rows(key).T / temperature
        return F.cross_entropy(logits, torch.arange(query.shape[0], device=query.device))
    return info_nce_loss(query, key, logit_scale=inverse(temperature, query), group=world())
