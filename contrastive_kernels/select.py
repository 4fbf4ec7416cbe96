"""The most or least similar columns of every row: in C++ on a CPU, elsewhere plain PyTorch, a tile at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from contrastive_kernels import checks
from contrastive_kernels.backends import choose_backend
from contrastive_kernels.operators import operator
from contrastive_kernels.similarity import autocast
from contrastive_kernels.sweep import compute_dtype

__all__ = ["row_select"]

# Columns and elements of one tile of similarities; about eight tensors of that size live at a time. A GPU needs larger
# tiles, because the time to launch an operation does not depend on its size.
TILE_COLUMNS = 1 << 13
TILE_ELEMENTS = {"cpu": 1 << 20}
TILE_ELEMENTS_ELSEWHERE = 1 << 23


def wide_products(x: Tensor) -> AbstractContextManager:
    """Matrix products on the device of x in the dtype of their operands, also under autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@torch.no_grad()
def row_select(
    x: Tensor,
    y: Tensor | None = None,
    k: int = 1,
    *,
    largest: bool = True,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    exclude_diagonal: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The k largest (or smallest) similarities of every row and their columns, without the N x M matrix.

    .. math:: v_{i1} \ge v_{i2} \ge \dots \ge v_{ik}, \qquad v_{ir} = \langle x_i, y_{c_{ir}} \rangle

    over the allowed columns; equal similarities go to the lowest column. Not differentiable: recompute the similarity
    of a selected pair where its gradient is wanted.

    Args:
        x: ``(N, D)``, float16, bfloat16, float32 or float64; taken as it is, not normalised.
        y: ``(M, D)``, or None for x against itself.
        k: how many columns of each row, at least 1; may exceed M.
        largest: the largest similarities first, or the smallest first.
        x_ids: ``(N,)`` integers; a pair with equal ids is not allowed. With ``y=None`` they serve both sides.
        y_ids: ``(M,)`` integers; given exactly when ``x_ids`` and ``y`` are.
        exclude_diagonal: pairs (i, i) are not allowed either.

    Returns:
        values ``(N, k)``, float32 (float64 for float64 inputs), and columns ``(N, k)`` int64. Where a row has fewer
        than k allowed columns, the value is ``-inf`` (``inf`` for the smallest) and the column -1. A NaN similarity
        comes first either way, so that it is not overlooked.

    Raises:
        ValueError: shapes that do not fit, or k below 1.
        TypeError: dtypes that differ or are not floating (ids and k: not integer).
        RuntimeError: tensors on different devices.

    Source: exhaustive nearest-neighbour search; serves NNCLR, false-negative cancellation and easy negatives.

    Example:
        >>> x, y = torch.randn(8, 4), torch.randn(100, 4)
        >>> values, columns = row_select(x, y, k=3)
        >>> columns.shape
        torch.Size([8, 3])
    """
    x_ids, y_ids = checks.primitive(x, y, x_ids, y_ids, None)
    check_count("k", k)
    x, y = autocast(x), None if y is None else autocast(y)
    if choose_backend(x) == "cpp":
        return operator("cpp", "select")(x, y, k, largest, x_ids, y_ids, exclude_diagonal)
    dtype = compute_dtype(x)
    x = x.to(dtype)
    y, y_ids = (x, x_ids) if y is None else (y.to(dtype), y_ids)
    n, m = x.shape[0], y.shape[0]
    width = max(1, min(m, TILE_COLUMNS))
    height = max(1, TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS_ELSEWHERE) // width)
    # The smallest similarities are the largest of -x.
    x = x if largest else -x
    values = x.new_full((n, k), -torch.inf)
    columns = torch.full((n, k), -1, dtype=torch.int64, device=x.device)
    with wide_products(x):
        for top in range(0, n, height):
            rows = slice(top, min(top + height, n))
            best = where = None
            for left in range(0, m, width):
                similarity = x[rows] @ y[left : left + width].T
                tile = rows, slice(left, left + similarity.shape[1])
                dropped = _dropped(*tile, x_ids, y_ids, exclude_diagonal, x.device)
                if dropped is not None:
                    similarity = similarity.masked_fill(dropped, -torch.inf)
                chosen = _leading(similarity, k)
                found, index = similarity.gather(1, chosen), left + chosen
                if best is not None:
                    # What came before stands first: of equal similarities it has the lower columns.
                    found, index = torch.cat([best, found], 1), torch.cat([where, index], 1)
                    chosen = _leading(found, k)
                    found, index = found.gather(1, chosen), index.gather(1, chosen)
                best, where = found, index
            if best is not None:
                values[rows, : best.shape[1]], columns[rows, : where.shape[1]] = best, where
    columns = columns.masked_fill(values == -torch.inf, -1)
    return values if largest else -values, columns


def check_count(name: str, value: object) -> None:
    """A number of columns."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} {value} must be at least 1")


def _dropped(
    rows: slice,
    columns: slice,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    exclude_diagonal: bool,
    device: torch.device,
) -> Tensor | None:
    """The mask of the pairs of a tile that are not allowed, None when all are."""
    dropped = None if x_ids is None else x_ids[rows, None] == y_ids[columns]
    # Most tiles hold no pair (i, i).
    if exclude_diagonal and rows.start < columns.stop and columns.start < rows.stop:
        row = torch.arange(rows.start, rows.stop, device=device)
        diagonal = row[:, None] == torch.arange(columns.start, columns.stop, device=device)
        dropped = diagonal if dropped is None else dropped | diagonal
    return dropped


def _leading(key: Tensor, k: int) -> Tensor:
    """The positions of the k largest entries (or all) of each row in order, equal ones by position, NaN first."""
    width = key.shape[1]
    k = min(k, width)
    if k == 1:
        return key.argmax(1, keepdim=True)
    key = key.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if k == width:
        return key.sort(dim=1, descending=True, stable=True).indices
    # topk leaves open which of several entries that equal the last one it takes: those are looked up anew.
    values, positions = key.topk(k, 1)
    last = values[:, -1:]
    countdown = torch.arange(width, 0, -1, dtype=key.dtype, device=key.device)
    first_equal = width - torch.where(key == last, countdown, 0).topk(k, 1).values.to(torch.int64)
    above = values > last
    rank = torch.arange(k, device=key.device) - above.sum(1, keepdim=True)
    positions = torch.where(above, positions, first_equal.gather(1, rank.clamp(min=0)))
    # Equal entries above the last one stand in any order yet.
    positions = positions.sort(dim=1).values
    order = key.gather(1, positions).sort(dim=1, descending=True, stable=True).indices
    return positions.gather(1, order)
