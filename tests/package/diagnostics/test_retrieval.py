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


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim", [5, 64, 100])
def test_equal_keys_tie_wherever_they_are(dim, normalize):
    """A product may give equal rows scores that differ by a rounding; collapsed features would look like retrieval."""
    q, one = torch.randn(30, dim), torch.randn(1, dim)
    for number in (300, 33, 9, 5):
        keys = one.repeat(number, 1)
        for rows in (q[:number], *q.split(1)):  # one row takes another product
            assert (dg.positive_rank(rows, keys, normalize=normalize) == number).all()
    pairs = torch.randn(150, dim).repeat(2, 1)
    ranks = dg.positive_rank(pairs, pairs, normalize=True)
    assert (ranks == 2).all()
    ids = torch.arange(150).repeat(2)
    assert (dg.positive_rank(pairs, pairs, query_ids=ids, key_ids=ids) == 1).all()


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_ranks_of_raw_rows_far_from_the_origin(offset):
    keys = offset + torch.randn(400, 32)
    q = torch.randn(100, 32)
    similarity = q.double() @ keys.double().T
    expected = 1 + (similarity > similarity.diagonal()[:, None]).sum(1)
    assert (dg.positive_rank(q, keys, normalize=False) - expected).abs().max() <= 1


def test_ties_of_raw_integers_stay_ties():
    q, keys = torch.randint(-3, 4, (50, 6)).float(), torch.randint(0, 4, (80, 6)).float()
    similarity = q @ keys.T
    expected = (similarity >= similarity.diagonal()[:, None]).sum(1)
    assert torch.equal(dg.positive_rank(q, keys, normalize=False), expected)


def test_broken_keys_compete_and_move_no_other():
    q, keys = torch.randn(20, 6), torch.randn(30, 6)
    for normalize in (True, False):
        usual = dg.positive_rank(q, keys, normalize=normalize)
        broken = torch.cat([keys, torch.full((5, 6), torch.nan)])
        assert torch.equal(dg.positive_rank(q, broken, normalize=normalize), usual + 5)
