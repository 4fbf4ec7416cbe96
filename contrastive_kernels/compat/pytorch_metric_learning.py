"""Losses of pytorch-metric-learning: ``from contrastive_kernels.compat import pytorch_metric_learning as losses``.

The classes derive from those of the library: distances, reducers, regularizers and records are theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_kernels.compat._peer import forwarding, import_peer, warn_dense
from contrastive_kernels.compat._small import is_small, scalar
from contrastive_kernels.losses import sup_con_loss
from contrastive_kernels.losses._options import softplus
from contrastive_kernels.primitives import unit_rows

__all__ = ["CrossBatchMemory", "NTXentLoss", "SupConLoss"]

_DISTRIBUTION = "pytorch-metric-learning"
_losses: Any = import_peer("pytorch_metric_learning.losses", _DISTRIBUTION)
_distances: Any = import_peer("pytorch_metric_learning.distances", _DISTRIBUTION)
_reducers: Any = import_peer("pytorch_metric_learning.reducers", _DISTRIBUTION)
_common: Any = import_peer("pytorch_metric_learning.utils.common_functions", _DISTRIBUTION)

__getattr__ = forwarding(__name__, _DISTRIBUTION, "pytorch_metric_learning.losses")


class NTXentLoss(_losses.NTXentLoss):
    r"""Each positive pair of an anchor alone against the anchor's negatives; no matrix of pairs with negatives.

    .. math:: L = \frac{1}{|P|} \sum_{(i, p) \in P} \log\Bigl(1 + \sum_{n \in \mathrm{Neg}(i)} e^{u_{in} - u_{ip}}\Bigr)

    where P are all pairs of equal labels, and Neg(i) are the rows of other labels.

    Args:
        temperature: T.
        kwargs: distance, reducer, embedding_regularizer and what else the class of the library takes.

    Source: Chen et al. 2020, arXiv:2002.05709, with several positives as in pytorch-metric-learning.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.pytorch_metric_learning import NTXentLoss
        >>> NTXentLoss(temperature=0.1)(torch.randn(16, 8), torch.randint(4, (16,))).shape  # doctest: +SKIP
        torch.Size([])
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
    ) -> dict[str, Any]:
        """Return the mean, or what the reducer makes of the pairs."""
        batch = _batch(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if batch is None:
            dense: dict[str, Any] = super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            return dense
        return _loss_dict(self, _pairwise_loss(batch), None, "already_reduced")


class SupConLoss(_losses.SupConLoss):
    r"""Each anchor towards the mean of its positives, among all other rows; no N x N matrix.

    .. math:: L_i = \log \sum_{j \ne i} e^{u_{ij}} - \frac{1}{k_i} \sum_{p \in P(i)} u_{ip}

    where P(i) are the :math:`k_i` other rows of the anchor's label; 0 where there are none.

    Args:
        temperature: T.
        kwargs: distance, reducer, embedding_regularizer and what else the class of the library takes.

    Source: Khosla et al. 2020, arXiv:2004.11362, eq. 2.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.pytorch_metric_learning import SupConLoss
        >>> SupConLoss(temperature=0.1)(torch.randn(16, 8), torch.randint(4, (16,))).shape  # doctest: +SKIP
        torch.Size([])
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor | None
    ) -> dict[str, Any]:
        """Return the loss of every anchor."""
        batch = _batch(self, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if batch is None:
            dense: dict[str, Any] = super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            return dense
        return _loss_dict(self, _anchor_losses(batch), _common.torch_arange_from_size(embeddings), "element")


class CrossBatchMemory(_losses.CrossBatchMemory):
    """A loss of the batch against the rows of earlier batches, the batch among them.

    Args:
        loss: `NTXentLoss` or `SupConLoss` of this module; with another loss it is the memory of the library.
        embedding_size: D.
        memory_size: the number of rows that are kept.
        miner: makes pairs or triplets, which only the library's code takes.
        kwargs: what else the class of the library takes.

    Source: Wang et al. 2020, arXiv:1912.06798.

    Example:
        >>> import torch
        >>> from contrastive_kernels.compat.pytorch_metric_learning import CrossBatchMemory, NTXentLoss
        >>> memory = CrossBatchMemory(NTXentLoss(), embedding_size=8)  # doctest: +SKIP
        >>> memory(torch.randn(16, 8), torch.randint(4, (16,))).shape  # doctest: +SKIP
        torch.Size([])
    """

    embedding_memory: Tensor
    label_memory: Tensor

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        enqueue_mask: Tensor | None = None,
    ) -> Any:
        """Enqueue the batch; return its loss against the memory, where a row and its own copy are no pair."""
        n, option = len(embeddings), self._dense_option(embeddings, indices_tuple, enqueue_mask)
        if option is not None or n == 0:
            if option is not None:
                warn_dense(type(self).__name__, option)
            return super().forward(embeddings, labels, indices_tuple, enqueue_mask)
        assert n <= len(self.embedding_memory), "the batch must not be larger than the memory"
        self.reset_stats()
        device = embeddings.device
        labels = _common.to_device(labels, device=device)
        self.embedding_memory = _common.to_device(self.embedding_memory, device=device, dtype=embeddings.dtype)
        self.label_memory = _common.to_device(self.label_memory, device=device, dtype=labels.dtype)
        self.add_to_memory(embeddings, labels, n)
        filled = self.memory_size if self.has_been_filled else self.queue_idx
        # of a batch of one row the library keeps the pair with its copy
        own = _OwnCopies(self.curr_batch_idx if n > 1 else None)
        return self.loss(embeddings, labels, own, self.embedding_memory[:filled], self.label_memory[:filled])

    def _dense_option(self, embeddings: Tensor, indices_tuple: Any, enqueue_mask: Tensor | None) -> str | None:
        given = {"miner": self.miner, "indices_tuple": indices_tuple, "enqueue_mask": enqueue_mask}
        for name, value in given.items():
            if value is not None:
                return name
        if not isinstance(self.loss, (NTXentLoss, SupConLoss)):
            return "a loss that is not of contrastive_kernels.compat.pytorch_metric_learning"
        return (
            _overridden(self, _losses.CrossBatchMemory, "create_indices_tuple")
            or _overridden(self.loss, _ours(self.loss), "forward", "compute_loss")
            or _dense_option(self.loss)
        )


class _OwnCopies(NamedTuple):
    """What a memory passes in place of indices: all pairs, but for an anchor and its copy."""

    places: Tensor | None  # (N,): where the copies are; None: all pairs


@dataclass(frozen=True)  # torch.compile of older versions reads no property of a NamedTuple
class _Batch:
    """The rows of a loss, and the pairs that are none."""

    anchors: Tensor  # (N, D)
    labels: Tensor  # (N,)
    references: Tensor | None  # (M, D); None: the anchors
    reference_labels: Tensor  # (M,)
    own: Tensor | None  # (N,): the reference that is the anchor itself; None: there is none
    normalize: bool
    temperature: float | Tensor

    @property
    def size(self) -> int:
        """The number of similarities."""
        return len(self.labels) * len(self.reference_labels)


def _ours(loss: Any) -> type:
    """Return the class of this module that a loss is of."""
    return NTXentLoss if isinstance(loss, NTXentLoss) else SupConLoss


def _overridden(module: Any, base: type, *names: str) -> str | None:
    """Return which of these methods a subclass has of its own, None if it has the base's."""
    for name in names:
        if getattr(type(module), name) is not getattr(base, name):
            return f"a {name} of a subclass"
    return None


def _dense_option(loss: Any) -> str | None:
    """Return the option of a loss that only the library's own code has, None if ours has all."""
    distance, reducer = loss.distance, loss.reducer
    overridden = _overridden(loss, _ours(loss), "_compute_loss", "pair_based_loss", "mat_based_loss")
    if overridden is not None:
        return overridden
    if type(distance) not in (_distances.CosineSimilarity, _distances.DotProductSimilarity):
        return f"distance={type(distance).__name__}()"
    if distance.p != 2 or distance.power != 1 or not distance.is_inverted:
        return "another p, power or is_inverted of the distance"
    if distance.collect_stats:
        return "collect_stats of the distance"
    if isinstance(loss, NTXentLoss):
        if type(reducer) is _reducers.MultipleReducers:  # one for the loss, one for a regularizer
            named = dict(reducer.reducers.items())
            reducer = named.get("loss", reducer.default_reducer)
        if type(reducer) is not _reducers.MeanReducer:
            return f"reducer={type(reducer).__name__}()"
        if reducer.collect_stats:
            return "collect_stats of the reducer"
    return None


def _batch(
    loss: Any,
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: Any,
    ref_emb: Tensor,
    ref_labels: Tensor | None,
) -> _Batch | None:
    """Return what our losses take; None where the library computes the loss, with a warning if an option is why."""
    given = None if isinstance(indices_tuple, _OwnCopies) else indices_tuple
    rows = (embeddings, ref_emb)
    if labels is None or any(x.dim() != 2 or not x.is_floating_point() or x.numel() == 0 for x in rows):
        return None
    if embeddings.dtype != ref_emb.dtype or embeddings.shape[1] != ref_emb.shape[1]:
        return None
    if ref_labels is None and len(ref_emb) != len(labels):
        return None
    option = _dense_option(loss) if given is None else "indices_tuple"
    if option is not None:
        warn_dense(type(loss).__name__, option)
        return None
    own = None
    if isinstance(indices_tuple, _OwnCopies):
        own = indices_tuple.places
    elif ref_labels is None or ref_labels is labels:
        # the library, too, knows a batch with itself by the object of its labels
        own = torch.arange(len(labels), device=labels.device)
    of_itself = ref_emb is embeddings and own is not None
    return _Batch(
        embeddings,
        labels,
        None if of_itself else ref_emb,
        labels if ref_labels is None else ref_labels,
        own,
        loss.distance.normalize_embeddings,
        scalar(loss.temperature),
    )


def _loss_dict(loss: Any, losses: Tensor | None, indices: Tensor | None, reduction_type: str) -> dict[str, Any]:
    """Return the losses as the reducer takes them; without losses, its zero."""
    if losses is None:
        zero: dict[str, Any] = loss.zero_losses()
        return zero
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": reduction_type}}


def _is_zero(positives: int, negatives: int) -> bool:
    """Return whether so many pairs make the loss the library's zero."""
    return positives == 0 or negatives == 0 or positives == negatives == 1


def _pairwise_loss(batch: _Batch) -> Tensor | None:
    """Return the mean over the positive pairs; None: zero."""
    if not is_small(batch.anchors, batch.size):
        classes = _classes(batch)
        return None if classes is None else _sup_con(batch, classes.ids, "pairwise", "mean")
    logits, positive, negative = _matrices(batch)
    i, j = positive.nonzero(as_tuple=True)
    if _is_zero(len(i), int(negative.sum())):
        return None
    negative_lse = logits.masked_fill(~negative, -torch.inf).logsumexp(1)
    return softplus(negative_lse[i] - logits[i, j]).mean()


def _anchor_losses(batch: _Batch) -> Tensor | None:
    """Return the loss of every anchor; None: zero."""
    if not is_small(batch.anchors, batch.size):
        return _swept_anchor_losses(batch)
    logits, positive, negative = _matrices(batch)
    number = positive.sum(1)
    if _is_zero(int(number.sum()), int(negative.sum())):
        return None
    # rounded as the library's: its default reducer leaves out the losses that are exactly 0
    logits = logits - logits.detach().amax(1, keepdim=True)
    lse = logits.masked_fill(~(positive | negative), -torch.inf).logsumexp(1)
    mean = (logits * positive).sum(1) / number.clamp(min=1)
    return (lse - mean).masked_fill(number == 0, 0)


def _swept_anchor_losses(batch: _Batch) -> Tensor | None:
    """Return the same from sweeps."""
    classes = _classes(batch)
    if classes is None:
        return None
    losses = _sup_con(batch, classes.ids, "out", "none")
    # A single positive far above the negatives leaves a loss below the rounding of its logit, of any sign.
    eps = torch.finfo(losses.dtype).eps
    small = (losses.detach() < eps**0.5) & (classes.positives == 1)
    if bool(small.any()):
        losses = torch.where(small, _sup_con(batch, classes.ids, "in", "none"), losses)
        # The library's is then 0, and its default reducer leaves out such losses.
        losses = losses.masked_fill(losses <= eps / 2, 0)
    return losses


def _matrices(batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of few rows, and which of them are those of positives and of negatives."""
    anchors = unit_rows(batch.anchors, batch.normalize)
    references = anchors if batch.references is None else unit_rows(batch.references, batch.normalize)
    same = batch.labels[:, None] == batch.reference_labels
    positive = same if batch.own is None else same.scatter(1, batch.own[:, None], False)
    return anchors @ references.T / batch.temperature, positive, ~same


class _Classes(NamedTuple):
    """The classes of a batch."""

    ids: Tensor  # (N + M,), of the anchors, then of the references; (N,) of a batch of itself
    positives: Tensor  # (N,): how many an anchor has


def _classes(batch: _Batch) -> _Classes | None:
    """Return the classes of labels of any dtype; None where the number of pairs makes the loss zero."""
    n, itself = len(batch.labels), batch.references is None
    labels = batch.labels if itself else torch.cat([batch.labels, batch.reference_labels])
    classes, ids = labels.unique(return_inverse=True)
    equal = ids[0 if itself else n :].bincount(minlength=len(classes))[ids[:n]]
    positives = equal if batch.own is None else equal - 1
    if _is_zero(int(positives.sum()), batch.size - int(equal.sum())):
        return None
    return _Classes(ids, positives)


def _sup_con(batch: _Batch, ids: Tensor, positives: Any, reduction: str) -> Tensor:
    """Return `sup_con_loss` of a batch."""
    n = len(batch.labels)
    others: dict[str, Any] = {}
    if batch.references is not None:
        others = dict(contrast_features=batch.references, contrast_labels=ids[n:], exclude=batch.own)
    loss: Tensor = sup_con_loss(
        batch.anchors,
        ids[:n],
        logit_scale=1 / batch.temperature,
        positives=positives,
        normalize=batch.normalize,
        reduction=reduction,
        **others,
    )
    return loss
