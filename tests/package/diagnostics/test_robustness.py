"""The adversarial radius against its definition, where it is exact, and at the edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import diagnostics as dg
from tests.support.diagnostics import close, labelled


def test_adversarial_radius():
    x, labels = labelled()
    means = torch.randn(4, 6, dtype=torch.float64)
    f, mu = F.normalize(x), F.normalize(means)
    certified, notes = [], []
    for row, i in zip(f @ mu.T, labels, strict=True):
        others = [j for j in range(4) if j != i]
        gaps = torch.stack([row[i] - row[j] for j in others])
        certified.append(min(g / (mu[i] - mu[j]).norm() for g, j in zip(gaps, others, strict=True)) / 3)
        notes.append(gaps.min() / 3)
    for bound, expected in (("certified", certified), ("notes", notes)):
        expected = torch.stack(expected).masked_fill(labels < 0, torch.nan)
        assert (expected < 0).any() and (expected > 0).any()
        close(dg.adversarial_radius(x, labels, means, lipschitz=3.0, bound=bound), expected)
        clamped = dg.adversarial_radius(x, labels, means, lipschitz=3.0, bound=bound, clamp=True)
        close(clamped, expected.clamp(min=0))


def test_the_form_of_the_notes_is_no_certificate():
    """Means +-e_1, f = (cos t, sin t), G = 1: the notes say 2 at t = 0, where the class flips at t = pi / 2."""
    x, means = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    label = torch.tensor([0])
    assert dg.adversarial_radius(x, label, means, lipschitz=1.0, bound="notes") == 2 > math.pi / 2
    assert dg.adversarial_radius(x, label, means, lipschitz=1.0) == 1 < math.pi / 2


def test_the_certified_radius_of_linear_features():
    """I20 diagnostics: the radius of f = W x is at most the distance from x to the nearest plane between classes."""
    w = torch.randn(5, 7, dtype=torch.float64)
    x, means = torch.randn(50, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    g = torch.linalg.matrix_norm(w, 2).item()
    scores = x @ w.T @ means.T
    labels = scores.argmax(1)
    certified = dg.adversarial_radius(x @ w.T, labels, means, lipschitz=g, normalize=False, normalize_means=False)
    normals = (means[labels][:, None] - means) @ w
    gaps = scores.gather(1, labels[:, None]) - scores
    true = (gaps / normals.norm(dim=2)).nan_to_num(torch.inf).scatter(1, labels[:, None], torch.inf).amin(1)
    assert (certified > 0).all() and (certified <= true).all()


def test_adversarial_radius_at_the_edges():
    x, label = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    equal = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert dg.adversarial_radius(x, label, equal, lipschitz=1.0) == 0
    assert dg.adversarial_radius(x, label, equal[:1], lipschitz=1.0) == math.inf
    assert dg.adversarial_radius(x, torch.tensor([2]), equal, lipschitz=1.0).isnan()
    assert dg.adversarial_radius(x * torch.nan, label, equal, lipschitz=1.0).isnan()


@pytest.mark.parametrize("dim", [2, 16, 64, 128])
@pytest.mark.parametrize("classes", [2, 5, 10, 33])
def test_equal_means_have_no_radius(classes, dim):
    """A product may give equal means scores that differ by a rounding; over a distance of 0 that would be infinite."""
    means = torch.randn(1, dim).repeat(classes, 1)
    x, labels = torch.randn(64, dim), torch.arange(64) % classes
    for rows in ([*range(64)], *([i] for i in range(64))):  # one row takes another product
        for bound in ("certified", "notes"):
            assert (dg.adversarial_radius(x[rows], labels[rows], means, lipschitz=1.0, bound=bound) == 0).all()
    apart = torch.cat([means, -means])
    radius = dg.adversarial_radius(x, labels, apart, lipschitz=1.0)
    assert (radius <= 0).all() and radius.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-5, 1e-6])
def test_close_means_keep_their_digits(gap, dtype):
    base = 10 * F.normalize(torch.randn(1, 64, dtype=dtype))
    means = base + gap * torch.randn(10, 64, dtype=dtype)
    x, labels = F.normalize(torch.randn(500, 64, dtype=dtype)), torch.arange(500) % 10
    found = dg.adversarial_radius(x, labels, means, lipschitz=1.0, normalize=False, normalize_means=False)
    differences = means[labels, None].double() - means.double()
    true = (differences * x[:, None].double()).sum(2) / differences.norm(dim=2)
    true = true.scatter(1, labels[:, None], math.inf).amin(1)
    close(found.double(), true, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13)


def test_means_too_close_for_their_squares():
    """Where the squares of a difference are 0, no radius is infinite."""
    means = torch.tensor([[1e-30, 0.0], [2e-30, 0.0]])
    radius = dg.adversarial_radius(
        torch.eye(2), torch.tensor([0, 1]), means, lipschitz=1.0, normalize=False, normalize_means=False
    )
    assert radius.tolist() == [0, 0]


def test_samples_are_grouped_by_class_in_any_order():
    x, means = torch.randn(40, 6), torch.randn(7, 6)
    labels = torch.randint(-1, 8, (40,))
    labels[labels == 3] = 4  # a class without samples
    whole = dg.adversarial_radius(x, labels, means, lipschitz=1.0)
    single = torch.cat(
        [dg.adversarial_radius(x[i : i + 1], labels[i : i + 1], means, lipschitz=1.0) for i in range(40)]
    )
    close(whole, single, rtol=1e-5, atol=1e-6)
    assert dg.adversarial_radius(x[:0], labels[:0], means, lipschitz=1.0).shape == (0,)
