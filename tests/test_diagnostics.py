"""The diagnostics against their dense definitions, in chunks of a few rows, and by hand; the pictures draw."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from testing import device_of, precise

from contrastive_kernels import diagnostics as dg
from contrastive_kernels.diagnostics import common


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Chunks of a few rows, the last one ragged, where the sizes of these tests would fit into one."""
    monkeypatch.setattr(common, "CHUNK_ELEMENTS", 200)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def close(ours, expected, rtol=1e-11, atol=1e-12):
    if not torch.is_tensor(expected):
        expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, expected.to(ours), rtol=rtol, atol=atol, equal_nan=True)


def labelled(n=61, d=6, classes=4, unlabelled=True):
    """Features around their class, the last class empty, some samples without a label."""
    labels = torch.arange(n) % (classes - 1)
    if unlabelled:
        labels[::7] = -1
    return torch.randn(n, d, dtype=torch.float64) + 2 * torch.eye(d, dtype=torch.float64)[labels], labels


# alignment, uniformity, the split of InfoNCE


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("normalize", [False, True])
def test_alignment(exponent, normalize):
    x, y = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True).unbind(0)
    a, b = (F.normalize(x), F.normalize(y)) if normalize else (x, y)
    close(dg.alignment(x, y, exponent=exponent, normalize=normalize), (a - b).norm(dim=1).pow(exponent).mean())
    assert torch.autograd.gradcheck(lambda x, y: dg.alignment(x, y, exponent=exponent, normalize=normalize), (x, y))


def test_alignment_of_equal_views_has_no_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    dg.alignment(x, x.detach().clone(), exponent=1.0).backward()
    assert not x.grad.any()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity(t, normalize, backend):
    z = torch.randn(33, 5, dtype=precise(backend))
    rows = (F.normalize(z) if normalize else z).double().requires_grad_()
    expected = torch.pdist(rows).square().mul(-t).exp().mean().log()
    ours = z.to(device_of(backend)).requires_grad_()
    value = dg.uniformity(ours, t=t, normalize=normalize, backend=backend)
    close(value, expected.detach(), rtol=1e-5 if z.dtype == torch.float32 else 1e-11)
    if not normalize:
        value.backward()
        expected.backward()
        close(ours.grad, rows.grad, rtol=1e-4 if z.dtype == torch.float32 else 1e-9, atol=1e-6)


def test_info_nce_split_adds_up_to_the_loss():
    q, k, n = torch.randn(3, 20, 5, dtype=torch.float64).unbind(0)
    for normalize in (True, False):
        a, b, c = (F.normalize(x) if normalize else x for x in (q, k, n))
        logits = torch.stack([(a * b).sum(1), (a * c).sum(1)], 1)
        split = dg.info_nce_split(q, k, n, normalize=normalize)
        close(sum(split), F.cross_entropy(logits, torch.zeros(20, dtype=torch.int64)))
        close(split.alignment, dg.alignment(a, b) / 2)


# classes


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
    """Every quantity by its definition, with an empty class and samples without a label."""
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
    """Where it says so, the nearest centre errs at most that often."""
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


# adversarial radius


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
    """f = W x: no point within the radius of x has another class; the true distance is that to the nearest plane."""
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


# several views


@pytest.mark.parametrize("combine", ["mean_feature", "mean_score", "max_score", "vote"])
def test_classify_views(combine):
    views, means = torch.randn(61, 5, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    v, mu = F.normalize(views, dim=-1), F.normalize(means)
    scores = {
        "mean_feature": lambda: F.normalize(v.mean(1)) @ mu.T,
        "mean_score": lambda: (v @ mu.T).mean(1),
        "max_score": lambda: (v @ mu.T).amax(1),
        "vote": lambda: F.one_hot((v @ mu.T).argmax(2), 3).double().mean(1),
    }[combine]()
    found = dg.classify_views(views, means, combine=combine)
    top = scores.topk(2).values
    close(found.confidence, top[:, 0])
    close(found.margin, top[:, 0] - top[:, 1])
    assert torch.equal(found.prediction, scores.argmax(1))
    one = dg.classify_views(views[:, :1], means, combine=combine)
    assert torch.equal(one.prediction, dg.classify(views[:, 0], means).prediction)
    views[3, 2] = torch.nan
    assert dg.classify_views(views, means, combine=combine).confidence.isnan().nonzero().tolist() == [[3]]


# distances


def pair_distances(z, y=None, ids=None, y_ids=None, same=False):
    """The distances of all pairs that count, as one vector."""
    columns, column_ids = (z, ids) if y is None else (y, y_ids)
    d = (1 - F.normalize(z) @ F.normalize(columns).T) / 2
    kept = torch.ones_like(d, dtype=torch.bool)
    if y is None:
        kept.fill_diagonal_(False)
    if ids is not None:
        equal = ids[:, None] == column_ids
        kept &= equal if same else ~equal
    return d[kept]


PAIRS = {
    "self": lambda: {},
    "ids": lambda: {"ids": torch.arange(61) // 3},
    "same": lambda: {"ids": torch.arange(61) // 8, "same": True},
    "rectangular": lambda: {"y": torch.randn(23, 4, dtype=torch.float64)},
    "rectangular ids": lambda: {
        "y": torch.randn(23, 4, dtype=torch.float64),
        "ids": torch.randint(9, (61,)),
        "y_ids": torch.randint(9, (23,)),
    },
}


@pytest.mark.parametrize("pairs", PAIRS)
def test_distance_histogram_and_band_count(pairs):
    z, options = torch.randn(61, 4, dtype=torch.float64), PAIRS[pairs]()
    d = pair_distances(z, **options)
    found = dg.distance_histogram(z, bins=13, **options)
    assert found.counts.tolist() == torch.histc(d, 13, 0, 1).long().tolist()
    assert found.invalid == 0
    close(found.edges, torch.linspace(0, 1, 14, dtype=torch.float64))
    inside = dg.band_count(z, lower=0.3, upper=0.45, **options)
    assert inside.count == ((d > 0.3) & (d < 0.45)).sum() > 0
    assert inside.pairs == len(d) == found.counts.sum()
    close(inside.fraction, inside.count.double() / len(d))


def test_distances_at_the_edges():
    """Equal and opposite rows fall into the first and last bin; the ends of the band are outside."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert dg.distance_histogram(z, bins=4).counts.tolist() == [2, 0, 6, 4]
    assert dg.band_count(z, lower=0.0, upper=0.5).count == 0
    assert dg.band_count(z, lower=0.4, upper=1.0).count == 6
    z[3, 0] = torch.nan
    found = dg.distance_histogram(z, bins=4)
    assert (found.counts.sum(), found.invalid) == (6, 6)
    lonely = dg.band_count(z[:1])
    assert lonely.pairs == 0 and lonely.fraction == 0


# false negatives


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_false_negative_mass(temperature, backend):
    """From two log-sum-exps the same as the masked sum over the softmax."""
    dtype = precise(backend)
    x, labels = labelled(33)
    z0, z1 = x.to(dtype), (x + 0.5 * torch.randn_like(x)).to(dtype)
    device = device_of(backend)
    found = dg.false_negative_mass(
        z0.to(device), z1.to(device), labels.to(device), temperature=temperature, backend=backend
    )
    z = F.normalize(torch.cat([z0, z1]).double())
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    instance, doubled = torch.arange(33).repeat(2), labels.repeat(2)
    negatives = instance[:, None] != instance
    false = negatives & (doubled[:, None] == doubled) & (doubled >= 0)
    p = logits.softmax(1)
    mass = (p * false).sum(1)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    close(found.mass, mass, rtol, 1e-2 * rtol)
    close(found.share, mass / (p * negatives).sum(1), rtol, 1e-2 * rtol)
    assert (found.mass[labels.repeat(2) < 0] == 0).all() and (found.mass > 0).any()


def test_false_negative_mass_at_the_edges(backend):
    device = device_of(backend)
    z = torch.randn(4, 3, device=device)
    one = dg.false_negative_mass(z[:1], z[:1], torch.zeros(1, dtype=torch.int64, device=device), backend=backend)
    assert one.mass.tolist() == one.share.tolist() == [0, 0]
    same = dg.false_negative_mass(z, z, torch.zeros(4, dtype=torch.int64, device=device), backend=backend)
    assert (same.share == 1).all() and ((same.mass > 0) & (same.mass < 1)).all()
    z[1, 1] = torch.nan
    classes = torch.zeros(4, dtype=torch.int64, device=device)
    assert dg.false_negative_mass(z, z, classes, backend=backend).mass.isnan().all()


# retrieval


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
    """Collapsed features would otherwise be perfect."""
    x = torch.ones(7, 3)
    assert dg.positive_rank(x, x).tolist() == [7] * 7
    x[:, 0] = torch.nan
    assert dg.positive_rank(x, x).tolist() == [7] * 7
    assert dg.positive_rank(torch.randn(0, 3), x).shape == (0,)
    assert dg.retrieval_accuracy(torch.randn(0, 3), x).isnan().all()


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


# MMCL


def test_mmcl_dual():
    x = torch.randn(24, 6, dtype=torch.float64)
    inverse, pgd = dg.mmcl_dual(x, sigma=5.0), dg.mmcl_dual(x, sigma=5.0, solver="pgd", C=1.0)
    assert (inverse.kkt_residual > 1e-2).any() and (pgd.kkt_residual <= 1e-4).all()
    assert 0 < pgd.zero_fraction < 1 and 0 < pgd.bound_fraction < 1
    assert (pgd.objective < 0).all() and pgd.iterations > 0
    assert not pgd.objective.requires_grad


# the spectral oracle


def joint_distribution(n=7, m=None):
    """A mixture of pairs drawn independently given a common source, as augmentations make them."""
    views = torch.rand(20, n, dtype=torch.float64).softmax(1)
    others = views if m is None else torch.rand(20, m, dtype=torch.float64).softmax(1)
    source = torch.rand(20, dtype=torch.float64).softmax(0)
    return torch.einsum("s,sx,sy->xy", source, views, others)


@pytest.mark.parametrize("m", [None, 5])
def test_spectral_loss_is_a_factorisation(m):
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


def test_spectral_of_something_that_never_happens():
    joint = joint_distribution(4)
    padded = torch.zeros(5, 5, dtype=torch.float64)
    padded[:4, :4] = joint
    found = dg.spectral_optimum(padded, 2)
    close(found.loss, dg.spectral_optimum(joint, 2).loss)
    assert not found.x_features[4].any() and found.x_features.isfinite().all()


# pictures


@pytest.fixture
def agg():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_pictures_draw(agg, tmp_path):
    z = torch.randn(40, 6)
    axes = [
        dg.plot_distance_histogram(z, lower=0.2, upper=0.4),
        dg.plot_distance_histogram({"one": z, "two": dg.distance_histogram(z, bins=9)}),
        dg.plot_class_similarity(torch.randn(4, 6), ["a", "b", "c", "d"]),
        dg.plot_class_similarity(torch.randn(40, 6), normalize=False),
        dg.plot_rank_distribution(dg.positive_rank(z, z + torch.randn(40, 6)), 40),
        dg.plot_rank_distribution(torch.ones(1, dtype=torch.int64), 1),
    ]
    for i, a in enumerate(axes):
        assert a.get_title() and (a.get_xlabel() or a.get_xticklabels())
        a.figure.savefig(tmp_path / f"{i}.png")
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["one", "two"]
    own = agg.subplots()[1]
    assert dg.plot_rank_distribution(torch.tensor([1, 3]), 5, axes=own) is own


def test_the_heights_are_those_of_the_data(agg):
    z = torch.randn(40, 6)
    found = dg.distance_histogram(z, bins=9)
    (stairs,) = dg.plot_distance_histogram(z, bins=9).patches
    close(torch.tensor(stairs.get_data().values), found.counts / found.counts.sum(), rtol=1e-6)
    ranks = torch.tensor([4, 1, 1, 9])
    line = dg.plot_rank_distribution(ranks, 10).lines[0]
    for k in (1, 2, 4, 9):
        reached = max(y for x, y in zip(*line.get_data(), strict=True) if x <= k)
        assert reached == (ranks <= k).float().mean()


def test_without_matplotlib_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        dg.plot_rank_distribution(torch.tensor([1, 2]), 4)


# bad input

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
    "no classes": (lambda: dg.class_means(x, labels, 0), ValueError, "num_classes 0 must be positive"),
    "classes of a float": (lambda: dg.class_means(x, labels, 3.0), TypeError, "num_classes must be an integer"),
    "features of a vector": (lambda: dg.class_means(x[0], labels, K), ValueError, "features (4,)"),
    "rule": (lambda: dg.classify(x, means, rule="best"), ValueError, "rule 'best' is unknown"),
    "means": (lambda: dg.classify(x, means[:, :3]), ValueError, "features (8, 4) and means (3, 3)"),
    "no means": (lambda: dg.classify(x, means[:0]), ValueError, "means (0, 4) must have at least one class"),
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
    "bins": (lambda: dg.distance_histogram(x, bins=0), ValueError, "bins 0 must be positive"),
    "band": (lambda: dg.band_count(x, lower=0.5, upper=0.1), ValueError, "lower 0.5 and upper 0.1"),
    "one of two ids": (lambda: dg.band_count(x, x, ids=labels), ValueError, "ids and y_ids"),
    "same without ids": (lambda: dg.distance_histogram(x, same=True), ValueError, "same=True needs ids"),
    "ids of y without y": (lambda: dg.band_count(x, y_ids=labels), ValueError, "y_ids is given but y is not"),
    "false negatives": (lambda: dg.false_negative_mass(x, x, labels[:3]), ValueError, "labels (3,)"),
    "temperature": (lambda: dg.false_negative_mass(x, x, labels, temperature=0.0), ValueError, "temperature 0.0"),
    "fewer keys": (lambda: dg.positive_rank(x, x[:7]), ValueError, "query (8, 4) has more rows than keys (7, 4)"),
    "target": (lambda: dg.positive_rank(x, x, labels[:2]), ValueError, "target (2,) must have shape (8,)"),
    "ids of the queries": (lambda: dg.positive_rank(x, x, query_ids=labels), ValueError, "query_ids and key_ids"),
    "k": (lambda: dg.retrieval_accuracy(x, x, k=(1, 0)), ValueError, "k 0 must be positive"),
    "joint": (lambda: dg.spectral_optimum(x, 2), ValueError, "joint (8, 4) must be square"),
    "rank": (lambda: dg.spectral_optimum(x, 5, two_towers=True), ValueError, "k 5 is more than joint (8, 4)"),
    "features of joint": (
        lambda: dg.spectral_population_loss(torch.eye(8), x[:7]),
        ValueError,
        "f (7, 4) must have 8 rows",
    ),
    "half a band": (lambda: dg.plot_distance_histogram(x, lower=0.1), ValueError, "lower and upper go together"),
    "names": (lambda: dg.plot_class_similarity(means, ["a"]), ValueError, "names has 1 entries"),
    "ranks": (lambda: dg.plot_rank_distribution(x, 8), ValueError, "ranks (8, 4) must have shape (N,)"),
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
