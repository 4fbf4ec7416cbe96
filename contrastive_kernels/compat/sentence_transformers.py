"""The ranking losses of sentence-transformers: ``from contrastive_kernels.compat import sentence_transformers``.

The classes derive from those of the library: validation, configuration, citation and gradient caching are theirs.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import deprecated

from contrastive_kernels.compat._peer import forwarding, import_peer, warn_dense
from contrastive_kernels.compat._small import is_small
from contrastive_kernels.losses._options import SoftmaxOptions
from contrastive_kernels.losses._softmax import (
    Negatives,
    Positives,
    list_negatives,
    one_direction_loss,
    softmax_value,
    sweep_both_directions,
    sweep_negatives,
    union,
)
from contrastive_kernels.primitives import ALONE, Pairs, cast_for_autocast, compute_dtype, row_dot, unit_rows

__all__ = [
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]

_DISTRIBUTION = "sentence-transformers"
_LOSSES = "sentence_transformers.sentence_transformer.losses"
_losses: Any = import_peer(_LOSSES, _DISTRIBUTION)
_plain: Any = import_peer(f"{_LOSSES}.multiple_negatives_ranking", _DISTRIBUTION)
_cached: Any = import_peer(f"{_LOSSES}.cached_multiple_negatives_ranking", _DISTRIBUTION)
_util: Any = import_peer("sentence_transformers.util", _DISTRIBUTION)

__getattr__ = forwarding(__name__, _DISTRIBUTION, _LOSSES)


class MultipleNegativesRankingLoss(_losses.MultipleNegativesRankingLoss):
    r"""In-batch negatives, one positive document and any number of hard negatives for each query; no N x N matrix.

    .. math:: L = \frac1N \sum_i \bigl[ \log Z_i - s \langle q_i, d_i \rangle \bigr]

    where :math:`Z_i` sums ``exp(s <., .>)`` over the documents, and over the further directions that are chosen.

    Args and errors are those of the class of sentence-transformers.

    Source: Henderson et al. 2017, arXiv:1705.00652; directions as in Li et al. 2023, arXiv:2308.03281; hardness as in
    Lan et al. 2025, arXiv:2503.04812.

    Example:
        >>> from contrastive_kernels.compat.sentence_transformers import MultipleNegativesRankingLoss
        >>> loss = MultipleNegativesRankingLoss(model)  # doctest: +SKIP
        >>> SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()  # doctest: +SKIP
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Return the loss of queries, their documents, and the hard negatives of each query."""
        if not _is_fused(self, embeddings):
            dense: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return dense
        return _ranking_loss(self, embeddings, _plain)


class CachedMultipleNegativesRankingLoss(_losses.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` with the activations of one mini-batch in memory.

    The mini-batches are those of the encoder alone: the loss is taken from the whole batch at once, in no more memory.

    Example:
        >>> from contrastive_kernels.compat.sentence_transformers import CachedMultipleNegativesRankingLoss
        >>> loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)  # doctest: +SKIP
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of the mini-batches of every column; after its backward, if asked for, and detached."""
        embeddings = [torch.cat(parts) for parts in reps]
        if not _is_fused(self, embeddings):
            dense: Tensor = super().calculate_loss(reps, labels, with_backward=with_backward)
            return dense
        loss = _ranking_loss(self, embeddings, _cached)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


_MERGED = "is deprecated: use {} with directions=('query_to_doc', 'doc_to_query'), partition_mode='per_direction'"

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # to derive from a deprecated class warns, too

    @deprecated("MultipleNegativesSymmetricRankingLoss " + _MERGED.format("MultipleNegativesRankingLoss"))
    class MultipleNegativesSymmetricRankingLoss(
        _losses.MultipleNegativesSymmetricRankingLoss, MultipleNegativesRankingLoss
    ):
        """The mean of the losses of both directions: deprecated by sentence-transformers.

        Example:
            >>> from contrastive_kernels.compat.sentence_transformers import MultipleNegativesSymmetricRankingLoss
            >>> loss = MultipleNegativesSymmetricRankingLoss(model)  # doctest: +SKIP
        """

    @deprecated("CachedMultipleNegativesSymmetricRankingLoss " + _MERGED.format("CachedMultipleNegativesRankingLoss"))
    class CachedMultipleNegativesSymmetricRankingLoss(
        _losses.CachedMultipleNegativesSymmetricRankingLoss, CachedMultipleNegativesRankingLoss
    ):
        """The mean of the losses of both directions, cached: deprecated by sentence-transformers.

        Example:
            >>> from contrastive_kernels.compat.sentence_transformers import CachedMultipleNegativesSymmetricRankingLoss
            >>> loss = CachedMultipleNegativesSymmetricRankingLoss(model)  # doctest: +SKIP
        """


def _is_fused(loss: Any, embeddings: list[Tensor]) -> bool:
    """Return whether the loss is ours; warn where the peer's stores the similarities."""
    name = type(loss).__name__
    if loss.similarity_fct is not _util.cos_sim and loss.similarity_fct is not _util.dot_score:
        warn_dense(name, "another similarity_fct than cos_sim and dot_score")
        return False
    if any(x.layout != torch.strided for x in embeddings):
        warn_dense(name, "sparse embeddings")
        return False
    if loss.partition_mode != "joint" and {"query_to_query", "doc_to_doc"} & set(loss.directions):
        warn_dense(name, "partition_mode='per_direction' of directions without the positive")
        return False
    # what is left is an error of the peer, or nothing to sweep
    first = embeddings[0]
    alike = (x.shape == first.shape and x.dtype == first.dtype and x.device == first.device for x in embeddings)
    return len(embeddings) > 1 and first.dim() == 2 and first.is_floating_point() and first.numel() > 0 and all(alike)


@dataclass(frozen=True)  # torch.compile of older versions reads no property of a NamedTuple
class _Batch:
    """The rows of all ranks as they enter the similarities; those of this rank are the anchors."""

    queries: Tensor  # (B, D)
    documents: Tensor  # ((1 + K) B, D): the positives, then the first hard negatives, ...
    first: int  # of this rank's n queries
    n: int

    @property
    def anchors(self) -> Tensor:
        """This rank's queries, (n, D)."""
        return self.queries[self.first : self.first + self.n]

    @property
    def positives(self) -> Tensor:
        """Their documents, (n, D)."""
        return self.documents[self.first : self.first + self.n]

    @property
    def hard_negatives(self) -> Tensor:
        """Their further documents, (K, n, D)."""
        by_column = self.documents.reshape(-1, *self.queries.shape)
        return by_column[1:, self.first : self.first + self.n]

    @property
    def numbers(self) -> Tensor:
        """Where the anchors are among the queries, (n,)."""
        return torch.arange(self.first, self.first + self.n, device=self.queries.device)

    def without(self, columns: Tensor) -> Pairs:
        """Return the pairs of anchors, or their positives, and columns, but for the column of the same place."""
        if self.first == 0:
            return Pairs(diagonals=1)
        return Pairs(self.numbers, torch.arange(columns.shape[0], device=columns.device))

    def without_own_documents(self) -> Pairs:
        """Return the pairs with the documents of other queries."""
        number, columns = self.queries.shape[0], self.documents.shape[0]
        if columns == number:
            return self.without(self.documents)
        return Pairs(self.numbers, torch.arange(number, device=self.queries.device).repeat(columns // number))


class _Settings(NamedTuple):
    """The options of a loss, as they are at this call."""

    scale: float | Tensor
    further: frozenset[str]  # directions but from queries to documents
    joint: bool
    hardness: str | None  # the hard negatives, or the others' documents, or both, where they weigh more
    strength: float | Tensor

    @classmethod
    def of(cls, loss: Any, hard_negatives: bool, dtype: torch.dtype) -> _Settings:
        """Return those of a loss, whose numbers may have less precision than the similarities, of this dtype."""
        mode: str | None = loss.hardness_mode
        if mode not in ("in_batch_negatives", "hard_negatives", "all_negatives") or not loss.hardness_strength > 0:
            mode = None
        elif not hard_negatives:
            mode = None if mode == "hard_negatives" else "all_negatives"
        directions = frozenset(loss.directions) - {"query_to_doc"}
        scale, strength = (
            x.reshape(()).to(dtype) if isinstance(x, Tensor) else float(x) for x in (loss.scale, loss.hardness_strength)
        )
        return cls(scale, directions, loss.partition_mode == "joint", mode, strength)


def _ranking_loss(loss: Any, embeddings: list[Tensor], peer: Any) -> Tensor:
    """Return the loss of queries and their columns of documents."""
    queries, documents, n, first = embeddings[0], embeddings[1:], embeddings[0].shape[0], 0
    if loss.gather_across_devices:
        queries = peer.all_gather_with_grad(queries)
        documents = [peer.all_gather_with_grad(column) for column in documents]
        first = peer.get_rank() * n
    normalize = loss.similarity_fct is _util.cos_sim
    rows = torch.cat(documents) if len(documents) > 1 else documents[0]
    # reduced embeddings are widened as the peer's similarities do it
    dtype = compute_dtype(queries)
    settings = _Settings.of(loss, len(documents) > 1, dtype)
    queries, rows = queries.to(dtype), rows.to(dtype)
    batch = _Batch(unit_rows(queries, normalize), unit_rows(rows, normalize), first, n)
    columns = batch.documents.shape[0] * (1 + len(settings.further))
    # two parts of the documents, each with its own factor, take a sweep and the rows of each query besides
    two_parts = settings.hardness in ("in_batch_negatives", "hard_negatives")
    if is_small(queries, n * columns, crossover=4.0 if two_parts else 1.0):
        return _plain_loss(batch, settings)
    value = _swept_loss(batch, settings)
    # what the peer returns under autocast: its log-sum-exp is of a reduced dtype on some devices, not on others
    similarity = cast_for_autocast(value)
    return value if similarity is value else value.to(similarity.new_empty(1).logsumexp(0).dtype)


def _swept_loss(batch: _Batch, settings: _Settings) -> Tensor:
    options = SoftmaxOptions(settings.scale, shards=ALONE)  # torch.compile cannot take that from the defaults
    anchors, positives, queries, documents = batch.anchors, batch.positives, batch.queries, batch.documents
    target = settings.scale * row_dot(anchors, positives)
    single = Positives.single(target)
    if not settings.further and settings.hardness is None:
        loss = one_direction_loss(anchors, documents, batch.without(documents), single, options)
        assert isinstance(loss, Tensor)
        return loss
    copies = 1  # of the positive, in the denominator
    directions: list[Negatives] = []
    if "doc_to_query" in settings.further:
        copies = 2
        if settings.hardness is None and batch.n == queries.shape[0]:
            # the columns of the same similarities; those of hard negatives are nobody's
            forward, back = sweep_both_directions(anchors, documents, batch.without(documents), options)
            directions = [forward, Negatives(back.lse[: batch.n])]
        else:
            directions = [
                _query_to_doc(batch, settings, options),
                sweep_negatives(positives, queries, batch.without(queries), options),
            ]
    else:
        directions = [_query_to_doc(batch, settings, options)]
    if "query_to_query" in settings.further:
        directions.append(_among_themselves(anchors, queries, batch.without(queries), options))
    if "doc_to_doc" in settings.further:
        directions.append(_among_themselves(positives, documents, batch.without_own_documents(), options))
    if settings.joint:
        directions = [reduce(union, directions)]
        single = single if copies == 1 else single._replace(lse=target + math.log(copies))
    return softmax_value(directions, single, options)


def _among_themselves(x: Tensor, y: Tensor, pairs: Pairs, options: SoftmaxOptions) -> Negatives:
    """Return the negatives of x among y; where these are the same rows, from half of the pairs."""
    same = pairs.x_ids is None and x.shape == y.shape
    return sweep_negatives(x, None if same else y, pairs, options)


def _query_to_doc(batch: _Batch, settings: _Settings, options: SoftmaxOptions) -> Negatives:
    """Return the negatives among the documents, of which some weigh more the more similar they are."""
    anchors, documents, mode = batch.anchors, batch.documents, settings.hardness
    if mode is None:
        return sweep_negatives(anchors, documents, batch.without(documents), options)
    scale, strength = settings.scale, settings.strength
    # The penalty has no gradient: that of a log-sum-exp which gets it everywhere is this share, and that of the scale
    # is not.
    share = scale / (scale + strength)
    if isinstance(share, Tensor):
        share = share.detach()
    heavier = replace(options, scale=scale / share)

    def heavy(pairs: Pairs) -> Negatives:
        lse = sweep_negatives(anchors, documents, pairs, heavier).lse
        return Negatives(share * lse + (1 - share) * lse.detach().nan_to_num(0.0, 0.0, 0.0))

    if mode == "all_negatives":
        return heavy(batch.without(documents))
    own = row_dot(anchors, batch.hard_negatives).T
    if mode == "in_batch_negatives":
        return union(heavy(batch.without_own_documents()), list_negatives(own, None, options))
    others = sweep_negatives(anchors, documents, batch.without_own_documents(), options)
    return union(others, Negatives((scale * own + strength * own.detach()).logsumexp(1)))


def _plain_loss(batch: _Batch, settings: _Settings) -> Tensor:
    """Return the loss of few rows, with the matrices of similarities."""
    anchors, positives, queries, documents = batch.anchors, batch.positives, batch.queries, batch.documents
    targets = batch.numbers
    similarities = anchors @ documents.T
    logits = settings.scale * similarities
    if not settings.further and settings.hardness is None:
        return F.cross_entropy(logits, targets)
    own = targets[:, None] == torch.arange(queries.shape[0], device=targets.device)
    own_documents = own.repeat(1, documents.shape[0] // queries.shape[0])
    if settings.hardness is not None:
        is_positive = F.pad(own, (0, documents.shape[0] - queries.shape[0]))
        heavier = {
            "in_batch_negatives": ~own_documents,
            "hard_negatives": own_documents & ~is_positive,
            "all_negatives": ~is_positive,
        }[settings.hardness]
        logits = logits + settings.strength * similarities.detach() * heavier
    blocks = [logits]
    if "query_to_query" in settings.further:
        blocks.append((settings.scale * (anchors @ queries.T)).masked_fill(own, -torch.inf))
    if "doc_to_query" in settings.further:
        blocks.append(settings.scale * (positives @ queries.T))
    if "doc_to_doc" in settings.further:
        blocks.append((settings.scale * (positives @ documents.T)).masked_fill(own_documents, -torch.inf))
    if settings.joint:
        return F.cross_entropy(torch.cat(blocks, 1), targets)
    return torch.stack([F.cross_entropy(block, targets) for block in blocks]).mean()
