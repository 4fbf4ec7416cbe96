"""SupCon against other rows, the value that means "no label", and labels of any dtype."""

import math

import pytest
import torch

import contrastive_kernels as ck
import python_ref
from tests.support.losses import Largest, assert_module_is_function, assert_refused
from tests.support.testing import (
    Case,
    assert_matches,
    assert_outcomes_match,
    backends,
    check,
    check_statistics,
    device_of,
    differentiate,
    dtype_id,
    precise,
    supports,
)
from tests.support.variants import LABEL_GRID, MEANINGS, partial_labels

ALL_MEANINGS = (*MEANINGS, "sum")


class Memory(Case):
    """Two views of every sample against rows that hold copies of some of them, each with its own label or another.

    Several anchors may have one copy, and some have none.
    """

    def features(self, shape, dtype=torch.float64, device="cpu"):
        n, m, _ = shape
        features = super().features(shape, dtype, "cpu")
        labels, own = partial_labels(n, 3), torch.randint(-1, m + 1, (n, 2))
        contrast_labels = torch.where(torch.rand(m) < 0.5, partial_labels(m, 3), labels[torch.arange(m) % n])
        features |= {"labels": labels, "contrast_labels": contrast_labels, "exclude": own}
        copied = (own >= 0) & (own < m)
        features["contrast_features"][own[copied]] = features["features"][copied]
        return {name: x.to(device) for name, x in features.items()}


def memory(**options):
    return Memory("sup_con_loss", lambda n, m, d: {"features": (n, 2, d), "contrast_features": (m, d)}, options)


each_meaning = pytest.mark.parametrize("meaning", ALL_MEANINGS)


@pytest.mark.parametrize(("shape", "dtype"), LABEL_GRID)
@each_meaning
def test_other_rows(meaning, shape, dtype, backend, poison):
    """Values and gradients of both sides against the reference, with an own copy to leave out."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    check(memory(positives=meaning), shape, dtype, backend, reduction="none")


OPTIONS = {
    "mean": lambda n: {},
    "weight, with positives": lambda n: {"weight": torch.rand(n).double(), "average": "with_positives"},
    "first view": lambda n: {"contrast_mode": "one", "reduction": "sum"},
    "trained": lambda n: {
        "temperature": torch.tensor(0.2).double(),
        "base_temperature": torch.tensor(0.07).double(),
        "average": "with_positives",
    },
    "raw rows": lambda n: {"normalize": False, "temperature": 2.0},
    "every value": lambda n: {"unlabelled": None},
    "another value": lambda n: {"unlabelled": 2, "average": "with_positives"},
}


@pytest.mark.parametrize("name", OPTIONS)
@each_meaning
def test_options(meaning, name, backend, poison):
    check(memory(positives=meaning), (33, 65, 24), torch.float32, backend, **OPTIONS[name](33))


@each_meaning
def test_statistics(meaning, backend, poison):
    check_statistics(memory(positives=meaning), (33, 65, 24), torch.float32, backend, reduction="none")


@each_meaning
def test_derivatives(meaning, backend):
    """First and second, of both sides and the temperature."""
    if precise(backend) != torch.float64:
        pytest.skip(f"{backend} has no float64")
    given = memory().features((5, 7, 3), device=device_of(backend))
    leaves = [given.pop(name).requires_grad_() for name in ("features", "contrast_features")]
    leaves.append(torch.tensor(0.5, dtype=torch.float64, device=device_of(backend), requires_grad=True))

    def loss(features, contrast_features, temperature):
        options = {"temperature": temperature, "positives": meaning, "average": "with_positives", "backend": backend}
        return ck.sup_con_loss(features, contrast_features=contrast_features, **given, **options)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


# Identities


def drawn(backend, n=21, m=40, d=8):
    device = device_of(backend)
    x, y = (torch.randn(rows, d, dtype=precise(backend), device=device) for rows in (n, m))
    return x, torch.randint(4, (n,), device=device), y, torch.randint(4, (m,), device=device)


@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@each_meaning
def test_the_rows_of_all_views_are_the_plain_loss(meaning, contrast_mode, backend):
    """Every row left out of its own candidates; the gradients of the two sides add up."""
    features = torch.randn(11, 3, 8, dtype=precise(backend), device=device_of(backend))
    labels = torch.arange(11, device=features.device) // 3
    own = torch.arange(33, device=features.device).view(3, 11).T
    options = dict(positives=meaning, contrast_mode=contrast_mode, reduction="none", backend=backend)

    def ours(features):
        rows = features.transpose(0, 1).flatten(0, 1)
        others = {"contrast_features": rows, "contrast_labels": labels.repeat(3), "exclude": own}
        return ck.sup_con_loss(features, labels, **others, **options)

    plain = differentiate(lambda features: ck.sup_con_loss(features, labels, **options), {"features": features})
    found = differentiate(ours, {"features": features})
    expected = type(plain)(plain.value.cpu().double(), {"features": plain.gradients["features"].cpu().double()})
    assert_outcomes_match(found, expected, features.dtype, 10.0)


@each_meaning
def test_a_column_left_out_is_no_column(meaning, backend):
    """Whatever it holds: the loss is that of the other rows, and nothing of it reaches value or gradient."""
    x, labels, y, others = drawn(backend)
    options = dict(positives=meaning, reduction="none", backend=backend)
    gone = torch.full_like(labels, 7)
    kept = torch.arange(len(y), device=y.device) != 7
    without = ck.sup_con_loss(x, labels, contrast_features=y[kept], contrast_labels=others[kept], **options)
    for label in range(4):
        others[7], y[7] = label, 1e3 * torch.randn(8, dtype=y.dtype, device=y.device)
        found = differentiate(
            lambda y: ck.sup_con_loss(x, labels, contrast_features=y, contrast_labels=others, exclude=gone, **options),
            {"y": y},
        )
        assert_matches(found.value, without.cpu().double(), x.dtype, scale=10.0)
        assert not found.gradients["y"][7].any()


@each_meaning
def test_nothing_is_left_out(meaning, backend):
    """Numbers below 0 and beyond the last row are none."""
    x, labels, y, others = drawn(backend)
    given = dict(contrast_features=y, contrast_labels=others, positives=meaning, reduction="none", backend=backend)
    plain = ck.sup_con_loss(x, labels, **given)
    for number in (-1, -100, 40, 10**6):
        none = ck.sup_con_loss(x, labels, exclude=torch.full_like(labels, number), **given)
        torch.testing.assert_close(none, plain)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_sum_is_in_without_the_number(views, backend):
    """With and without labels; of no positive it is infinite, and the mean over those with positives leaves it out."""
    features = torch.randn(21, views, 8, dtype=precise(backend), device=device_of(backend))
    labels = partial_labels(21).to(features.device)
    for given in (labels, None):
        each, expected = (
            ck.sup_con_loss(features, given, positives=positives, reduction="none", backend=backend)
            for positives in ("sum", "in")
        )
        known = torch.full((21,), -1, device=features.device) if given is None else given
        same = (known[:, None] == known) & (known >= 0)[:, None]
        number = (views * (same.sum(1) + ~same.any(1)) - 1).repeat(views)
        alone = number == 0
        assert (each[alone] == math.inf).all()
        torch.testing.assert_close(each[~alone], expected[~alone] - number[~alone].log().to(each))
        options = dict(average="with_positives", positives="sum", backend=backend)
        mean = ck.sup_con_loss(features, given, **options)
        torch.testing.assert_close(mean, each[~alone].sum() / max(1, int((~alone).sum())))


# Labels

LABEL_DTYPES = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", LABEL_DTYPES + FLOATS, ids=dtype_id)
def test_labels_of_any_dtype(dtype, backend):
    x, labels, y, others = drawn(backend)
    labels, others = labels % 2, others % 2
    options = dict(reduction="none", backend=backend)
    plain = ck.sup_con_loss(x, labels, **options)
    assert torch.equal(ck.sup_con_loss(x, labels.to(dtype), **options), plain)
    expected = ck.sup_con_loss(x, labels, contrast_features=y, contrast_labels=others, **options)
    found = ck.sup_con_loss(x, labels.to(dtype), contrast_features=y, contrast_labels=others.to(dtype), **options)
    assert torch.equal(found, expected)


def test_labels_are_compared_by_value(backend):
    """Also infinities, zeros of both signs, and numbers that the other dtype does not have."""
    x, _, y, _ = drawn(backend, 8, 8)
    values = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1e-30, 0.1, 3e38, 2.5])
    labels, others = values.repeat(2)[:8].to(x.device), values.flip(0).to(x.device)
    found = ck.sup_con_loss(x, labels, contrast_features=y, contrast_labels=others, reduction="none", backend=backend)
    numbered = [torch.tensor(v, device=x.device) for v in ([0, 1, 2, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 2, 1, 0])]
    options = dict(contrast_features=y, contrast_labels=numbered[1], reduction="none", backend=backend)
    assert torch.equal(found, ck.sup_con_loss(x, numbered[0], **options))
    # 0.1 in float32 is no 0.1 in float64, and 2^53 + 1 no 2^53
    wide = torch.tensor([0.1, 2.5] * 4, dtype=torch.float64, device=x.device)
    sums = ck.sup_con_loss(
        x, wide, contrast_features=y, contrast_labels=wide.float(), positives="sum", reduction="none", backend=backend
    )
    assert sums.isinf().tolist() == [True, False] * 4
    huge = torch.tensor([2**53, 2**53 + 1] * 4, device=x.device)
    different, equal = (ck.sup_con_loss(x, labels, backend=backend) for labels in (huge, huge // 2 * 2))
    assert not torch.equal(different, equal)


@pytest.mark.parametrize("unlabelled", [-1, None, math.nan, 2])
def test_a_nan_is_no_label(unlabelled, backend):
    """It equals no label, not even another NaN, whatever value means none besides."""
    x, labels, y, others = drawn(backend)
    labels[:5], others[:5] = -1, -1
    given = dict(reduction="none", backend=backend)
    expected = ck.sup_con_loss(x, labels, **given)
    contrasted = ck.sup_con_loss(x, labels, contrast_features=y, contrast_labels=others, **given)
    labels, others = (v.float().masked_fill(v == -1, math.nan) for v in (labels, others))
    if unlabelled == 2:
        given["unlabelled"] = 9
    else:
        given["unlabelled"] = unlabelled
    assert torch.equal(ck.sup_con_loss(x, labels, **given), expected)
    assert torch.equal(ck.sup_con_loss(x, labels, contrast_features=y, contrast_labels=others, **given), contrasted)


def test_every_value_is_a_class(backend):
    """unlabelled=None: -1 is a class as any other, as in the published code."""
    x, labels, *_ = drawn(backend)
    options = dict(reduction="none", backend=backend)
    expected = ck.sup_con_loss(x, labels, **options)
    found = ck.sup_con_loss(x, labels - 1, unlabelled=None, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(ck.sup_con_loss(x, labels - 1, **options), expected)
    # another value, also of a float that an integer label cannot have
    torch.testing.assert_close(
        ck.sup_con_loss(x, labels, unlabelled=0, **options), ck.sup_con_loss(x, labels - 1, **options)
    )
    assert torch.equal(ck.sup_con_loss(x, labels, unlabelled=0.5, **options), expected)
    torch.testing.assert_close(
        ck.sup_con_loss(x, labels, unlabelled=3.0, **options),
        ck.sup_con_loss(x, labels.float(), unlabelled=3, **options),
    )


# Memory, graphs, processes


@pytest.mark.skipif(not supports("cpp", torch.float32), reason="the torch backend holds chunks of the matrix")
@each_meaning
def test_nothing_is_quadratic(meaning, monkeypatch):
    """Neither the similarities nor a matrix of labels, forward and backward."""
    monkeypatch.setenv("CONTRASTIVE_KERNELS_SAVED_SCORES_MB", "0")
    features = memory().features((400, 600, 8), torch.float32)
    for name in ("features", "contrast_features"):
        features[name].requires_grad_()
    with Largest() as largest:
        memory(positives=meaning)(ck, features, average="with_positives", backend="cpp").backward()
    # vectors of the samples' and the rows' classes together
    assert 600 * 8 <= largest.elements <= 2 * 1000 * 8


@pytest.mark.parametrize("backend", backends()[-1:])
def test_compiles_to_one_graph(backend):
    """With any batch size; labels are not read back."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()

    def loss(features, contrast_features, labels, contrast_labels, exclude):
        rows = {"contrast_features": contrast_features, "contrast_labels": contrast_labels, "exclude": exclude}
        return ck.sup_con_loss(features, labels, **rows, positives="pairwise", unlabelled=None, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for shape in ((13, 17, 8), (14, 21, 8), (9, 30, 8)):
        features = memory().features(shape, torch.float32, device_of(backend))
        for name in ("labels", "contrast_labels"):
            features[name] = features[name].float().masked_fill(features[name] == 2, math.nan)
        ours, eager = differentiate(compiled, features), differentiate(loss, features)
        torch.testing.assert_close(ours, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


SIZES, ROWS = [4, 1, 6], {"some": [7, 3, 5], "none on one rank": [9, 0, 6]}


def whole_batch(sizes):
    """Return features, labels, rows and their labels of all ranks, and the anchors' own rows counted on their rank."""
    torch.manual_seed(3)
    features, rows = torch.randn(11, 2, 5).double(), torch.randn(15, 5).double()
    labels = torch.randint(3, (11,)).double().masked_fill(torch.arange(11) % 5 == 0, math.nan)
    own = torch.cat([torch.randint(-1, max(m, 1), (n, 2)) for n, m in zip(SIZES, sizes, strict=True)])
    return features, rows, labels, torch.randint(3, (15,)).double(), own


def on_a_rank(group, sizes, meaning):
    features, rows, labels, others, own = whole_batch(sizes)
    rank = group.rank()
    x, given, exclude = (v.split(SIZES)[rank] for v in (features, labels, own))
    y, contrast = (v.split(sizes)[rank] for v in (rows, others))
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss, stats = ck.sup_con_loss(
        x, given, contrast_features=y, contrast_labels=contrast, exclude=exclude, positives=meaning,
        average="with_positives", return_stats=True, group=group,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), x.grad, y.grad, stats


@pytest.mark.parametrize("rows", ROWS)
@each_meaning
def test_ranks(ranks, meaning, rows):
    """Anchors against the rows of all ranks, their own one on their rank left out: the loss of one process."""
    sizes = ROWS[rows]
    features, y, labels, others, own = whole_batch(sizes)
    before = torch.cat([torch.full((n, 1), sum(sizes[:r])) for r, n in enumerate(SIZES)])
    held = torch.cat([torch.full((n, 1), sizes[r]) for r, n in enumerate(SIZES)])
    own = torch.where((own >= 0) & (own < held), own + before, -1)
    features.requires_grad_(), y.requires_grad_()
    loss, stats = python_ref.sup_con_loss(
        features, labels, contrast_features=y, contrast_labels=others, exclude=own, positives=meaning,
        average="with_positives", return_stats=True,
    )  # fmt: skip
    loss.backward()
    found = ranks.run(3, on_a_rank, sizes, meaning)
    exact = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(torch.stack([of_rank[0] for of_rank in found]).mean(), loss.detach(), **exact)
    for k, x in ((1, features), (2, y)):
        torch.testing.assert_close(torch.cat([of_rank[k] for of_rank in found]) / 3, x.grad, **exact)
    for name in ("positive_logit", "lse", "logit_max"):
        parts = [getattr(of_rank[3], name).view(2, -1) for of_rank in found]
        torch.testing.assert_close(torch.cat(parts, 1).flatten(), getattr(stats, name).detach(), **exact)
    assert all(torch.equal(of_rank[3].accuracy, stats.accuracy) for of_rank in found)


# The module and bad input


def test_module_is_its_function(backend):
    given = memory().features((12, 9, 8), torch.float32, device_of(backend))
    inputs, options = (given.pop("features"), given.pop("labels")), {"positives": "pairwise", "unlabelled": 2}
    assert_module_is_function(ck.SupConLoss, ck.sup_con_loss, inputs, options, backend, **given)


def f(*shape):
    return torch.randn(*shape)


def ids(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


def against(features=None, labels=None, **options):
    features, labels = f(8, 4) if features is None else features, ids(8) if labels is None else labels
    return ck.sup_con_loss(features, labels, **{"contrast_features": f(9, 4), "contrast_labels": ids(9), **options})


BAD = {
    "a list": (lambda: against(contrast_features=[[1.0]]), TypeError, "contrast_features must be a tensor, not list"),
    "views": (lambda: against(contrast_features=f(9, 2, 4)), ValueError, "(9, 2, 4) must have shape (N, D)"),
    "width": (lambda: against(contrast_features=f(9, 5)), ValueError, "must have the same last dimension"),
    "dtype": (lambda: against(contrast_features=f(9, 4).double()), TypeError, "cast one of them"),
    "no rows": (
        lambda: against(contrast_features=f(0, 4), contrast_labels=ids(0)),
        ValueError,
        "contrast_features (0, 4) is an empty batch",
    ),
    "no labels": (
        lambda: ck.sup_con_loss(f(8, 4), contrast_features=f(9, 4), contrast_labels=ids(9)),
        ValueError,
        "contrast_features is given but labels is not",
    ),
    "no contrast labels": (lambda: against(contrast_labels=None), ValueError, "contrast_labels is not"),
    "labels per anchor": (lambda: against(contrast_labels=ids(8)), ValueError, "(8,) must have shape (9,)"),
    "integers beside floats": (
        lambda: against(contrast_labels=f(9)),
        TypeError,
        "both are integers or both are floats",
    ),
    "labels elsewhere": (lambda: against(contrast_labels=ids(9).to("meta")), RuntimeError, "labels is on meta"),
    "exclude": (lambda: against(exclude=ids(9)), ValueError, "exclude (9,) must have shape (8,)"),
    "exclude of views": (
        lambda: against(f(8, 2, 4), exclude=ids(8, 3)),
        ValueError,
        "exclude (8, 3) must have shape (8, 2)",
    ),
    "a mask": (lambda: against(exclude=ids(8) > 0), TypeError, "exclude has dtype torch.bool"),
    "ignored": (lambda: against(same_label="ignore"), ValueError, "same_label 'ignore' leaves no positive"),
    "exclude alone": (lambda: ck.sup_con_loss(f(8, 4), ids(8), exclude=ids(8)), ValueError, "exclude has no effect"),
    "contrast labels alone": (
        lambda: ck.sup_con_loss(f(8, 4), ids(8), contrast_labels=ids(8)),
        ValueError,
        "contrast_labels has no effect",
    ),
    "unlabelled without effect": (
        lambda: ck.sup_con_loss(f(8, 4), ids(8), same_label="negative", unlabelled=None),
        ValueError,
        "unlabelled None has no effect",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])
