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
