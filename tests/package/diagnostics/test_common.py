"""Bad input, bounded memory and half precision of all diagnostics."""

import pytest
import torch

from contrastive_kernels import diagnostics as dg
from contrastive_kernels.diagnostics import common
from tests.support.diagnostics import close

N, D, K = 8, 4, 3
x, means, labels = torch.randn(N, D), torch.randn(K, D), torch.zeros(N, dtype=torch.int64)
BOUND = dict(sigma=0.9, delta=0.1, lipschitz=1.0, epsilon=0.1)
BAD = {
    "alignment": (lambda: dg.alignment(x, x[:7]), ValueError, "x (8, 4) and y (7, 4) must have the same first"),
    "exponent": (lambda: dg.alignment(x, x, exponent=0.0), ValueError, "exponent 0.0 must be positive"),
    "no rows": (lambda: dg.alignment(x[:0], x[:0]), ValueError, "x (0, 4) is an empty batch"),
    "one row": (lambda: dg.uniformity(x[:1]), ValueError, "z (1, 4) must have at least 2 rows"),
    "t": (lambda: dg.uniformity(x, t=-1.0), ValueError, "t -1.0 must be positive"),
    "integers": (lambda: dg.uniformity(labels[:, None]), TypeError, "z has dtype torch.int64"),
    "split": (lambda: dg.info_nce_split(x, x, x[:3]), ValueError, "query (8, 4) and negative (3, 4)"),
    "labels": (lambda: dg.class_means(x, labels[:7], K), ValueError, "labels (7,) must have shape (8,)"),
    "float labels": (lambda: dg.class_means(x, x[:, 0], K), TypeError, "labels has dtype torch.float32"),
    "no classes": (lambda: dg.class_means(x, labels, 0), ValueError, "num_classes 0 must be at least 1"),
    "classes of a float": (lambda: dg.class_means(x, labels, 3.0), TypeError, "num_classes must be an integer"),
    "features of a vector": (lambda: dg.class_means(x[0], labels, K), ValueError, "features (4,)"),
    "rule": (lambda: dg.classify(x, means, rule="best"), ValueError, "rule 'best' is unknown"),
    "means": (lambda: dg.classify(x, means[:, :3]), ValueError, "features (8, 4) and means (3, 3)"),
    "no means": (lambda: dg.classify(x, means[:0]), ValueError, "means (0, 4) must have at least one class"),
    "mixed half": (lambda: dg.positive_rank(x.half(), x.double()), TypeError, "keys is torch.float64"),
    "mixed": (lambda: dg.classify(x, means.double()), TypeError, "means is torch.float64"),
    "one view": (lambda: dg.centre_bound(x[:, None], labels, K, **BOUND), ValueError, "views (8, 1, 4)"),
    "sigma": (
        lambda: dg.centre_bound(x[:, None].expand(8, 2, 4), labels, K, **{**BOUND, "sigma": 1.5}),
        ValueError,
        "sigma 1.5",
    ),
    "epsilon": (
        lambda: dg.centre_bound(x[:, None].expand(8, 2, 4), labels, K, **{**BOUND, "epsilon": -1}),
        ValueError,
        "epsilon -1 must not be negative",
    ),
    "distance": (lambda: dg.augmented_distance(x[:, None], x[:7, None]), ValueError, "first (8, 1, 4) and second"),
    "bound": (
        lambda: dg.adversarial_radius(x, labels, means, lipschitz=1.0, bound="loose"),
        ValueError,
        "bound 'loose' is unknown",
    ),
    "lipschitz": (lambda: dg.adversarial_radius(x, labels, means, lipschitz=0), ValueError, "lipschitz 0"),
    "combine": (lambda: dg.classify_views(x[:, None], means, combine="sum"), ValueError, "combine 'sum' is unknown"),
    "views": (lambda: dg.classify_views(x, means), ValueError, "views (8, 4) must have shape (N, V, D)"),
    "bins": (lambda: dg.distance_histogram(x, bins=0), ValueError, "bins 0 must be at least 1"),
    "band": (lambda: dg.band_count(x, lower=0.5, upper=0.1), ValueError, "lower 0.5 and upper 0.1"),
    "one of two ids": (lambda: dg.band_count(x, x, ids=labels), ValueError, "ids and y_ids"),
    "same without ids": (lambda: dg.distance_histogram(x, same=True), ValueError, "same=True needs ids"),
    "ids of y without y": (lambda: dg.band_count(x, y_ids=labels), ValueError, "y_ids is given but y is not"),
    "false negatives": (lambda: dg.false_negative_mass(x, x, labels[:3]), ValueError, "labels (3,)"),
    "temperature": (lambda: dg.false_negative_mass(x, x, labels, temperature=0.0), ValueError, "temperature 0.0"),
    "fewer keys": (lambda: dg.positive_rank(x, x[:7]), ValueError, "query (8, 4) has more rows than keys (7, 4)"),
    "target": (lambda: dg.positive_rank(x, x, labels[:2]), ValueError, "target (2,) must have shape (8,)"),
    "target of no key": (
        lambda: dg.positive_rank(x, x, torch.full((8,), 8)),
        ValueError,
        "target has values from 8 to 8; the indices of keys (8, 4) are 0 to 7",
    ),
    "no target": (
        lambda: dg.retrieval_accuracy(x, x, torch.tensor([-1, 0, 1, 2, 3, 4, 5, 6])),
        ValueError,
        "target has values from -1 to 6",
    ),
    "target without keys": (lambda: dg.positive_rank(x, x[:0], labels), ValueError, "target has values from 0 to 0"),
    "bool k": (lambda: dg.retrieval_accuracy(x, x, k=True), TypeError, "k must be an integer, not bool"),
    "float k": (lambda: dg.retrieval_accuracy(x, x, k=1.5), TypeError, "k must be an integer, not float"),
    "ids of the queries": (lambda: dg.positive_rank(x, x, query_ids=labels), ValueError, "query_ids and key_ids"),
    "k": (lambda: dg.retrieval_accuracy(x, x, k=(1, 0)), ValueError, "k 0 must be at least 1"),
    "joint": (lambda: dg.spectral_optimum(x, 2), ValueError, "joint (8, 4) must be square"),
    "rank": (lambda: dg.spectral_optimum(x, 5, two_towers=True), ValueError, "k 5 is more than joint (8, 4)"),
    "features of joint": (
        lambda: dg.spectral_population_loss(torch.eye(8), x[:7]),
        ValueError,
        "f (7, 4) must have 8 rows",
    ),
    "half a band": (lambda: dg.plot_distance_histogram(x, lower=0.1), ValueError, "lower and upper go together"),
    "names": (lambda: dg.plot_class_similarity(means, ["a"]), ValueError, "names has 1 entries"),
    "no class": (lambda: dg.plot_class_similarity(means[:0]), ValueError, "means (0, 4) must have at least one class"),
    "ranks": (lambda: dg.plot_rank_distribution(x, 8), ValueError, "ranks (8, 4) must have shape (N,)"),
    "ranks above": (
        lambda: dg.plot_rank_distribution(torch.tensor([1, 9]), 8),
        ValueError,
        "ranks has values from 1 to 9; the ranks among 8 keys are 1 to 8",
    ),
    "ranks below": (lambda: dg.plot_rank_distribution(torch.tensor([0, 3]), 8), ValueError, "ranks has values from 0"),
    "float ranks": (lambda: dg.plot_rank_distribution(x[0], 8), TypeError, "ranks has dtype torch.float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert message in str(caught.value)


def test_half_precision_is_computed_in_float32():
    z = torch.randn(20, 6).bfloat16()
    assert dg.uniformity(z, normalize=True).dtype == torch.float32
    close(dg.uniformity(z), dg.uniformity(z.double()), rtol=1e-5)
    assert dg.class_means(z, torch.arange(20) % 3, 3).means.dtype == torch.float32
    assert torch.equal(dg.positive_rank(z, z, normalize=False), dg.positive_rank(z.float(), z.float(), normalize=False))


def test_memory_is_bounded(monkeypatch):
    """No tile is larger than a chunk, whatever the batch."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(x))
            return out

    monkeypatch.setattr(common, "CHUNK_ELEMENTS", 4096)
    x, labels = torch.randn(500, 4), torch.arange(500) % 3
    with Watch():
        dg.positive_rank(x, x)
        dg.distance_histogram(x)
        dg.band_count(x)
        dg.classify(x, x)
        dg.classify_views(x[:, None], x)
        dg.adversarial_radius(x, labels, x, lipschitz=1.0)
    assert 2000 < max(seen) <= 4096
