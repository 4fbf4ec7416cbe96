"""Classes: the rows that are an anchor's positives and negatives, among all views or among other rows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from contrastive_kernels.primitives import (
    PLACES,
    Pairs,
    Shards,
    checks,
    compute_dtype,
    gather_rows,
    row_dot,
    wide_sums,
    with_places,
)

# The place of an anchor that is no column; no column has it.
NOWHERE = (1 << 32) - 1


class Candidates(Protocol):
    """Anchors, the rows that they are compared with, and which of those are of their class."""

    @property
    def shards(self) -> Shards:
        """How the rows that they are compared with lie on the ranks."""

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Return the anchors (A, D) and the rows that they are compared with, None for the same."""

    def all_pairs(self) -> Pairs:
        """Return all pairs but an anchor with itself."""

    def different(self) -> Pairs:
        """Return the pairs of different classes."""

    def equal(self) -> Pairs:
        """Return the pairs of one class but an anchor with itself."""

    def positive_counts(self) -> Tensor:
        """Return (A,), the number of the latter."""

    def positive_sums(self) -> Tensor:
        """Return (A,), the sum of their similarities, from the sum of every class."""


class Views(NamedTuple):
    """Anchors among the unit rows of all views."""

    views: Tensor  # (V, N, D)
    heads: Tensor  # (V, N, D) or (1, N, D): the views whose rows are anchors
    ids: Tensor  # (N,) in [0, N): rows with equal ids are no negatives of each other
    shards: Shards

    def all_are_anchors(self) -> bool:  # no property: Dynamo before torch 2.10 reads none of a named tuple
        """Return whether every row is an anchor."""
        return len(self.heads) == len(self.views)

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Return the anchors (A, D) and the rows of all views, None for the same."""
        columns = self.views.flatten(0, 1)
        return (columns, None) if self.all_are_anchors() else (self.heads[0], columns)

    def all_pairs(self) -> Pairs:
        """Return all pairs but an anchor with itself, which is the column of its own number."""
        return Pairs(diagonals=1)

    def different(self) -> Pairs:
        """Return the pairs of different ids."""
        return Pairs(*self._ids())

    def equal(self) -> Pairs:
        """Return the pairs of equal ids but an anchor with itself."""
        return Pairs(*self._ids(), keep_equal_ids=True, diagonals=1)

    def _ids(self) -> tuple[Tensor, Tensor | None]:
        return self.ids.repeat(len(self.heads)), None if self.all_are_anchors() else self.ids.repeat(len(self.views))

    def positive_counts(self) -> Tensor:
        """Return (A,), the number of other rows with the anchor's id."""
        ones = torch.ones_like(self.ids, dtype=compute_dtype(self.views))
        samples = self._of_class(ones[:, None]).squeeze(1)
        return (samples * len(self.views) - 1).repeat(len(self.heads))

    def positive_sums(self) -> Tensor:
        """Return (A,), the sum of the similarities to them."""
        dtype = compute_dtype(self.views)
        # A long row's own share of the sum leaves no digits of the others' in float32.
        samples = self.views.sum(0, dtype=wide_sums(self.views))
        return row_dot(self.heads, (self._of_class(samples) - self.heads).to(dtype)).flatten()

    def _of_class(self, values: Tensor) -> Tensor:
        return class_sums(values, self.ids, self.ids, self.ids.shape[0], self.shards)


class OtherRows(NamedTuple):
    """Anchors among other unit rows, one of which may be the anchor's own."""

    anchors: Tensor  # (A, D)
    rows: Tensor  # (M, D)
    anchor_ids: Tensor  # (A,) in [0, bound)
    row_ids: Tensor  # (M,)
    bound: int
    own: Tensor | None  # (A,), the number of the anchor's own row among these; below 0 or above M there is none
    shards: Shards  # of the rows

    @classmethod
    def of(
        cls,
        heads: Tensor,
        rows: Tensor,
        labels: Tensor,
        row_labels: Tensor,
        unlabelled: float | None,
        own: Tensor | None,
        shards: Shards,
    ) -> OtherRows:
        """Return the candidates of anchors (H, N, D) with labels (N,) and own rows (V, N), of which H views count."""
        of_rows = shards.of(rows)
        if sum(of_rows.sizes(rows)) == 0:
            checks.not_empty("contrast_features", rows)
        of_anchors = shards.gather(labels)
        ids = class_ids(torch.cat([of_anchors, of_rows.gather(row_labels)]), unlabelled)
        return cls(
            heads.flatten(0, 1),
            rows,
            shards.own(ids[: of_anchors.shape[0]], labels).repeat(heads.shape[0]),
            of_rows.own(ids[of_anchors.shape[0] :], row_labels),
            ids.shape[0],
            None if own is None else own[: heads.shape[0]].flatten(),
            of_rows,
        )

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Return the anchors and the rows."""
        return self.anchors, self.rows

    def all_pairs(self) -> Pairs:
        """Return all pairs but an anchor with its own row."""
        return Pairs() if self.own is None else Pairs(*self._places(self.own))

    def different(self) -> Pairs:
        """Return the pairs of different ids, but an anchor with its own row."""
        return self._pairs(keep_equal_ids=False)

    def equal(self) -> Pairs:
        """Return the pairs of equal ids, but an anchor with its own row."""
        return self._pairs(keep_equal_ids=True)

    def _pairs(self, keep_equal_ids: bool) -> Pairs:
        ids, diagonals = (self.anchor_ids, self.row_ids), 0
        if self.own is not None:
            of_anchors, of_rows = self._places(self.own)
            ids, diagonals = (with_places(ids[0], of_anchors), with_places(ids[1], of_rows)), PLACES
        return Pairs(*ids, keep_equal_ids=keep_equal_ids, diagonals=diagonals)

    def _places(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places of the anchors' own rows, and of the rows, among those of all ranks."""
        before, m = sum(self.shards.rows[: self.shards.rank]), self.rows.shape[0]
        return (own + before).where(self._is_row(own), NOWHERE), torch.arange(before, before + m, device=own.device)

    def _is_row(self, own: Tensor) -> Tensor:
        return (own >= 0) & (own < self.rows.shape[0])

    def positive_counts(self) -> Tensor:
        """Return (A,), the number of rows with the anchor's id but its own."""
        ones = torch.ones_like(self.row_ids, dtype=compute_dtype(self.rows))
        return self._of_class(ones[:, None]).squeeze(1)

    def positive_sums(self) -> Tensor:
        """Return (A,), the sum of the similarities to them."""
        dtype = compute_dtype(self.rows)
        return row_dot(self.anchors, self._of_class(self.rows.to(wide_sums(self.rows))).to(dtype))

    def _of_class(self, values: Tensor) -> Tensor:
        """Return the sums of the rows' values over the anchors' ids, without those of their own rows."""
        sums = class_sums(values, self.row_ids, self.anchor_ids, self.bound, self.shards)
        if self.own is None or self.rows.shape[0] == 0:
            return sums
        own = self.own.where(self._is_row(self.own), 0)
        counted = self._is_row(self.own) & (self.row_ids[own] == self.anchor_ids)
        return sums - gather_rows(values, own).masked_fill(~counted[:, None], 0)


def class_sums(values: Tensor, value_ids: Tensor, ids: Tensor, bound: int, shards: Shards) -> Tensor:
    """Return for each of the ids the sum of the values (n, D) that have it, on all ranks; ids are below `bound`."""
    if not shards.alone:
        return shards.class_sums(values, value_ids, ids)
    return gather_rows(values.new_zeros(bound, values.shape[1]).index_add(0, value_ids, values), ids)


def class_ids(labels: Tensor, unlabelled: float | None) -> Tensor:
    """Return ids in [0, N) of labels (N,): one for every label, and one of its own for every sample without.

    A label's id is its first place among the sorted labels; the samples without label have one place each. A NaN equals
    no label, not even another NaN. Static shapes, nothing read back.
    """
    ordered, order = labels.sort(stable=True)
    begins = torch.cat([torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]])
    if unlabelled is not None and (labels.is_floating_point() or float(unlabelled).is_integer()):
        begins = begins | (ordered == (unlabelled if labels.is_floating_point() else int(unlabelled)))
    places = torch.arange(labels.shape[0], device=labels.device).where(begins, 0).cummax(0).values
    return torch.empty_like(order).scatter(0, order, places)
