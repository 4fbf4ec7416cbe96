"""The uniformity loss."""

from __future__ import annotations

import math

import torch

from ._dense import unit_rows


def uniformity_loss(z, *, t=2.0, normalize=False):
    """Return ``log mean_{i < j} exp(-t |z_i - z_j|**2)``.

    Source: Wang & Isola 2020, arXiv:2005.10242.
    """
    squares = torch.pdist(unit_rows(z, normalize)).square()
    return (-t * squares).logsumexp(0) - math.log(len(squares))
