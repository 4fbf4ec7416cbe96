"""Ranks and accuracies against a full sort, and with ties."""

import math

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import diagnostics as dg
from tests.support.diagnostics import close


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("targets", [False, True])
def test_positive_rank(targets, ids):
    q, keys = torch.randn(61, 4, dtype=torch.float64), torch.randn(83, 4, dtype=torch.float64)
    target = torch.randint(83, (61,)) if targets else None
    options = {"query_ids": torch.randint(9, (61,)), "key_ids": torch.randint(9, (83,))} if ids else {}
    s = F.normalize(q) @ F.normalize(keys).T
    own = torch.arange(61) if target is None else target
    kept = options["query_ids"][:, None] != options["key_ids"] if ids else torch.ones_like(s, dtype=torch.bool)
    kept = kept.scatter(1, own[:, None], True)
    order = s.masked_fill(~kept, -math.inf).argsort(1, descending=True)
    expected = (order == own[:, None]).int().argmax(1) + 1
    ranks = dg.positive_rank(q, keys, target, **options)
    assert ranks.dtype == torch.int64 and ranks.tolist() == expected.tolist()
    accuracy = dg.retrieval_accuracy(q, keys, target, k=(1, 5, 83), **options)
    close(accuracy, [(expected <= k).double().mean().item() for k in (1, 5, 83)])
    assert accuracy[2] == 1
    assert dg.retrieval_accuracy(q, keys, target, k=5, **options) == accuracy[1]


def test_a_tie_counts_against_the_positive():
    """Otherwise collapsed features would have perfect accuracy."""
    x = torch.ones(7, 3)
    assert dg.positive_rank(x, x).tolist() == [7] * 7
    x[:, 0] = torch.nan
    assert dg.positive_rank(x, x).tolist() == [7] * 7
    assert dg.positive_rank(torch.randn(0, 3), x).shape == (0,)
    assert dg.retrieval_accuracy(torch.randn(0, 3), x).isnan().all()
