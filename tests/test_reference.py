"""python_ref against closed forms, `F.cross_entropy` and numbers that can be checked by hand."""

import ast
import math
import pathlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import python_ref as ref

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def unit(*shape):
    return F.normalize(torch.randn(shape), dim=-1)


def at_cosine(*cosines):
    """Unit rows in the plane whose cosine with the first one, (1, 0), is given."""
    return torch.tensor([[1.0, 0.0]] + [[c, math.sqrt(1 - c * c)] for c in cosines])


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected).to(actual), rtol=1e-12, atol=1e-13)


def imports(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.split(".")[0]


def test_reference_and_package_are_independent():
    assert "contrastive_kernels" not in set(imports("python_ref"))
    assert "python_ref" not in set(imports("contrastive_kernels"))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_info_nce_is_cross_entropy(reduction, smoothing):
    x, y = torch.randn(2, 7, 5)
    logits = F.normalize(x) @ F.normalize(y).T / 0.3
    expected = F.cross_entropy(logits, torch.arange(7), reduction=reduction, label_smoothing=smoothing)
    close(ref.info_nce_loss(x, y, temperature=0.3, reduction=reduction, label_smoothing=smoothing), expected)


def test_info_nce_with_listed_negatives_is_cross_entropy():
    x, y, shared, paired = unit(7, 5), unit(7, 5), unit(4, 5), unit(7, 3, 5)
    target = torch.zeros(7, dtype=torch.long)
    positive = (x * y).sum(1, keepdim=True)
    close(
        ref.info_nce_loss(x, y, shared, temperature=0.1),
        F.cross_entropy(torch.cat([positive, x @ shared.T], 1) / 0.1, target),
    )
    close(
        ref.info_nce_loss(x, y, paired, temperature=0.1, negative_mode="paired"),
        F.cross_entropy(torch.cat([positive, (paired @ x[:, :, None])[..., 0]], 1) / 0.1, target),
    )
    close(
        ref.info_nce_loss(x, y, shared, temperature=0.1, in_batch_negatives=True),
        F.cross_entropy(torch.cat([x @ y.T, x @ shared.T], 1) / 0.1, torch.arange(7)),
    )
    close(
        ref.moco_loss(x, y, shared, temperature=0.1),
        F.cross_entropy(torch.cat([positive, x @ shared.T], 1) / 0.1, target),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_clip_is_two_cross_entropies(smoothing):
    x, y, target = unit(7, 5), unit(7, 5), torch.arange(7)
    logits = 9 * x @ y.T
    expected = (
        F.cross_entropy(logits, target, label_smoothing=smoothing)
        + F.cross_entropy(logits.T, target, label_smoothing=smoothing)
    ) / 2
    close(ref.clip_loss(x, y, 9.0, label_smoothing=smoothing), expected)
    close(ref.clip_loss(x, y, 9.0, -4.0, label_smoothing=smoothing), expected)
    close(ref.info_nce_loss(x, y, logit_scale=9.0, symmetric=True, label_smoothing=smoothing), expected)
    assert ref.clip_loss(x, y, 9.0, reduction="none").shape == (2, 7)


def test_nt_xent_is_cross_entropy_without_self():
    z0, z1 = torch.randn(2, 6, 4)
    z = F.normalize(torch.cat([z0, z1]))
    logits = (z @ z.T / 0.5).fill_diagonal_(-math.inf)
    target = torch.arange(12).roll(6)
    close(ref.nt_xent_loss(z0, z1), F.cross_entropy(logits, target))
    close(ref.nt_xent_loss(z0, z1, reduction="none"), F.cross_entropy(logits, target, reduction="none"))
    close(ref.nt_xent_loss(z0, z1, reduction="sum_directions"), 2 * F.cross_entropy(logits, target))


def test_info_nce_of_orthogonal_pairs():
    """s = identity, T = 1: every row is log(e + 1) - 1."""
    eye = torch.eye(2)
    close(ref.info_nce_loss(eye, eye, temperature=1.0), math.log(math.e + 1) - 1)


def test_nt_xent_of_two_identical_pairs():
    """Row 0 sees its positive at 1 and two negatives at 0: log(e + 2) - 1."""
    eye = torch.eye(2)
    close(ref.nt_xent_loss(eye, eye, temperature=1.0), math.log(math.e + 2) - 1)


def test_collapsed_loss_keeps_its_digits():
    """One negative at cosine -1, T = 0.1: log(1 + e^-20), 2.1e-9."""
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    loss = ref.info_nce_loss(x, x, y, temperature=0.1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("denominator", "expected"),
    # view 1 = (1,0), (0,1); view 2 = view 1; view 3 of sample 0 at cosine 0.6, so s+ = 0.6 and 1
    [
        ("two_view", math.log(math.e + 2) - 0.8),
        ("one_view", math.log(1) - 0.8),
        ("positive+one_view", (math.log(math.exp(0.6) + 1) - 0.6 + math.log(math.e + 1) - 1) / 2),
        ("positive+two_view", (math.log(math.exp(0.6) + 2) - 0.6 + math.log(math.e + 2) - 1) / 2),
    ],
)
def test_arcl_by_hand(denominator, expected):
    views = torch.eye(2)[:, None].repeat(1, 3, 1)
    views[0, 2] = torch.tensor([0.6, 0.8])
    close(ref.arcl_loss(views, temperature=1.0, denominator=denominator), expected)


def test_arcl_of_two_views_is_half_of_nt_xent():
    views = torch.randn(5, 2, 4)
    rows = ref.nt_xent_loss(*views.unbind(1), reduction="none")
    close(ref.arcl_loss(views, reduction="none"), rows[:5])
    close(ref.arcl_loss(views, positive="mean", reduction="none"), rows[:5])


def test_moco_arcl_by_hand():
    """Keys at cosine 1 and 0, one negative at 0, T = 1: log 2 at the worst key, log(1 + 1/e) at the best one."""
    query, keys, queue = torch.eye(2)[:1], torch.eye(2)[None], torch.tensor([[0.0, -1.0]])
    best = math.log1p(math.exp(-1))
    close(ref.moco_arcl_loss(query, keys, queue, temperature=1.0), math.log(2))
    close(
        ref.moco_arcl_loss(query, keys, queue, temperature=1.0, positive="mean"),
        math.log1p(math.exp(-0.5)),
    )
    close(
        ref.moco_arcl_loss(query, keys, queue, temperature=1.0, positive="mean_loss"),
        (math.log(2) + best) / 2,
    )


@pytest.mark.parametrize(
    ("cosine", "h"),
    [(0.4, 0.04), (0.8, 0.0), (0.9, 0.0), (0.0, 0.0), (-0.5, 0.0)],
    ids=["mid-band", "at-lower", "below", "at-upper", "above"],
)
def test_polarization_of_one_pair(cosine, h):
    """D = (1 - cosine) / 2 in the band (0.1, 0.5), whose ends count as outside."""
    z = at_cosine(cosine)
    for reduction, expected in {"mean": h, "sum": 2 * h, "row": h}.items():
        close(ref.distance_polarization(z, reduction=reduction), expected)
    close(ref.distance_polarization(z, reduction="none"), [h, h])


def test_polarization_leaves_out_equal_ids():
    z = at_cosine(0.4, 0.4)
    assert ref.distance_polarization(z, torch.tensor([3, 3, 3])) == 0
    # pairs (0, 1), (1, 2) and their mirror images: h = 0.04 and, the two others being equal, 0
    close(ref.distance_polarization(z, torch.tensor([0, 1, 0]), reduction="sum"), 2 * 0.04)
    close(ref.distance_polarization(z, torch.tensor([0, 1, 0])), 2 * 0.04 / 4)


def test_polarization_argument_adds_the_mean_over_negatives():
    """NT-Xent's negatives are the pairs of different instances."""
    z0, z1 = torch.randn(2, 6, 4)
    polarization = SimpleNamespace(lower=0.2, upper=0.7, weight=3.0)
    extra = ref.nt_xent_loss(z0, z1, polarization=polarization) - ref.nt_xent_loss(z0, z1)
    alone = ref.distance_polarization(torch.cat([z0, z1]), torch.arange(6).repeat(2), lower=0.2, upper=0.7)
    assert alone > 0
    close(extra, 3 * alone)


@pytest.mark.parametrize("base", ["nt_xent", "info_nce", "quick_thoughts", "debiased", "hard_negative"])
def test_lmcl_adds_the_mean_over_negatives(base):
    """The negatives are pairs of x and y for InfoNCE and Quick-Thoughts, of all rows for the others."""
    x, y = torch.randn(2, 6, 4)
    band = {"lower": 0.2, "upper": 0.7}
    extra = ref.lmcl_loss(x, y, base, **band, weight=3.0, temperature=0.4)
    extra = extra - getattr(ref, f"{base}_loss")(x, y, temperature=0.4)
    if base in ("info_nce", "quick_thoughts"):
        distance = (1 - F.normalize(x) @ F.normalize(y).T) / 2
        h = ((distance - 0.2) * (0.7 - distance)).relu()
        index = torch.arange(6)
        negative = (index[:, None] - index).abs() > (1 if base == "quick_thoughts" else 0)
        mean = h[negative].mean()
    else:
        mean = ref.distance_polarization(torch.cat([x, y]), torch.arange(6).repeat(2), **band)
    assert mean > 0
    close(extra, 3 * mean)


def test_lmcl_is_polarized_nt_xent_by_default():
    x, y = torch.randn(2, 6, 4)
    polarization = SimpleNamespace(lower=0.1, upper=0.5, weight=0.1)
    assert ref.lmcl_loss(x, y) == ref.nt_xent_loss(x, y, polarization=polarization) != ref.nt_xent_loss(x, y)


@pytest.mark.parametrize(
    ("name", "attributes", "expected"),
    [
        ("Identity", {}, 0.4),
        ("Count", {}, 2.0),
        ("Square", {}, 0.36 + 0.04),
        ("Band", {"lower": 0.1, "upper": 0.3}, 0.1 * 0.1),
        ("Hinge", {"margin": 0.1}, 0.7),
        ("Gaussian", {"t": 2.0}, math.exp(-1.6) + math.exp(-4.8)),
        (
            "Softplus",
            {"scale": 2.0, "bias": -1.0},
            math.log1p(math.exp(0.2)) + math.log1p(math.exp(-1.4)),
        ),
    ],
)
def test_similarity_sum_by_hand(name, attributes, expected):
    """The similarities 0.6 and -0.2, that is the distances 0.2 and 0.6."""
    term = type(name, (), attributes)()
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [-0.2, 0.0], [0.5, 0.0]])
    ids = {"x_ids": torch.tensor([7]), "y_ids": torch.tensor([0, 1, 7])}
    close(ref.similarity_sum(x, y, term=term, **ids), [expected])


def test_logsumexp_masks():
    x, y = torch.randn(5, 3), torch.randn(4, 3)
    s, bias = x @ y.T, torch.randn(4)
    close(ref.similarity_logsumexp(x, y, scale=2.0, y_bias=bias), (2 * s + bias).logsumexp(1))
    rows, columns = ref.similarity_logsumexp(x, y, columns=True)
    close(rows, s.logsumexp(1))
    close(columns, s.logsumexp(0))
    close(
        ref.similarity_logsumexp(x, y, cutoff=s.median(1).values),
        s.sort(1).values[:, :2].logsumexp(1),
    )


def test_row_without_pairs():
    """-inf, without a gradient, for the primitive; 0 for the losses."""
    x, ids = torch.randn(2, 3, requires_grad=True), torch.tensor([1, 1])
    rows = ref.similarity_logsumexp(x, x_ids=ids)
    assert rows.tolist() == [-math.inf] * 2
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    assert not gradient.any()
    for loss in (
        ref.info_nce_loss(x, x.detach(), query_ids=ids),
        ref.nt_xent_loss(x, x.detach(), ids=ids),
        ref.clip_loss(x, x.detach(), 2.0, ids=ids),
        ref.arcl_loss(x[:1, None].repeat(1, 3, 1), denominator="one_view"),
        ref.distance_polarization(x[:1]),
    ):
        assert loss == 0
        assert not torch.autograd.grad(loss, x)[0].nan_to_num(1.0).any()


def test_zero_row_has_no_gradient():
    x = torch.randn(4, 3)
    x[1] = 0
    x.requires_grad_()
    y = torch.randn(4, 3)
    (gradient,) = torch.autograd.grad(ref.info_nce_loss(x, y), x)
    assert not gradient[1].any()
    assert gradient[0].any()
    # a zero query has all similarities 0
    close(ref.info_nce_loss(x, y, reduction="none")[1], math.log(4))


def test_first_pair_wins_a_tie():
    views = torch.eye(3)[None].clone().requires_grad_()
    values, pairs = ref.min_view_similarity(views)
    assert pairs.tolist() == [[0, 1]]
    (gradient,) = torch.autograd.grad(values.sum(), views)
    assert gradient.tolist() == [[[0, 1, 0], [1, 0, 0], [0, 0, 0]]]


def test_statistics_by_hand():
    """Query (1,0), keys at cosine 0.5, 0.5 and -1 (the positive is the first): a tie is not a win."""
    keys = at_cosine(0.5, 0.5, -1.0)[1:]
    query = torch.tensor([[1.0, 0.0]])
    _, stats = ref.info_nce_loss(query, keys[:1], keys[1:], logit_scale=2.0, return_stats=True)
    assert stats.accuracy == 0
    close(stats.positive_logit, [1.0])
    close(stats.logit_max, [1.0])
    close(stats.lse, [math.log(2 * math.e + math.exp(-2))])
    _, stats = ref.info_nce_loss(query, keys[:1], keys[2:], logit_scale=2.0, return_stats=True)
    assert stats.accuracy == 1


def test_cutoff_drops_only_the_more_similar():
    """Negatives at 0.9, 0.5, -0.5 against a positive at 0.5, T = 1."""
    rows = at_cosine(0.5, 0.9, 0.5, -0.5)
    query, positive, negatives = rows[:1], rows[1:2], rows[2:]

    def loss(**options):
        return ref.info_nce_loss(query, positive, negatives, temperature=1.0, **options)

    e = math.exp
    close(loss(cutoff=0.2), math.log1p(e(-1.0)))
    close(loss(cutoff=-0.6), 0.0)
    close(loss(cutoff_margin=0.1), math.log1p(1 + e(-1.0)))
    close(loss(cutoff_margin=-0.1), math.log1p(e(-1.0)))
    close(loss(cutoff_margin=1.0), math.log1p(e(0.4) + 1 + e(-1.0)))


def test_weight_is_a_weighted_mean():
    x, y, weight = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    rows = ref.info_nce_loss(x, y, reduction="none")
    close(ref.info_nce_loss(x, y, weight=weight), (weight * rows).sum() / weight.sum())
    close(ref.info_nce_loss(x, y, weight=weight, reduction="sum"), (weight * rows).sum())
    rows = ref.nt_xent_loss(x, y, reduction="none").reshape(2, 5)
    close(ref.nt_xent_loss(x, y, weight=weight), (weight * rows).sum() / (2 * weight.sum()))


def test_reference_gradients():
    """The sub-gradient rules are choices; everything else is gradcheck's."""
    views = torch.randn(4, 3, 3, requires_grad=True)
    polarization = SimpleNamespace(lower=0.1, upper=0.6, weight=0.5)
    assert torch.autograd.gradcheck(
        lambda v: ref.nt_xent_loss(v[:, 0], v[:, 1], polarization=polarization, label_smoothing=0.1), views
    )
    assert torch.autograd.gradcheck(lambda v: ref.arcl_loss(v), views)
