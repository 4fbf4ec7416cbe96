"""What the tests of the diagnostics share: rows, labels, a comparison, and a call of every diagnostic."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import diagnostics as dg


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def close(ours, expected, rtol=1e-11, atol=1e-12):
    if not torch.is_tensor(expected):
        expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, expected.to(ours), rtol=rtol, atol=atol, equal_nan=True)


def labelled(n=61, d=6, classes=4, unlabelled=True):
    """Return features near the centre of their class; the last class is empty, some samples have no label."""
    labels = torch.arange(n) % (classes - 1)
    if unlabelled:
        labels[::7] = -1
    return torch.randn(n, d, dtype=torch.float64) + 2 * torch.eye(d, dtype=torch.float64)[labels], labels


class Measured(NamedTuple):
    """What the diagnostics are called with; `map` replaces the floating tensors."""

    x: torch.Tensor  # (N, D), near the centre of its class
    y: torch.Tensor  # (N, D), a second view of x
    means: torch.Tensor  # (K, D)
    joint: torch.Tensor  # (N, N)
    labels: torch.Tensor  # (N,)

    @classmethod
    def make(cls, n=48, d=8, classes=4):
        labels = torch.arange(n) % classes
        x = 3 * torch.eye(d)[labels] + 0.1 * torch.randn(n, d)
        joint = torch.rand(n, n)
        return cls(x, x + 0.1 * torch.randn(n, d), torch.randn(classes, d), joint / joint.sum(), labels)

    def map(self, function):
        return Measured(*(function(x) if x.is_floating_point() else x for x in self))


# A call of every diagnostic, and of its options that take another path; the first word is the function's name.
DIAGNOSTICS = {
    "alignment": lambda m: dg.alignment(m.x, m.y, normalize=True),
    "alignment exponent": lambda m: dg.alignment(m.x, m.y, exponent=1.0),
    "uniformity": lambda m: dg.uniformity(m.x, normalize=True),
    "uniformity raw": lambda m: dg.uniformity(m.x),
    "info_nce_split": lambda m: dg.info_nce_split(m.x, m.y, m.y.roll(1, 0)),
    "class_means": lambda m: dg.class_means(m.x, m.labels, 4),
    "class_means views": lambda m: dg.class_means(torch.stack([m.x, m.y], 1), m.labels, 4, normalize=False),
    "class_similarity": lambda m: dg.class_similarity(m.x),
    "classify": lambda m: dg.classify(m.x, m.means),
    "classify nearest": lambda m: dg.classify(m.x, m.means, rule="nearest", normalize=False),
    "classify_views": lambda m: dg.classify_views(torch.stack([m.x, m.y], 1), m.means),
    "classify_views mean_score": lambda m: dg.classify_views(torch.stack([m.x, m.y], 1), m.means, combine="mean_score"),
    "classify_views max_score": lambda m: dg.classify_views(torch.stack([m.x, m.y], 1), m.means, combine="max_score"),
    "classify_views vote": lambda m: dg.classify_views(torch.stack([m.x, m.y], 1), m.means, combine="vote"),
    "centre_bound": lambda m: dg.centre_bound(
        torch.stack([m.x, m.y], 1), m.labels, 4, sigma=1.0, delta=0.0, lipschitz=1.0, epsilon=0.08
    ),
    "augmented_distance": lambda m: dg.augmented_distance(m.x[:, None], torch.stack([m.y, m.y.roll(1, 0)], 1)),
    "band_count": lambda m: dg.band_count(m.x, lower=0.001, upper=0.3),
    "band_count y": lambda m: dg.band_count(m.x, m.y, lower=0.001, upper=0.3, normalize=False),
    "distance_histogram": lambda m: dg.distance_histogram(m.x, bins=500),
    "distance_histogram ids": lambda m: dg.distance_histogram(m.x, bins=500, ids=m.labels, same=True),
    "false_negative_mass": lambda m: dg.false_negative_mass(m.x, m.y, m.labels, temperature=0.07),
    "mmcl_dual": lambda m: dg.mmcl_dual(m.x, sigma=5.0),
    "positive_rank": lambda m: dg.positive_rank(m.x, m.y),
    "positive_rank raw": lambda m: dg.positive_rank(m.x, m.y, normalize=False),
    "retrieval_accuracy": lambda m: dg.retrieval_accuracy(m.x, m.x, k=(1, 3)),
    "adversarial_radius": lambda m: dg.adversarial_radius(m.x, m.labels, m.means, lipschitz=2.0),
    "adversarial_radius notes": lambda m: dg.adversarial_radius(m.x, m.labels, m.means, lipschitz=2.0, bound="notes"),
    "normalized_adjacency": lambda m: dg.normalized_adjacency(m.joint),
    "spectral_optimum": lambda m: dg.spectral_optimum(m.joint, 3),
    "spectral_optimum two towers": lambda m: dg.spectral_optimum(m.joint, 3, two_towers=True),
    "spectral_population_loss": lambda m: dg.spectral_population_loss(m.joint, m.x),
    "spectral_population_loss two towers": lambda m: dg.spectral_population_loss(m.joint, m.x, m.y),
    "plot_class_similarity": lambda m: dg.plot_class_similarity(m.x),
    "plot_distance_histogram": lambda m: dg.plot_distance_histogram({"x": m.x}, bins=500),
    "plot_rank_distribution": lambda m: dg.plot_rank_distribution(dg.positive_rank(m.x, m.y), len(m.y)),
}


def measure(name, measured):
    """Return the tensors that a diagnostic gives, those that it draws if it is a plot, by their names."""
    if name.startswith("plot_"):
        pytest.importorskip("matplotlib")
        axes = DIAGNOSTICS[name](measured)
        drawn = [patch.get_data().values for patch in axes.patches] + [line.get_ydata() for line in axes.lines]
        drawn += [image.get_array().filled(math.nan) for image in axes.images]
        return {f"drawn {i}": torch.as_tensor(array) for i, array in enumerate(drawn)}
    result = DIAGNOSTICS[name](measured)
    return {"result": result} if torch.is_tensor(result) else result._asdict()
