"""The loss of t-SimCLR."""

from __future__ import annotations

import torch

from ._dense import unit_rows


def student(squares, temperature, df):
    """Return ``1 + d**2 / (T df)``, whose power -(df + 1) / 2 is Student's kernel."""
    return 1 + squares / (temperature * df)


def t_simclr_loss(z0, z1, *, temperature=8.0, df=5.0, normalize=False):
    """Return ``e mean_i log q_{i, p(i)} + log sum_{i != j} q_ij^{-e}``.

    ``q = 1 + d**2 / (T df)`` and ``e = (df + 1) / 2``.

    Source: Hu et al. 2023, arXiv:2205.14814.
    """
    z0, z1, exponent = unit_rows(z0, normalize), unit_rows(z1, normalize), (df + 1) / 2
    attraction = student((z0 - z1).square().sum(1), temperature, df).log().mean()
    repulsion = student(torch.pdist(torch.cat([z0, z1])).square(), temperature, df).pow(-exponent).sum()
    return exponent * attraction + (2 * repulsion).log()
