"""False-negative cancellation: the function and its module."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import ContrastiveStats, Loss, SoftmaxArguments
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import SoftmaxOptions
from contrastive_kernels.losses._softmax import Positives, one_direction_loss
from contrastive_kernels.losses._views import check_views, other_views, stack_views
from contrastive_kernels.primitives import (
    Group,
    Identity,
    Pairs,
    Shards,
    checks,
    compute_dtype,
    gather_rows,
    kept_counts,
    over_ranks,
    row_dot,
    select_over,
    selecting_cutoff,
    sweep,
    unit_rows,
)

__all__ = ["FalseNegativeLoss", "false_negative_loss"]


class FalseNegativeArguments(SoftmaxArguments, total=False):
    """Keyword arguments of `false_negative_loss`."""

    mode: Literal["eliminate", "attract"]
    threshold: float | Tensor | None
    top_k: int | None
    factor: float
    logit_scale: float | Tensor | None
    ids: Tensor | None


@overload
def false_negative_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[FalseNegativeArguments],
) -> Loss: ...
@overload
def false_negative_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: Literal[True],
    **options: Unpack[FalseNegativeArguments],
) -> tuple[Loss, ContrastiveStats]: ...
@overload
def false_negative_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    return_stats: bool,
    **options: Unpack[FalseNegativeArguments],
) -> Loss | tuple[Loss, ContrastiveStats]: ...
@over_ranks
def false_negative_loss(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    mode: Literal["eliminate", "attract"] = "eliminate",
    threshold: float | Tensor | None = 0.7,
    top_k: int | None = 10,
    factor: float = 2.0,
    temperature: float | Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    group: Group | None = None,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    r"""Return NT-Xent without its likely false negatives, or with them as positives; no similarity matrix is stored.

    .. math::
        L &= \frac{c}{VN} \sum_i \Bigl[ \log \sum_{j \ne i,\ j \notin F(i)} e^{u_{ij}}
            - \frac{1}{V - 1} \sum_{p \in P(i)} u_{ip} \Bigr] && \text{eliminate} \\
        L &= \frac{c}{VN} \sum_i \Bigl[ \log \sum_{j \ne i} e^{u_{ij}}
            - \frac{1}{V - 1 + |F(i)|} \sum_{p \in P(i) \cup F(i)} u_{ip} \Bigr] && \text{attract}

    over the rows z of all views, P(i) the other views of i's sample, :math:`u_{ij} = \langle z_i, z_j \rangle / T`.
    Flagged, F(i), are the rows of other samples whose similarity to i is above the threshold and among the row's top_k
    largest. Flags have no gradient. With nothing flagged L is c times `nt_xent_loss`.

    Elimination is the paper's other mode, not verified against its code, which has attraction only, and scores a sample
    by the most similar of the anchor's views. Here every anchor scores for itself.

    Args:
        z0: ``(N, D)``, the first view; or all views as ``(N, V, D)``, samples first, with ``z1=None``.
        z1: ``(N, D)``, the second view.
        mode: ``"eliminate"`` or ``"attract"``.
        threshold: similarity above which a row may be flagged; float, ``(VN,)`` per anchor, view-major, or None.
        top_k: how many rows may be flagged, or None: all above the threshold, at the price of further sweeps to
            attract. Equal similarities: the lower row is flagged to attract; to eliminate, none that equals the largest
            one not flagged.
        factor: c; 2 as the official code, 1 for the mean over the anchors.
        temperature: T, float or 0-dim tensor (differentiable); 0.5 unless ``logit_scale`` is given.
        logit_scale: 1 / T instead.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; all times c.
        weight: ``(N,)`` per sample; the mean is then sum(w l) / sum(w).
        label_smoothing: share of the target spread over all kept candidates.
        ids: ``(N,)`` integers; other samples with the same id are neither negatives nor flagged.
        return_stats: also return `ContrastiveStats`, the positive being what is subtracted.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, by device.
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(VN,)`` for ``"none"``, first view first; float32 (float64 for float64 inputs). With
        ``return_stats`` the pair (loss, stats).

    Raises:
        ValueError: shapes that do not fit, an empty batch, temperature near or below 0, neither threshold nor top_k.
        TypeError: dtypes that differ or are not floating (ids and top_k: not integer).
        RuntimeError: tensors on different devices.

    Source: Huynh, Kornblith, Walter, Maire, Khademi, WACV 2022, arXiv:2011.11765.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> z0, z1 = torch.randn(2, 16, 8).unbind(0)
        >>> ck.false_negative_loss(z0, z1, mode="attract", threshold=0.5, top_k=3).shape
        torch.Size([])
    """
    v, n = check_views(z0, z1), z0.shape[0]
    checks.choice("mode", mode, ("eliminate", "attract"))
    factor = checks.number("factor", factor)
    if threshold is None and top_k is None:
        raise ValueError("threshold and top_k are both None; nothing says which negatives are false")
    if top_k is not None:
        top_k = checks.count("top_k", top_k)
    limit = checks.per_row("threshold", threshold, z0.new_empty(1).expand(v * n))
    ids = checks.optional_ids("ids", ids, n, z0)
    options = SoftmaxOptions.of(
        z0,
        temperature=temperature,
        logit_scale=logit_scale,
        default_temperature=0.5,
        reduction=reduction,
        weight=weight,
        label_smoothing=label_smoothing,
        return_stats=return_stats,
        backend=backend,
        group=group,
    )
    shards = options.shards
    ids = (shards.positions(n, z0.device) if ids is None else ids).repeat(v)
    limit = None if limit is None else limit.detach()

    views = unit_rows(stack_views(z0, z1), normalize, backend)
    z, similarities = views.flatten(0, 1), other_views(views, backend)
    positives = Positives.several(options.scale * similarities)
    if mode == "eliminate":
        if top_k is not None:
            boundary = selecting_cutoff(
                z.detach(), None, top_k, largest=True, x_ids=ids, backend=backend, shards=shards
            )
            limit = boundary if limit is None else torch.maximum(limit, boundary)
        pairs = Pairs(ids, cutoff=limit)
    else:
        flagged, counts = _flagged(z, v, ids, limit, top_k, backend, shards)
        target = options.scale * ((similarities.sum(1) + flagged) / (v - 1 + counts))
        positives = positives._replace(target=target)
        pairs = Pairs(ids)
    out = one_direction_loss(z, None, pairs, positives, options)
    return (factor * out[0], out[1]) if isinstance(out, tuple) else factor * out


class FalseNegativeLoss(LossModule):
    """`false_negative_loss` as a module.

    Args:
        temperature: 0.5 unless ``logit_scale`` is given; an ``nn.Parameter`` is trained.
        options: further keyword arguments of `false_negative_loss`.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.FalseNegativeLoss(0.1, mode="attract")(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(false_negative_loss)

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        *,
        return_stats: bool = False,
        **options: Unpack[FalseNegativeArguments],
    ) -> None:
        super().__init__(temperature=temperature, return_stats=return_stats, **options)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ContrastiveStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, ids, threshold."""
        return self.function(z0, z1, **self.options(**inputs))


def _flagged(
    z: Tensor,
    v: int,
    ids: Tensor,
    limit: Tensor | None,
    top_k: int | None,
    backend: str | None,
    shards: Shards,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the similarities of each row of z to its flagged rows, and their number."""
    if top_k is None:
        # Negating z turns `s <= cutoff` into `s > limit`.
        assert limit is not None
        kept = Pairs(ids, ids, -limit.nextafter(torch.full_like(limit, torch.inf)))
        turned = -z
        sums = sweep(turned, z, kept, term=Identity(), exponents=(), backend=backend, shards=shards).row_sum
        return -sums, kept_counts(turned, z, kept, backend, shards)
    values, columns = select_over(shards, z, None, top_k, x_ids=ids, views=v)
    flags = columns >= 0 if limit is None else values > limit[:, None]
    total = torch.zeros(z.shape, dtype=compute_dtype(z), device=z.device)
    # Rows are added up before the product, one rank at a time: nothing of size N * top_k * D is stored.
    for column, flag in zip(columns.clamp(min=0).unbind(1), flags.unbind(1), strict=True):
        rows = gather_rows(z, column) if shards.alone else shards.rows_at(z, column, v)
        total = total + rows.to(total.dtype).masked_fill(~flag[:, None], 0)
    return row_dot(z, total), flags.sum(1).to(total.dtype)
