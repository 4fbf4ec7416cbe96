"""The spectral optimum of a joint distribution against a matrix factorisation."""

import pytest
import torch

from contrastive_kernels import diagnostics as dg
from tests.support.diagnostics import close


def joint_distribution(n=7, m=None):
    """Return a mixture of pairs drawn independently given a common source, like augmentations."""
    views = torch.rand(20, n, dtype=torch.float64).softmax(1)
    others = views if m is None else torch.rand(20, m, dtype=torch.float64).softmax(1)
    source = torch.rand(20, dtype=torch.float64).softmax(0)
    return torch.einsum("s,sx,sy->xy", source, views, others)


@pytest.mark.parametrize("m", [None, 5])
def test_spectral_loss_is_a_factorisation(m):
    """I7 factorisation: the squared error of the factors is the loss and a constant, with two towers too."""
    joint = joint_distribution(7, m)
    a = dg.normalized_adjacency(joint)
    f, g = torch.randn(7, 3, dtype=torch.float64), torch.randn(m or 7, 3, dtype=torch.float64)
    g = f if m is None else g
    px, py = joint.sum(1), joint.sum(0)
    error = (a - (px.sqrt()[:, None] * f) @ (py.sqrt()[:, None] * g).T).square().sum()
    close(dg.spectral_population_loss(joint, f, None if m is None else g), error - a.square().sum())
    by_hand = sum(
        px[x] * py[y] * (f[x] @ g[y]) ** 2 - 2 * joint[x, y] * (f[x] @ g[y]) for x in range(7) for y in range(len(py))
    )
    close(dg.spectral_population_loss(joint, f, None if m is None else g), by_hand)
    assert torch.autograd.gradcheck(lambda f: dg.spectral_population_loss(joint, f, g), f.requires_grad_())


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_spectral_optimum(k, m):
    """I7 factorisation: the optimum is the sum of the k largest squares, and all values are in [0, 1]."""
    joint = joint_distribution(7, m)
    found = dg.spectral_optimum(joint, k, two_towers=m is not None)
    values = torch.linalg.svdvals(dg.normalized_adjacency(joint))
    close(found.values, values, atol=1e-9)
    assert abs(found.values[0] - 1) < 1e-12 and (found.values > -1e-12).all()
    close(found.loss, -values[:k].square().sum())
    f, g = found.x_features, None if m is None else found.y_features
    close(dg.spectral_population_loss(joint, f, g), found.loss)
    for _ in range(5):
        elsewhere = f + 0.1 * torch.randn_like(f)
        assert dg.spectral_population_loss(joint, elsewhere, g) > found.loss


def test_spectral_of_an_impossible_sample():
    joint = joint_distribution(4)
    padded = torch.zeros(5, 5, dtype=torch.float64)
    padded[:4, :4] = joint
    found = dg.spectral_optimum(padded, 2)
    close(found.loss, dg.spectral_optimum(joint, 2).loss)
    assert not found.x_features[4].any() and found.x_features.isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_one_tower_counts_the_symmetric_part(k):
    """A joint distribution counted from sampled pairs is not symmetric; the optimum is what its features reach."""
    joint = torch.rand(5, 5, dtype=torch.float64)
    joint /= joint.sum()
    found, symmetric = dg.spectral_optimum(joint, k), (joint + joint.T) / 2
    close(dg.spectral_population_loss(joint, found.x_features), found.loss)
    close(found.loss, dg.spectral_optimum(symmetric, k).loss)
    f = torch.randn(5, k, dtype=torch.float64)
    close(dg.spectral_population_loss(joint, f), dg.spectral_population_loss(symmetric, f, f))
    for scale in (0.01, 0.1, 1.0):
        elsewhere = found.x_features + scale * torch.randn(5, k, dtype=torch.float64)
        assert dg.spectral_population_loss(joint, elsewhere) > found.loss
    two = dg.spectral_optimum(joint, k, two_towers=True)
    close(dg.spectral_population_loss(joint, two.x_features, two.y_features), two.loss)


@pytest.mark.parametrize("two_towers", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_optimum_of_a_broken_joint_is_nan(value, two_towers):
    joint = joint_distribution(5)
    joint[1, 3] = value
    for part in dg.spectral_optimum(joint, 2, two_towers=two_towers):
        assert part.isnan().all()


def test_the_wider_of_joint_and_features_counts():
    joint, f = joint_distribution(5), torch.randn(5, 2, dtype=torch.float64)
    found = dg.spectral_population_loss(joint.float(), f)
    assert found.dtype == torch.float64
    close(found, dg.spectral_population_loss(joint, f), rtol=1e-6)
