"""The most or least similar columns of each row of a similarity matrix."""

from __future__ import annotations

import torch

from ._dense import INFINITY
from ._pairs import different


def rank(values, allowed, k):
    """Return the k largest allowed values of each row and their columns.

    A tie goes to the lower column, NaN is largest. A row with fewer values ends in values -inf and columns -1.
    """
    values = values.detach().masked_fill(~allowed, -INFINITY)
    order = values.masked_fill(values.isnan(), INFINITY).sort(dim=1, descending=True, stable=True).indices[:, :k]
    found = values.gather(1, order)
    order = order.masked_fill(found == -INFINITY, -1)
    missing = (0, k - order.shape[1])
    pad = torch.nn.functional.pad
    return pad(found, missing, value=-INFINITY), pad(order, missing, value=-1)


def row_select(x, y=None, k=1, *, largest=True, x_ids=None, y_ids=None, exclude_diagonal=False):
    """Return the k largest or smallest allowed ``<x_i, y_j>`` of each row and their columns."""
    y, y_ids = (x, x_ids) if y is None else (y, y_ids)
    similarity = x @ y.mT
    allowed = torch.ones_like(similarity, dtype=torch.bool)
    if x_ids is not None:
        allowed = allowed & different(x_ids, y_ids)
    if exclude_diagonal:
        allowed = allowed & ~torch.eye(*allowed.shape, dtype=torch.bool, device=x.device)
    values, columns = rank(similarity if largest else -similarity, allowed, k)
    return (values if largest else -values), columns
