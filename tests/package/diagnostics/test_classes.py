"""Class means, classification and the bound on its error against their dense definitions, and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import diagnostics as dg
from tests.support.diagnostics import close, labelled


@pytest.mark.parametrize("views", [None, 3])
def test_class_means(views):
    x, labels = labelled()
    features = x if views is None else torch.randn(61, views, 6, dtype=torch.float64)
    means, counts = dg.class_means(features, labels, 5)
    for k in range(5):
        own = F.normalize(features[labels == k], dim=-1).flatten(0, -2)
        assert counts[k] == (labels == k).sum()
        close(means[k], own.mean(0) if len(own) else torch.zeros(6))
    features[labels == -1] = torch.nan
    assert torch.equal(dg.class_means(features, labels, 5).means, means)


@pytest.mark.parametrize("rule", ["similarity", "nearest"])
@pytest.mark.parametrize("normalize_means", [None, False, True])
def test_classify(rule, normalize_means):
    x, labels = labelled(unlabelled=False)
    means = dg.class_means(x, labels, 3).means
    unit_means = normalize_means or (normalize_means is None and rule == "similarity")
    mu = F.normalize(means) if unit_means else means
    scores = F.normalize(x) @ mu.T - (mu.square().sum(1) / 2 if rule == "nearest" else 0)
    found = dg.classify(x, means, rule=rule, normalize_means=normalize_means)
    top = scores.topk(2).values
    assert torch.equal(found.prediction, scores.argmax(1))
    close(found.confidence, top[:, 0])
    close(found.margin, top[:, 0] - top[:, 1])
    assert (found.prediction == labels).double().mean() > 0.7
    if rule == "nearest":
        assert torch.equal(found.prediction, torch.cdist(F.normalize(x), mu).argmin(1))


def test_classify_at_the_edges():
    one = dg.classify(torch.randn(3, 4), torch.randn(1, 4))
    assert one.prediction.tolist() == [0, 0, 0] and one.margin.tolist() == [math.inf] * 3
    assert [field.shape for field in dg.classify(torch.randn(0, 4), torch.randn(2, 4))] == [(0,)] * 3
    tie = dg.classify(torch.ones(1, 2), torch.eye(2))
    assert tie.prediction == 0 and tie.margin == 0
    x = torch.randn(3, 4)
    x[1, 1] = torch.nan
    assert dg.classify(x, torch.eye(4)).confidence.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_centre_bound(radius):
    """Every quantity follows its definition, with an empty class and samples without a label."""
    _, labels = labelled()
    views = torch.eye(6, dtype=torch.float64)[labels][:, None] + 0.05 * torch.randn(61, 4, 6, dtype=torch.float64)
    given = dict(sigma=0.999, delta=0.001, lipschitz=1.5, epsilon=0.002 * radius)
    views[::3, 1:] = views[::3, :1]
    found = dg.centre_bound(views, labels, 4, **given, radius=radius)
    f = radius * F.normalize(views, dim=-1)
    known = labels >= 0
    mu = torch.stack([f[labels == k].mean((0, 1)) for k in range(3)])
    products = (mu @ mu.T)[~torch.eye(3, dtype=torch.bool)]
    close(found.divergence, products.max())
    close(found.mean_divergence, products.mean())
    shrinkage = 1 - mu.square().sum(1).min() / radius**2
    close(found.centre_shrinkage, shrinkage)
    wide = torch.stack([torch.cdist(v, v).max() for v in f]) > given["epsilon"]
    misaligned = wide[known].double().mean()
    assert 0 < misaligned < 1
    close(found.misaligned, misaligned)
    rarest = torch.bincount(labels[known]).double().min() / known.sum()
    rho = 2 * 0.001 + misaligned / rarest + 0.999 * (1.5 * 0.001 + 2 * given["epsilon"]) / radius
    close(found.rho_max, rho)
    close(found.threshold, radius**2 * (1 - rho - (2 * rho).sqrt() - shrinkage / 2))
    close(found.error_bound, 0.001 + misaligned)
    assert found.holds == (found.divergence < found.threshold)
    tight = dg.centre_bound(views[:, :1].expand(-1, 4, -1), labels, 4, sigma=1.0, delta=0.0, lipschitz=1.0, epsilon=0.0)
    assert tight.holds and tight.error_bound == 0 and tight.misaligned == 0


def test_the_bound_bounds():
    """Where the bound holds, the nearest centre errs at most that often."""
    _, labels = labelled(unlabelled=False)
    views = torch.eye(6, dtype=torch.float64)[labels][:, None] + 1e-4 * torch.randn(61, 2, 6, dtype=torch.float64)
    found = dg.centre_bound(views, labels, 3, sigma=1.0, delta=0.0, lipschitz=1.0, epsilon=0.01)
    assert found.holds
    means = dg.class_means(views, labels, 3).means
    errors = dg.classify(views[:, 0], means, rule="nearest").prediction != labels
    assert errors.double().mean() <= found.error_bound


def test_augmented_distance():
    x, y = torch.randn(9, 3, 5, dtype=torch.float64), torch.randn(9, 40, 5, dtype=torch.float64)
    expected = [min((a - b).norm() for a in u for b in v) for u, v in zip(x, y, strict=True)]
    close(dg.augmented_distance(x, y), torch.stack(expected))


def test_class_similarity():
    means = torch.randn(4, 6, dtype=torch.float64)
    close(dg.class_similarity(means), F.cosine_similarity(means[:, None], means, dim=2))
    close(dg.class_similarity(means, normalize=False), means @ means.T)


RULES = {
    "similarity": lambda f, means: dg.classify(f, means),
    "raw similarity": lambda f, means: dg.classify(f, means, normalize=False, normalize_means=False),
    "nearest": lambda f, means: dg.classify(f, means, rule="nearest"),
    "raw nearest": lambda f, means: dg.classify(f, means, rule="nearest", normalize=False),
    **{
        combine: lambda f, means, combine=combine: dg.classify_views(f[:, None], means, combine=combine)
        for combine in ("mean_feature", "mean_score", "max_score", "vote")
    },
}


@pytest.mark.parametrize("dim", [5, 64, 128])
@pytest.mark.parametrize("classes", [2, 9, 33])
@pytest.mark.parametrize("rule", RULES)
def test_equal_means_are_a_tie(rule, classes, dim):
    """The lowest class wins, by nothing, although a product may give equal means scores that differ by a rounding."""
    x, one = torch.randn(64, dim), torch.randn(1, dim)
    for rows in (x, *x.split(1)):  # one row takes another product
        found = RULES[rule](rows, one.repeat(classes, 1))
        assert not found.prediction.any()
        assert (found.margin == (1 if rule == "vote" else 0)).all()
    # two groups of equal means: the winner is the lowest of its group
    found = RULES[rule](x, torch.cat([one, -one]).repeat(classes, 1))
    assert (found.prediction <= 1).all() and found.prediction.any() and not found.prediction.all()


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_margins_far_from_the_origin(offset):
    """Raw rows far from the origin keep the digits of their margin."""
    means = offset + torch.randn(6, 32)
    x = means[torch.arange(300) % 6] + 0.5 * torch.randn(300, 32)
    found = dg.classify(x, means, rule="nearest", normalize=False)
    squares = torch.cdist(x.double(), means.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    least = squares.topk(2, largest=False)
    assert torch.equal(found.prediction, least.indices[:, 0])
    close(found.margin.double(), (least.values[:, 1] - least.values[:, 0]) / 2, rtol=1e-5, atol=1e-4)
    close(found.confidence.double(), ((x.double().square().sum(1) - least.values[:, 0]) / 2), rtol=1e-6)


@pytest.mark.parametrize("combine", ["mean_score", "max_score"])
def test_margins_of_close_means(combine):
    means = torch.randn(1, 32) + 1e-5 * torch.randn(6, 32)
    views = torch.randn(300, 3, 32)
    options = dict(normalize=False, normalize_means=False)
    found = dg.classify_views(views, means, combine=combine, **options)
    scores = views.double() @ means.double().T
    top = (scores.mean(1) if combine == "mean_score" else scores.amax(1)).topk(2).values
    # the largest over the views is found among scores that are rounded as a whole
    atol = 1e-9 if combine == "mean_score" else 3e-6
    close(found.margin.double(), top[:, 0] - top[:, 1], rtol=0, atol=atol)
    one = dg.classify_views(views[:, :1], means, combine=combine, **options)
    close(one.margin, dg.classify(views[:, 0], means, **options).margin, rtol=1e-4, atol=atol)


def test_a_broken_mean_is_no_other_class():
    """Its score is shown, and it moves no other class."""
    x, means = torch.randn(20, 6), torch.randn(5, 6)
    means[3] = torch.nan
    for rule in RULES.values():
        assert rule(x, means).confidence.isnan().all()
    far = means.nan_to_num()
    far[3] = 1e6
    usual = dg.classify(x, far[[0, 1, 2, 4]], rule="nearest", normalize=False)
    found = dg.classify(x, far, rule="nearest", normalize=False)
    close(found.margin, usual.margin, rtol=1e-5, atol=1e-6)


def test_means_of_many_rows_far_from_the_origin():
    """Sums of a large class keep the digits of its mean."""
    x = 1000 + torch.randn(200_000, 2)
    means = dg.class_means(x, torch.zeros(len(x), dtype=torch.int64), 1, normalize=False).means
    close(means[0].double(), x.double().mean(0), rtol=0, atol=1e-4)


BOUND = dict(sigma=1.0, delta=0.0, lipschitz=1.0, epsilon=0.01)


@pytest.mark.parametrize("broken", [[0], [3, 4], range(24)], ids=["one", "two", "all"])
def test_the_bound_of_broken_views_is_nan(broken):
    labels = torch.arange(24) % 3
    views = torch.eye(6)[labels][:, None].repeat(1, 2, 1)
    assert dg.centre_bound(views, labels, 3, **BOUND).error_bound == 0
    views[broken, 1] = torch.nan
    found = dg.centre_bound(views, labels, 3, **BOUND)
    assert found.error_bound.isnan() and found.misaligned.isnan() and not found.holds
    labels[list(broken)] = -1
    without = dg.centre_bound(views, labels, 3, **BOUND)
    assert without.error_bound.isnan() == (len(broken) == 24)


@pytest.mark.parametrize("dim", [3, 16, 100])
def test_the_bound_of_collapsed_features_does_not_hold(dim):
    """Equal centres have no divergence below the threshold, however the product of the two rounds."""
    for _ in range(20):
        views = torch.randn(1, 1, dim).expand(30, 2, dim)
        found = dg.centre_bound(views, torch.arange(30) % 3, 3, **{**BOUND, "epsilon": 0.0})
        assert not found.holds


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5])
def test_a_small_shrinkage_keeps_its_digits(spread, normalize):
    labels = torch.arange(60) % 3
    views = torch.eye(8)[labels][:, None] + spread * torch.randn(60, 2, 8)
    found = dg.centre_bound(views, labels, 3, normalize=normalize, **BOUND).centre_shrinkage
    f = F.normalize(views.double(), dim=2) if normalize else views.double()
    mu = torch.stack([f[labels == k].mean((0, 1)) for k in range(3)])
    # raw rows have norms of their own, which float32 rounds
    close(found.double(), 1 - mu.square().sum(1).min(), rtol=1e-2, atol=0 if normalize else 3e-7)


def test_the_bound_of_no_and_of_one_class():
    views, labels = torch.randn(6, 2, 4), torch.zeros(6, dtype=torch.int64)
    one = dg.centre_bound(views, labels, 3, **BOUND)
    assert one.divergence == -math.inf and not one.error_bound.isnan()
    none = dg.centre_bound(views, labels - 1, 3, **BOUND)
    assert none.error_bound.isnan() and not none.holds


def test_augmented_distance_of_no_sample():
    assert dg.augmented_distance(torch.zeros(0, 2, 4), torch.ones(0, 5, 4)).shape == (0,)
