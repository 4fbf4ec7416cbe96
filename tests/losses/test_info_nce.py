"""InfoNCE: what is its own; tests/losses/test_every_loss.py has what it shares with the other losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import assert_exact, assert_module_is_function, assert_refused, double
from tests.support.ranks import Raised
from tests.support.testing import BAND, assert_matches, assert_outcomes_match, device_of, differentiate, precise


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"label_smoothing": 0.1, "polarization": BAND}], ids=str)
def test_positive_with_another_id_is_counted_once(options, backend):
    """Key ids need not be the query's: the positive is in the denominator once, and no cutoff drops it."""
    features = {k: torch.randn(65, 16, device=device_of(backend)) for k in ("query", "positive_key")}
    ids = {"query_ids": torch.arange(65), "key_ids": torch.arange(65).flip(0) + 32}
    for cutoff in (None, 0.1):
        reference = python_ref.info_nce_loss(
            **{k: v.cpu().double() for k, v in features.items()}, **ids, **options, cutoff=cutoff, reduction="none"
        )
        on_device = {k: v.to(device_of(backend)) for k, v in ids.items()}
        ours = ck.info_nce_loss(**features, **on_device, **options, cutoff=cutoff, reduction="none", backend=backend)
        assert_matches(ours, reference, torch.float32, scale=20)


GUIDED = {
    "in-batch": {},
    "symmetric": {"symmetric": True},
    "smoothed": {"label_smoothing": 0.1, "polarization": BAND},
    "cutoffs": {"guide_cutoff": 0.1, "cutoff_margin": 0.1},
    "cutoff per anchor": {"guide_cutoff": torch.linspace(-0.5, 0.5, 33)},
    "raw": {"normalize": False, "temperature": 1.0},
}


@pytest.mark.parametrize("keys", [None, "alone", "both"])
@pytest.mark.parametrize("name", GUIDED)
def test_guide(name, keys, backend):
    """Its cutoff is its own similarity of the positive unless one is given."""
    if keys == "alone" and name == "symmetric":
        pytest.skip("it needs in-batch negatives")
    dtype, device = precise(backend), device_of(backend)
    rows = {"query": 33, "positive_key": 33, **({} if keys is None else {"negative_keys": 17})}
    tensors = {key: torch.randn(n, 12, dtype=torch.float64) for key, n in rows.items()}
    guide = tuple(torch.randn(n, 6, dtype=torch.float64) for n in rows.values())
    options = {"temperature": 0.3, "reduction": "none", **GUIDED[name]}
    options |= {"reduction": "mean"} if name == "smoothed" else {}
    options |= {"in_batch_negatives": True} if keys == "both" else {}

    def loss(module, guide, **arguments):
        return module.info_nce_loss(**arguments, guide=guide, **options)

    reference = differentiate(lambda **t: loss(python_ref, guide, **t), tensors)
    on_device = tuple(x.to(device, dtype) for x in guide)
    options = {key: x.to(device) if torch.is_tensor(x) else x for key, x in options.items()}
    ours = differentiate(
        lambda **t: loss(ck, on_device, backend=backend, **t), {key: x.to(device, dtype) for key, x in tensors.items()}
    )
    assert_outcomes_match(ours, reference, dtype, 10.0)
    unguided = python_ref.info_nce_loss(**tensors, **{k: v for k, v in options.items() if k != "guide_cutoff"})
    assert not torch.allclose(unguided, reference.value)


def test_a_guide_keeps_what_is_as_similar_as_the_positive():
    """Duplicates of the positive, whose products are equal but for rounding."""
    x, y, of_x = torch.randn(40, 8), torch.randn(40, 8), torch.randn(40, 33)
    of_y = torch.randn(4, 33).repeat(10, 1)
    guide = F.normalize(of_x), F.normalize(of_y)
    alike = (torch.arange(40)[:, None] - torch.arange(40)) % 4 == 0
    above = (guide[0] @ guide[1].T > (guide[0] * guide[1]).sum(1, keepdim=True)) & ~alike
    expected = F.cross_entropy(
        (F.normalize(x) @ F.normalize(y).T / 0.07).masked_fill(above, -math.inf), torch.arange(40), reduction="none"
    )
    torch.testing.assert_close(ck.info_nce_loss(x, y, guide=(of_x, of_y), reduction="none"), expected)


def guided_on_a_rank(group):
    x = torch.randn(4, 5)
    ck.info_nce_loss(x, x, guide=(x, x), group=group)


def test_a_guide_takes_no_group(ranks):
    with pytest.raises(Raised, match="guide does not take a group"):
        ranks.run(2, guided_on_a_rank)


X = torch.ones(8, 16)
BAD_GUIDES = {
    "a tensor": ({"guide": X}, TypeError, "guide must be a tuple of tensors, the guide's rows for query, positive_key"),
    "one": ({"guide": (X,)}, ValueError, "guide has 1 tensors and needs 2"),
    "three": ({"guide": (X, X, X)}, ValueError, "guide has 3 tensors and needs 2"),
    "rows": ({"guide": (X, X[1:])}, ValueError, "guide[1] (7, 16) must have 8 rows"),
    "widths": ({"guide": (X, X[:, 1:])}, ValueError, "guide[0] (8, 16) and guide[1] (8, 15)"),
    "cutoff alone": ({"guide_cutoff": 0.1}, ValueError, "guide_cutoff 0.1 has no effect with guide=None"),
    "negatives": ({"negative_keys": X, "guide": (X, X)}, ValueError, "query, positive_key, negative_keys"),
    "paired": (
        {"negative_keys": X[:, None], "negative_mode": "paired", "guide": (X, X)},
        ValueError,
        "guide does not serve paired",
    ),
}


@pytest.mark.parametrize("name", BAD_GUIDES)
def test_bad_guide(name):
    options, error, message = BAD_GUIDES[name]
    assert_refused(lambda: ck.info_nce_loss(X, X, **options), error, message)


@pytest.mark.parametrize(
    ("keys", "options"),
    [(None, {"temperature": 0.2, "symmetric": True}), (5, {"label_smoothing": 0.1})],
    ids=["in-batch", "shared"],
)
def test_module_is_its_function(keys, options, backend):
    inputs = torch.randn(2, 12, 16, device=device_of(backend)).unbind(0)
    inputs += () if keys is None else (torch.randn(keys, 16, device=device_of(backend)),)
    assert_module_is_function(ck.InfoNCELoss, ck.info_nce_loss, inputs, options, backend)


# The reference


def unit(*shape):
    return F.normalize(torch.randn(shape), dim=-1)


def at_cosine(*cosines):
    """Return unit rows in the plane whose cosine with the first one, (1, 0), is given."""
    return torch.tensor([[1.0, 0.0]] + [[c, math.sqrt(1 - c * c)] for c in cosines])


@double
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_is_cross_entropy(reduction, smoothing):
    x, y = torch.randn(2, 7, 5)
    logits = F.normalize(x) @ F.normalize(y).T / 0.3
    expected = F.cross_entropy(logits, torch.arange(7), reduction=reduction, label_smoothing=smoothing)
    assert_exact(
        python_ref.info_nce_loss(x, y, temperature=0.3, reduction=reduction, label_smoothing=smoothing), expected
    )


@double
def test_reference_with_listed_negatives_is_cross_entropy():
    x, y, shared, paired = unit(7, 5), unit(7, 5), unit(4, 5), unit(7, 3, 5)
    target = torch.zeros(7, dtype=torch.long)
    positive = (x * y).sum(1, keepdim=True)
    assert_exact(
        python_ref.info_nce_loss(x, y, shared, temperature=0.1),
        F.cross_entropy(torch.cat([positive, x @ shared.T], 1) / 0.1, target),
    )
    assert_exact(
        python_ref.info_nce_loss(x, y, paired, temperature=0.1, negative_mode="paired"),
        F.cross_entropy(torch.cat([positive, (paired @ x[:, :, None])[..., 0]], 1) / 0.1, target),
    )
    assert_exact(
        python_ref.info_nce_loss(x, y, shared, temperature=0.1, in_batch_negatives=True),
        F.cross_entropy(torch.cat([x @ y.T, x @ shared.T], 1) / 0.1, torch.arange(7)),
    )


@double
def test_reference_of_orthogonal_pairs():
    """s = identity, T = 1: every row is log(e + 1) - 1."""
    eye = torch.eye(2)
    assert_exact(python_ref.info_nce_loss(eye, eye, temperature=1.0), math.log(math.e + 1) - 1)


@double
def test_reference_of_a_collapsed_loss_keeps_its_digits():
    """One negative at cosine -1, T = 0.1: log(1 + e^-20), 2.1e-9."""
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    loss = python_ref.info_nce_loss(x, x, y, temperature=0.1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-12, abs=0)


@double
def test_reference_gives_a_zero_row_no_gradient():
    x = torch.randn(4, 3)
    x[1] = 0
    x.requires_grad_()
    y = torch.randn(4, 3)
    (gradient,) = torch.autograd.grad(python_ref.info_nce_loss(x, y), x)
    assert not gradient[1].any()
    assert gradient[0].any()
    # a zero query has all similarities 0
    assert_exact(python_ref.info_nce_loss(x, y, reduction="none")[1], math.log(4))


@double
def test_reference_statistics_by_hand():
    """Query (1,0), keys at cosine 0.5, 0.5 and -1 (the positive is the first): a tie is not a win."""
    keys = at_cosine(0.5, 0.5, -1.0)[1:]
    query = torch.tensor([[1.0, 0.0]])
    _, stats = python_ref.info_nce_loss(query, keys[:1], keys[1:], logit_scale=2.0, return_stats=True)
    assert stats.accuracy == 0
    assert_exact(stats.positive_logit, [1.0])
    assert_exact(stats.logit_max, [1.0])
    assert_exact(stats.lse, [math.log(2 * math.e + math.exp(-2))])
    _, stats = python_ref.info_nce_loss(query, keys[:1], keys[2:], logit_scale=2.0, return_stats=True)
    assert stats.accuracy == 1


@double
def test_reference_drops_only_what_is_more_similar_than_the_cutoff():
    """Negatives at 0.9, 0.5, -0.5 against a positive at 0.5, T = 1."""
    rows = at_cosine(0.5, 0.9, 0.5, -0.5)
    query, positive, negatives = rows[:1], rows[1:2], rows[2:]

    def loss(**options):
        return python_ref.info_nce_loss(query, positive, negatives, temperature=1.0, **options)

    e = math.exp
    assert_exact(loss(cutoff=0.2), math.log1p(e(-1.0)))
    assert_exact(loss(cutoff=-0.6), 0.0)
    assert_exact(loss(cutoff_margin=0.1), math.log1p(1 + e(-1.0)))
    assert_exact(loss(cutoff_margin=-0.1), math.log1p(e(-1.0)))
    assert_exact(loss(cutoff_margin=1.0), math.log1p(e(0.4) + 1 + e(-1.0)))


@double
def test_reference_weights_the_mean():
    x, y, weight = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    rows = python_ref.info_nce_loss(x, y, reduction="none")
    assert_exact(python_ref.info_nce_loss(x, y, weight=weight), (weight * rows).sum() / weight.sum())
    assert_exact(python_ref.info_nce_loss(x, y, weight=weight, reduction="sum"), (weight * rows).sum())
