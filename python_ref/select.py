"""The primitive of the losses that rank pairs: the most or least similar columns of each row."""

from __future__ import annotations

import torch

from ._dense import INFINITY
from ._pairs import different


def ranked(values, allowed, k):
    """The k largest allowed values of each row and their columns, ties to the lower column, NaN first.

    Places beyond the allowed ones hold -inf and -1.
    """
    values = values.detach().masked_fill(~allowed, -INFINITY)
    order = values.masked_fill(values.isnan(), INFINITY).sort(dim=1, descending=True, stable=True).indices[:, :k]
    found = values.gather(1, order)
    order = order.masked_fill(found == -INFINITY, -1)
    missing = (0, k - order.shape[1])
    pad = torch.nn.functional.pad
    return pad(found, missing, value=-INFINITY), pad(order, missing, value=-1)


def row_select(x, y=None, k=1, *, largest=True, x_ids=None, y_ids=None, exclude_diagonal=False):
    """The k largest or smallest allowed ``<x_i, y_j>`` of each row and their columns."""
    y, y_ids = (x, x_ids) if y is None else (y, y_ids)
    similarity = x @ y.mT
    allowed = torch.ones_like(similarity, dtype=torch.bool)
    if x_ids is not None:
        allowed = allowed & different(x_ids, y_ids)
    if exclude_diagonal:
        allowed = allowed & ~torch.eye(*allowed.shape, dtype=torch.bool, device=x.device)
    values, columns = ranked(similarity if largest else -similarity, allowed, k)
    return (values if largest else -values), columns
