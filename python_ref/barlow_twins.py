"""The loss of Barlow Twins."""

from __future__ import annotations

from ._dense import off_diagonal, unit_rows


def standard_columns(z, std="biased", std_eps=None):
    """Return the columns with mean 0 and variance 1; the variance over N plus 1e-5, or over N - 1.

    With std_eps they are divided by the deviation plus this number.
    """
    if std_eps is not None:
        return (z - z.mean(0)) / (z.std(0, correction=int(std == "unbiased")) + std_eps)
    variance = z.var(0, correction=1) if std == "unbiased" else z.var(0, correction=0) + 1e-5
    return (z - z.mean(0)) / variance.sqrt()


def barlow_twins_loss(z0, z1, *, lambd=0.0051, std="biased", std_eps=None, normalize=False):
    """Return ``sum_a (1 - C_aa)**2 + lambd sum_{a != b} C_ab**2``, C the cross-correlation of the columns.

    Source: Zbontar et al. 2021, arXiv:2103.03230, eq. 1.
    """
    first, second = (standard_columns(unit_rows(z, normalize), std, std_eps) for z in (z0, z1))
    correlation = first.mT @ second / len(z0)
    return (1 - correlation.diagonal()).square().sum() + lambd * off_diagonal(correlation).square().sum()
