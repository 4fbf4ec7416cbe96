"""Easy negatives: the k-th similarity, the limits; test_every_loss.py has what it shares with the other losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.primitives.select import cutoff_between
from tests.support.losses import assert_module_is_function, assert_refused
from tests.support.testing import assert_matches, assert_outcomes_match, check, device_of, differentiate, precise
from tests.support.variants import EVERY

BELOW = EVERY["easy_negative-below"]


def test_a_threshold_per_anchor(backend):
    threshold = torch.linspace(-0.2, 0.4, 65, dtype=torch.float64)
    ours, _ = check(BELOW, (65, 129, 24), torch.float32, backend, threshold=threshold, reduction="none")
    assert ours.gradients["threshold"] is None


@pytest.mark.parametrize("name", ["easy_negative", "easy_negative-few", "easy_negative-one", "easy_negative-below"])
def test_one_sample_loses_nothing(name, backend, poison):
    """No candidates: loss 0, gradient 0."""
    features = EVERY[name].features((1, 1, 24), torch.float32, device_of(backend))
    out = differentiate(lambda **t: EVERY[name](ck, t, normalize=True, backend=backend), features)
    assert out.value == 0
    assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


def test_all_negatives_are_info_nce(backend):
    """I16 nothing dropped: the k least similar of k candidates, and a threshold above all."""
    dtype = precise(backend)
    query, key, keys = (torch.randn(n, 24, dtype=dtype, device=device_of(backend)) for n in (33, 33, 50))
    options = {"temperature": 0.1, "backend": backend}
    for negatives, counts in ((None, (32, 33, 100)), (keys, (50, 51))):
        plain = ck.info_nce_loss(query, key, negatives, **options)
        for k in counts:
            assert_matches(ck.easy_negative_loss(query, key, negatives, k=k, **options), plain, dtype, scale=10)
        below = ck.easy_negative_loss(query, key, negatives, select="below", threshold=1.5, **options)
        assert_matches(below, plain, dtype, scale=10)
        fewer = ck.easy_negative_loss(query, key, negatives, k=20, **options)
        assert fewer < plain


def test_no_shared_negatives_at_all(backend, poison):
    query, key = torch.randn(2, 33, 24, device=device_of(backend)).unbind(0)
    none = query.new_empty(0, 24)
    out = differentiate(
        lambda **t: ck.easy_negative_loss(**t, negative_keys=none, k=3, backend=backend),
        {"query": query, "positive_key": key},
    )
    assert out.value == 0
    assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


@pytest.mark.parametrize("d", [16, 100, 200])
def test_the_kth_similarity_is_on_its_side_of_the_cutoff_whatever_the_backend_rounds(d, backend):
    """The sums of the kept similarities say how many there were: none is lost to another order of summation."""
    for _ in range(5):
        query, key = F.normalize(torch.randn(2, 65, d, device=device_of(backend)), dim=-1).unbind(0)
        _, stats = ck.easy_negative_loss(
            query, key, k=1, temperature=1.0, normalize=False, return_stats=True, backend=backend
        )
        # of one negative the log-sum-exp of the denominator follows
        values, _ = ck.row_select(query, key, 1, largest=False, exclude_diagonal=True)
        torch.testing.assert_close(stats.lse, torch.logaddexp(stats.positive_logit, values[:, 0]))


@pytest.mark.parametrize("d", [24, 200])
def test_equals_at_the_boundary_are_all_kept(d, backend):
    """Where k ends among copies of one row, however the two passes round their similarities."""
    query, key = F.normalize(torch.randn(2, 65, d, device=device_of(backend)), dim=-1).unbind(0)
    copies = torch.cat([key[:1]] * 4)
    _, stats = ck.easy_negative_loss(
        query, key, copies, k=2, temperature=0.1, normalize=False, return_stats=True, backend=backend
    )
    four = query @ key[0] / 0.1 + math.log(4)
    torch.testing.assert_close(stats.lse, torch.logaddexp(stats.positive_logit, four))


def test_the_cutoff_between_two_similarities():
    """Halfway; above both where rounding could exchange them; open where there is no second one."""
    x = F.normalize(torch.randn(7, 8), dim=1)
    inner = torch.tensor([0.3, 0.5, 0.0, 0.3, 0.3, -math.inf, math.inf])
    outer = torch.tensor([0.5, 0.3, 1e-7, math.inf, -math.inf, -math.inf, math.inf])
    cutoff = cutoff_between(inner, outer, x, x)
    torch.testing.assert_close(cutoff[:2], torch.full((2,), 0.4))
    assert 2e-7 < cutoff[2] < 1e-5
    assert torch.equal(cutoff[3:], torch.tensor([math.inf, -math.inf, -math.inf, math.inf]))


@pytest.mark.parametrize("threshold", [1.0, 2.0])
def test_a_similarity_at_the_threshold_is_not_above_it(threshold, backend):
    """Small integers: many similarities are the threshold exactly."""
    tensors = {k: torch.randint(-1, 2, (33, 4)).float() for k in ("query", "positive_key")}
    options = {"threshold": threshold, "temperature": 5.0, "normalize": False, "reduction": "none"}
    ours = differentiate(
        lambda **t: BELOW(ck, t, **options, backend=backend), {k: x.to(device_of(backend)) for k, x in tensors.items()}
    )
    reference = differentiate(lambda **t: BELOW(python_ref, t, **options), {k: x.double() for k, x in tensors.items()})
    assert_outcomes_match(ours, reference, torch.float32, 20.0)


def test_module_is_its_function(backend):
    inputs = torch.randn(2, 12, 16, device=device_of(backend)).unbind(0)
    options = {"temperature": 0.2, "k": 4}
    assert_module_is_function(ck.EasyNegativeLoss, ck.easy_negative_loss, inputs, options, backend)


X = torch.randn(8, 16)


def easy(**options):
    return ck.easy_negative_loss(X, X, **options)


BAD = {
    "select": (lambda: easy(select="topk", k=3), ValueError, "select 'topk' is unknown"),
    "k missing": (lambda: easy(), ValueError, "select='bottomk' takes k and not threshold"),
    "threshold missing": (lambda: easy(select="below", k=3), ValueError, "select='below' takes threshold and not k"),
    "both": (lambda: easy(k=3, threshold=0.1), ValueError, "takes k and not threshold"),
    "k of nothing": (lambda: easy(k=0), ValueError, "k 0 must be at least 1"),
    "key ids alone": (lambda: easy(k=3, key_ids=torch.zeros(8).long()), ValueError, "query_ids is not"),
    "temperature": (lambda: easy(k=3, temperature=0.0), ValueError, "temperature 0.0"),
    "empty": (lambda: ck.easy_negative_loss(X[:0], X[:0], k=1), ValueError, "query (0, 16) is an empty batch"),
    "negatives of another dimension": (
        lambda: ck.easy_negative_loss(X, X, torch.randn(9, 15), k=1),
        ValueError,
        "query (8, 16) and negative_keys (9, 15) must have the same last dimension",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])
