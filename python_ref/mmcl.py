"""MMCL: a support vector machine per anchor, each with its own (N - 1) x (N - 1) matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._dense import reduce, unit_rows


class DualStatistics(NamedTuple):
    """Figures of the dual solutions; objective and residual have one number per anchor."""

    zero_fraction: torch.Tensor
    bound_fraction: torch.Tensor
    objective: torch.Tensor
    kkt_residual: torch.Tensor
    iterations: torch.Tensor


def mmcl_kernel(x, y, kernel="rbf", sigma=50.0):
    """Return ``K(x_i, y_j)`` of unit rows."""
    if kernel == "min":
        return torch.minimum(x.relu()[:, None], y.relu()[None, :]).sum(-1)
    s = x @ y.mT
    return {
        "rbf": lambda: torch.exp(-(2 - 2 * s) / sigma),
        "linear": lambda: s,
        "poly": lambda: (s + 0.5) ** 3,
        "tanh": lambda: torch.tanh(sigma * s),
    }[kernel]()


def others(n):
    """Return the indices of all rows but i, (N, N - 1)."""
    return torch.arange(n).expand(n, n)[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1)


def mmcl_matrices(K, kxx="one", reg=0.1):
    """Return ``Delta_i[a, b] = K_ab + kappa_i - K_ia - K_ib + reg [a = b]`` over a, b != i, (N, N - 1, N - 1)."""
    n = len(K)
    matrices = []
    for i, keep in enumerate(others(n)):
        kappa = 1.0 if kxx == "one" else K[i, i]
        own = K[i, keep]
        matrices.append(K[keep][:, keep] + kappa - own[:, None] - own[None, :] + reg * torch.eye(n - 1).to(K))
    return torch.stack(matrices)


def box(alpha, C):
    """Clamp alpha to [0, C], to [0, inf) for C = -1."""
    return alpha.clamp(min=0) if C == -1 else alpha.clamp(0, C)


def kkt_residual(delta, alpha, C):
    """Return ``max |alpha - clamp(alpha - (Delta alpha - 2), 0, C)|`` of each anchor."""
    return (alpha - box(alpha - ((delta @ alpha[..., None])[..., 0] - 2), C)).abs().amax(1)


def mmcl_pgd(delta, alpha, C, use_norm, eta, nesterov, a0, stop, tolerance, max_iterations):
    """Return the coefficients by projected gradient descent, as in the official code, and the number of iterations."""
    step = 1 / torch.linalg.matrix_norm(delta)[:, None] if use_norm else eta
    y, a = alpha, a0
    for iteration in range(max_iterations):
        if stop == "kkt" and kkt_residual(delta, alpha, C).max() <= tolerance:
            return alpha, iteration
        new = box(y - step * ((delta @ y[..., None])[..., 0] - 2), C)
        following = 0.5 * ((a**4 + 4 * a**2) ** 0.5 - a**2)
        y = new + (a * (1 - a) / (a**2 + following) if nesterov else 0.0) * (new - alpha)
        change = ((new - alpha) / (alpha + 1e-7)).abs().mean()
        alpha, a = new, following
        if stop == "change" and change <= tolerance:
            return alpha, iteration + 1
    return alpha, max_iterations


def mmcl_loss(
    z0, z1, *, kernel="rbf", sigma=50.0, gamma=None, C=100.0, reg=0.1, kxx="one", solver="inverse", use_norm=True,
    eta=1e-3, nesterov=True, alpha0=None, a0=1.0, stop="kkt", tolerance=1e-4, max_iterations=1000, block_size=None,
    normalize=True, reduction="mean", weight=None, return_stats=False,
):  # fmt: skip
    """Return the mean of ``sum_{a != i} alpha_ia K(x_a, z_i) - sum_a alpha_ia K(x_i, z_i)``, alpha_i constant.

    Source: Shah, Sra, Chellappa, Cherian 2022.
    """
    sigma = 1 / z0.shape[1] if gamma == "auto" else sigma
    views = unit_rows(z0, normalize), unit_rows(z1, normalize)
    options = (C, use_norm, eta, nesterov, a0, stop, tolerance, max_iterations)
    losses, alphas, objectives, residuals, most = [], [], [], [], 0
    for x, z in zip(*(view.split(block_size or len(view)) for view in views), strict=True):
        n, keep = len(x), others(len(x))
        with torch.no_grad():
            delta = mmcl_matrices(mmcl_kernel(x, x, kernel, sigma), kxx, reg)
            # one at a time: the LU factorisation of a large batch never ends in torch 2.13 on several threads
            twos = torch.full((n - 1,), 2.0).to(x)
            inverse = box(torch.stack([torch.linalg.solve(matrix, twos) for matrix in delta]), C)
            alpha, iterations = inverse, 0
            if solver == "pgd" and n > 1:
                start = inverse if alpha0 is None else box(alpha0.to(x).gather(1, keep), C)
                alpha, iterations = mmcl_pgd(delta, start, *options)
            objectives.append(0.5 * torch.einsum("ia,iab,ib->i", alpha, delta, alpha) - 2 * alpha.sum(1))
            residuals.append(kkt_residual(delta, alpha, C) if n > 1 else torch.zeros(1).to(x))
        K12 = mmcl_kernel(x, z, kernel, sigma)
        losses.append((alpha * K12.mT.gather(1, keep)).sum(1) - alpha.sum(1) * K12.diagonal())
        alphas.append(alpha.flatten())
        most = max(most, iterations)
    loss = reduce(torch.cat(losses), reduction, weight)
    if not return_stats:
        return loss
    alpha = torch.cat(alphas)
    statistics = DualStatistics(
        (alpha == 0).to(alpha).sum() / max(len(alpha), 1),
        (alpha == C).to(alpha).sum() / (alpha > 0).sum().clamp(min=1),
        torch.cat(objectives),
        torch.cat(residuals),
        torch.tensor(most),
    )
    return loss, statistics
