"""SupCon in its three meanings, partial labels and the pull to label embeddings."""

import copy
import inspect
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from testing import (
    HALF,
    Case,
    Outcome,
    assert_matches,
    assert_outcomes_match,
    case_params,
    check,
    check_statistics,
    device_of,
    differentiate,
    dtype_id,
    precise,
    supports,
)
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_kernels as ck
import python_ref as reference
from contrastive_kernels.functional.labels import label_pull_loss, sup_con_loss
from contrastive_kernels.functional.softmax import nt_xent_loss
from contrastive_kernels.modules.labels import LabelPullLoss, SupConLoss
from python_ref.sums import TERMS

OURS = SimpleNamespace(sup_con_loss=sup_con_loss, label_pull_loss=label_pull_loss)
MEANINGS = ("out", "in", "pairwise")


class LabelCase(Case):
    """A case whose functions are taken from their own files."""

    def __call__(self, module, features, **options):
        return super().__call__(OURS if module is ck else reference, features, **options)


def several(count):
    return lambda n, m, d: {"features": (n, count, d)}


def sup_con(count, **options):
    shapes = several(count) if count else lambda n, m, d: {"features": (n, d)}
    return LabelCase("sup_con_loss", shapes, options)


# Every way through the code: own views or classes as positives, self-similarity or view 1 against all.
CASES = {
    **{meaning: sup_con(2, positives=meaning) for meaning in MEANINGS},
    **{f"{meaning}-one_view": sup_con(0, positives=meaning) for meaning in MEANINGS},
    **{f"{meaning}-ignore": sup_con(3, positives=meaning, same_label="ignore") for meaning in MEANINGS},
    **{f"{meaning}-first": sup_con(3, positives=meaning, contrast_mode="one") for meaning in MEANINGS},
    "out-negative-first": sup_con(3, same_label="negative", contrast_mode="one"),
}

# (N, 1, D); rows are V * N.
SHAPES = {
    (1, 1, 1): "one of everything",
    (2, 1, 24): "at most one class of two",
    (63, 1, 100): "no multiple of any tile",
    (129, 1, 200): "more than one tile of every backend; D above 128",
}
GRID = [
    *((shape, torch.float32) for shape in SHAPES),
    ((63, 1, 100), torch.bfloat16),
    ((63, 1, 100), torch.float16),
    ((63, 1, 100), torch.float64),
    ((1, 1, 1), torch.float64),
]
SHAPE = (65, 1, 24)


def grid():
    return [pytest.param(s, d, id=f"N{s[0]}-D{s[2]}-{dtype_id(d)}") for s, d in GRID]


def some_labels(n, classes=None):
    """Classes of about four, a singleton, and about a quarter of the samples without label."""
    labels = torch.randint(max(n // 4, 1) if classes is None else classes, (n,))
    labels[torch.rand(n) < 0.25] = -1
    labels[n // 2] = 10**12
    return labels


@pytest.mark.parametrize(("shape", "dtype"), grid())
@pytest.mark.parametrize("case", case_params(CASES))
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    """Every anchor's loss, and the gradient for an upstream gradient that differs from anchor to anchor."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    check(case, shape, dtype, backend, reduction="none", labels=some_labels(shape[0]))


OPTIONS = {
    "mean": lambda n: {},
    "sum": lambda n: {"reduction": "sum"},
    "with positives": lambda n: {"average": "with_positives"},
    "weight": lambda n: {"weight": torch.rand(n).double()},
    "weight, with positives": lambda n: {"weight": torch.rand(n).double(), "average": "with_positives"},
    "weight, none": lambda n: {"weight": torch.rand(n).double(), "reduction": "none"},
    "tensor scale": lambda n: {"logit_scale": torch.tensor(7.0).double()},
    "tensor temperature": lambda n: {"temperature": torch.tensor(0.2).double()},
    "negative scale": lambda n: {"logit_scale": -7.0},
    "other rows": lambda n: {"normalize": False, "logit_scale": 0.7},
    "base temperature": lambda n: {"temperature": torch.tensor(0.2).double(), "base_temperature": 0.07},
    "tensor base temperature": lambda n: {
        "logit_scale": torch.tensor(7.0).double(),
        "base_temperature": torch.tensor(0.07).double(),
        "reduction": "sum",
    },
    "no labels": lambda n: {"labels": None},
    "all without label": lambda n: {"labels": torch.full((n,), -1), "average": "with_positives"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", case_params(CASES))
def test_options(case, name, backend, poison):
    """In float32; the scalars' gradients are in their own dtype."""
    n = SHAPE[0]
    options = {"labels": some_labels(n), **OPTIONS[name](n)}
    ours, _ = check(case, SHAPE, torch.float32, backend, **options)
    for scalar in ("logit_scale", "temperature", "base_temperature"):
        if scalar in ours.gradients:
            assert ours.gradients[scalar].dtype == torch.float64


@pytest.mark.parametrize("case", case_params(CASES))
def test_statistics(case, backend, poison):
    for shape in ((1, 1, 24), SHAPE):
        check_statistics(case, shape, torch.float32, backend, labels=some_labels(shape[0]))
        check_statistics(case, shape, torch.float32, backend, reduction="none")


@pytest.mark.parametrize("temperature", [0.01, 0.05])
@pytest.mark.parametrize("meaning", MEANINGS)
def test_cold_two_views_keep_their_digits(meaning, temperature, backend):
    """Losses that the difference of log-sum-exp and logit rounds to 0 or to 1e-6."""
    z = F.normalize(torch.eye(24)[:20] + 0.02 * torch.randn(20, 24), dim=1)
    features = torch.stack([z, F.normalize(z + 0.05 * torch.randn(20, 24), dim=1)], 1)
    options = dict(positives=meaning, temperature=temperature, normalize=False, reduction="none")
    ours = differentiate(
        lambda features: sup_con_loss(features, **options, backend=backend),
        {"features": features.to(device_of(backend))},
    )
    # the reference of "out" and "in" is a sum whose gradient cancels to a rounding of 1
    single = {**options, "positives": "pairwise"}
    expected = differentiate(
        lambda features: reference.sup_con_loss(features, **single), {"features": features.double()}
    )
    assert 1e-45 < expected.value.median() < 1e-6
    # a similarity of order 1 is off by 6e-8; divided by T that is a relative error of the loss
    bound = 5e-7 / temperature
    torch.testing.assert_close(ours.value.cpu().double(), expected.value, rtol=bound, atol=1e-44)
    error = (ours.gradients["features"].cpu().double() - expected.gradients["features"]).abs().max()
    assert error <= bound * expected.gradients["features"].abs().max()


def test_cold_classes_keep_their_digits(backend):
    """Pairwise with labels, and what "in" adds to log k: the softplus of the negatives is exact at 1e-8."""
    labels = torch.arange(24) % 8
    features = F.normalize(torch.eye(8)[labels] + 0.05 * torch.randn(24, 8), dim=1)
    options = dict(labels=labels, positives="pairwise", temperature=0.05, normalize=False, reduction="none")
    expected = reference.sup_con_loss(features.double(), **options)
    assert 1e-10 < expected.median() < 1e-6
    options["labels"] = labels.to(device_of(backend))
    ours = sup_con_loss(features.to(device_of(backend)), **options, backend=backend)
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=0)


def drawn(backend, n=21, count=3, d=8):
    return torch.randn(n, count, d, dtype=precise(backend), device=device_of(backend))


def close(ours, expected, scale=10.0):
    assert_matches(ours.detach(), expected.detach().cpu(), ours.dtype, scale=scale)


@pytest.mark.parametrize("count", [2, 3])
def test_without_labels_it_is_nt_xent(count, backend):
    """2, and its multiple with a base temperature."""
    features = drawn(backend, count=count)
    weight = torch.rand(len(features), dtype=features.dtype, device=features.device)
    for reduction in ("mean", "sum", "none"):
        options = dict(temperature=0.3, reduction=reduction, weight=weight, backend=backend)
        expected = nt_xent_loss(features, **options)
        close(sup_con_loss(features, **options), expected)
        close(sup_con_loss(features, base_temperature=0.1, **options), 3 * expected)
        unlabelled = torch.full((len(features),), -1, device=features.device)
        for same_label in ("positive", "ignore", "negative"):
            close(sup_con_loss(features, unlabelled, same_label=same_label, **options), expected)


@pytest.mark.parametrize("labelled", [False, True])
def test_of_one_positive_all_meanings_are_nt_xent(labelled, backend):
    """2."""
    features = drawn(backend, count=2)
    labels = torch.arange(len(features), device=features.device) if labelled else None
    expected = nt_xent_loss(*features.unbind(1), temperature=0.3, reduction="none", backend=backend)
    for meaning in MEANINGS:
        options = dict(temperature=0.3, positives=meaning, reduction="none", backend=backend)
        close(sup_con_loss(features, labels, **options), expected)
    # two samples of a class instead of two views of a sample
    pairs = torch.arange(len(features), device=features.device).repeat(2)
    flat = features.transpose(0, 1).flatten(0, 1)
    for meaning in MEANINGS:
        options = dict(temperature=0.3, positives=meaning, reduction="none", backend=backend)
        close(sup_con_loss(flat, pairs, **options), expected)


@pytest.mark.parametrize("same_label", ["positive", "ignore", "negative"])
def test_in_and_pairwise_are_not_above_out(same_label, backend):
    """2, per anchor; and they are different losses."""
    features, labels = drawn(backend), some_labels(21).to(device_of(backend))
    outside, inside, pairwise = (
        sup_con_loss(
            features, labels, positives=meaning, same_label=same_label, temperature=0.3, reduction="none",
            backend=backend,
        )
        for meaning in MEANINGS
    )  # fmt: skip
    for loss in (inside, pairwise):
        assert (loss <= outside + 1e-5).all()
        assert (loss < outside - 1e-3).any()


def test_a_policy_for_the_same_label(backend):
    """ "ignore" leaves out candidates, so it is below "negative"; there the labels have no effect."""
    features, labels = drawn(backend), some_labels(21, 3).to(device_of(backend))
    options = dict(temperature=0.3, reduction="none", backend=backend)
    ignore = sup_con_loss(features, labels, same_label="ignore", **options)
    negative = sup_con_loss(features, labels, same_label="negative", **options)
    plain = sup_con_loss(features, **options)
    close(negative, plain)
    labelled = (labels >= 0).repeat(3) & (labels < 10**12).repeat(3)
    assert (ignore < plain - 1e-4)[labelled].all()
    close(ignore[~labelled], plain[~labelled])


@pytest.mark.parametrize("case", case_params(CASES))
def test_names_of_classes_and_order_of_samples_are_irrelevant(case, backend):
    """17; the labels may be any integers, also those that ids inside could take, in any integer dtype."""
    n, device = 21, device_of(backend)
    features = case.features((n, 1, 8), precise(backend), device)["features"]
    labels = some_labels(n, 5)
    names = torch.tensor([7, -2, -3, 2**40, -(2**40)])
    renamed = torch.where((labels >= 0) & (labels < 5), names[labels.clamp(0, 4)], labels)
    expected = case(ck, {"features": features}, labels=labels.to(device), backend=backend)
    close(case(ck, {"features": features}, labels=renamed.to(device), backend=backend), expected)
    order = torch.randperm(n)
    shuffled = {"features": features[order.to(device)]}
    close(case(ck, shuffled, labels=labels[order].to(device), backend=backend), expected)
    # int8, and not contiguous
    short = labels.clamp(max=99).to(torch.int8).repeat_interleave(2)[::2].to(device)
    close(case(ck, {"features": features}, labels=short, backend=backend), expected)


@pytest.mark.parametrize("case", case_params({k: v for k, v in CASES.items() if "first" not in k}))
def test_scale_gradient_is_half_the_inner_product(case, backend):
    """10; raw rows."""
    z = case.features((21, 1, 8), precise(backend), device_of(backend))["features"].requires_grad_()
    labels = some_labels(21).to(z.device)
    a = torch.tensor(0.6, dtype=z.dtype, device=z.device, requires_grad=True)
    loss = case(ck, {"features": z}, labels=labels, logit_scale=a, normalize=False, backend=backend)
    da, dz = torch.autograd.grad(loss, (a, z))
    assert abs(da) > 1e-3
    close(0.6 * da, (z * dz).sum() / 2)


@pytest.mark.parametrize("case", case_params({k: v for k, v in CASES.items() if "pairwise" not in k}))
def test_reductions_agree(case, backend):
    features, labels = case.features((21, 1, 8), precise(backend), device_of(backend)), some_labels(21)
    options = dict(labels=labels.to(device_of(backend)), backend=backend)
    each, total, mean = (case(ck, features, reduction=r, **options) for r in ("none", "sum", "mean"))
    close(total, each.sum(), 10.0 * each.numel())
    close(mean, each.mean())


def test_pairwise_is_the_mean_over_pairs(backend):
    """An anchor counts once for each of its positives."""
    features, labels = drawn(backend), torch.tensor([0] * 6 + [1] * 4 + [2] + [-1] * 10, device=device_of(backend))
    k = torch.tensor([17.0] * 6 + [11.0] * 4 + [2.0] * 11, dtype=features.dtype, device=features.device).repeat(3)
    options = dict(positives="pairwise", backend=backend)
    each = sup_con_loss(features, labels, reduction="none", **options)
    for average in ("all", "with_positives"):
        close(sup_con_loss(features, labels, average=average, **options), (k * each).sum() / k.sum())


@pytest.mark.parametrize("same_label", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("meaning", MEANINGS)
def test_no_positives_at_all(meaning, same_label, backend, poison):
    """Classes of one member, no labels, one sample: loss 0, gradient 0, whatever the mean is over."""
    device = device_of(backend)
    for n, labels in ((9, torch.arange(9)), (9, torch.full((9,), -1)), (9, None), (1, torch.zeros(1).long())):
        features = {"features": torch.randn(n, 24, device=device)}
        for options in ({}, {"average": "with_positives"}, {"reduction": "sum"}, {"reduction": "none"}):
            out = differentiate(
                lambda features: sup_con_loss(
                    features, labels if labels is None else labels.to(device), positives=meaning,  # noqa: B023
                    same_label=same_label, backend=backend, **options,  # noqa: B023
                ),
                features,
            )  # fmt: skip
            assert not out.value.nan_to_num(1.0).any()
            assert not out.gradients["features"].nan_to_num(1.0).any()


@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("count", [1, 3])
def test_all_rows_of_one_class(count, contrast_mode, backend, poison):
    """No negatives: "pairwise" is 0 and "in" the constant log k, without gradient; "out" spreads the class."""
    device = device_of(backend)
    features = {"features": torch.randn(9, count, 24, device=device)}
    labels = torch.full((9,), 4, device=device)

    def run(meaning):
        return differentiate(
            lambda features: sup_con_loss(
                features, labels, positives=meaning, contrast_mode=contrast_mode, reduction="none", backend=backend
            ),
            features,
        )

    constant = torch.full_like(run("in").value, math.log(9 * count - 1))
    torch.testing.assert_close(run("in").value, constant, rtol=1e-6, atol=0)
    assert not run("pairwise").value.nan_to_num(1.0).any()
    for meaning in ("in", "pairwise"):
        assert not run(meaning).gradients["features"].nan_to_num(1.0).any()
    z = F.normalize(features["features"].cpu().double(), dim=-1).transpose(0, 1).flatten(0, 1)
    logits = (z @ z.mT / 0.1).fill_diagonal_(-math.inf)[: len(constant)]
    mean = logits.masked_fill(logits == -math.inf, 0).sum(1) / (9 * count - 1)
    assert_matches(run("out").value, logits.logsumexp(1) - mean, torch.float32, scale=10)
    # of one view alone and one sample of another class: only it has no positive
    labels = torch.tensor([4] * 8 + [5], device=device)
    assert (run("out").value[8] == 0) == (count == 1)


@pytest.mark.parametrize("case", case_params(CASES))
def test_nan_and_infinity_give_nan(case, backend):
    labels = (torch.arange(SHAPE[0]) // 3).to(device_of(backend))
    for bad in (math.nan, math.inf):
        features = case.features(SHAPE, torch.float32, device_of(backend))
        features["features"].reshape(-1)[7] = bad
        assert case(ck, features, labels=labels, backend=backend).isnan()


@pytest.mark.parametrize("case", case_params(CASES))
def test_zero_rows_have_zero_gradients(case, backend):
    features = case.features(SHAPE, torch.float32, device_of(backend))
    features["features"][3] = 0
    labels = (torch.arange(SHAPE[0]) // 3).to(device_of(backend))
    out = differentiate(lambda **t: case(ck, t, labels=labels, reduction="none", backend=backend), features)
    gradient = out.gradients["features"]
    assert out.value.isfinite().all() and gradient.isfinite().all()
    assert not gradient[3].any()


@pytest.mark.parametrize("case", case_params(CASES))
def test_inputs_stay_as_they_were_and_bits_repeat(case, backend, poison):
    """A transposed batch is as good as a contiguous one."""
    features, labels = case.features(SHAPE, torch.float32, device_of(backend)), some_labels(SHAPE[0])
    labels = labels.to(device_of(backend))
    before = {**{k: v.clone() for k, v in features.items()}, "labels": labels.clone()}
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in features.items()}

    def run(features):
        return differentiate(lambda **t: case(ck, t, labels=labels, backend=backend), features)

    first, again = run(features), run(features)
    assert all(torch.equal(before[k], x) for k, x in {**features, "labels": labels}.items())
    assert torch.equal(first.value, again.value)
    assert torch.equal(first.gradients["features"], again.gradients["features"])
    # the norms are summed in another order there
    assert_outcomes_match(run(strided), first, torch.float32, 1.0)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("case", case_params(CASES))
def test_half_precision_accumulates_in_float32(case, dtype, backend):
    """Of rows that are rounded already, similarities and sums of classes have the digits of float32."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    features = F.normalize(case.features(SHAPE)["features"], dim=-1).to(dtype)
    options = dict(normalize=False, reduction="none", temperature=0.5)
    labels = torch.arange(SHAPE[0]) // 20
    expected = case(reference, {"features": features.double()}, labels=labels, **options)
    device = device_of(backend)
    ours = case(ck, {"features": features.to(device)}, labels=labels.to(device), **options, backend=backend)
    assert_matches(ours, expected, torch.float32, scale=2)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.skipif(not supports("cpp", torch.float32), reason="the torch backend holds chunks of the matrix")
@pytest.mark.parametrize("case", case_params(CASES))
def test_nothing_is_quadratic_in_the_batch(case, monkeypatch):
    """Neither the similarities nor a matrix of labels, forward and backward."""
    monkeypatch.setenv("CONTRASTIVE_KERNELS_SAVED_SCORES_MB", "0")
    shape = (400, 1, 8)
    features = {k: v.requires_grad_() for k, v in case.features(shape, torch.float32).items()}
    labels = some_labels(400)
    with LargestTensor() as largest:
        case(ck, features, labels=labels, backend="cpp").backward()
    # a few vectors of (V N, D), V = 3
    assert 400 * 8 <= largest.elements <= 2 * 3 * 400 * 8


GRADIENTS = {k: v for k, v in CASES.items() if k in ("out", "in-one_view", "pairwise-ignore", "pairwise-first")}


@pytest.mark.parametrize("case", case_params(GRADIENTS))
def test_derivatives(case):
    """First and second, of features and temperature, with the base temperature's."""
    z = case.features((5, 1, 3))["features"].requires_grad_()
    scalars = [torch.tensor(v).double().requires_grad_() for v in (0.5, 0.3)]
    labels = torch.tensor([0, 0, 1, 0, -1])

    def loss(z, temperature, base):
        return case(ck, {"features": z}, labels=labels, temperature=temperature, base_temperature=base, backend="torch")

    assert torch.autograd.gradcheck(loss, (z, *scalars))
    assert torch.autograd.gradgradcheck(loss, (z, *scalars), fast_mode=True)


def test_softplus_with_a_bias_per_row(backend):
    """The term that "pairwise" sums."""
    x, y = torch.randn(33, 8).double(), torch.randn(17, 8).double()
    bias = torch.linspace(-30, 30, 33).double()

    def ours(x, y, bias):
        return ck.similarity_sum(x, y, term=ck.Softplus(-2.0, bias), backend=backend)

    def expected(x, y, bias):
        return TERMS["Softplus"](x @ y.mT, ck.Softplus(-2.0, bias[:, None])).sum(1)

    tensors = {"x": x.float(), "y": y.float(), "bias": bias.float()}
    assert_outcomes_match(
        differentiate(ours, {k: v.to(device_of(backend)) for k, v in tensors.items()}),
        differentiate(expected, {k: v.double() for k, v in tensors.items()}),
        torch.float32,
        scale=1.0,
    )
    with pytest.raises(ValueError, match=r"bias \(32,\) must have shape \(33,\)"):
        ck.similarity_sum(x, y, term=ck.Softplus(1.0, bias[1:]))


# The pull to label embeddings.

PULL = {
    "pull": LabelCase("label_pull_loss", lambda n, m, d: {"z": (n, d), "label_embeddings": (m, d)}),
    "softmax": LabelCase(
        "label_pull_loss", lambda n, m, d: {"z": (n, d), "label_embeddings": (m, d)}, {"form": "softmax"}
    ),
}
PULL_OPTIONS = {k: v for k, v in OPTIONS.items() if "base" not in k and "positives" not in k and k != "no labels"} | {
    "all without label": lambda n: {"labels": torch.full((n,), -1)}
}


def pull_labels(n, m):
    labels = torch.randint(m, (n,))
    labels[torch.rand(n) < 0.25] = -1
    return labels


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(pytest.param(s, torch.float32, id=str(s)) for s in ((1, 1, 1), (2, 63, 24), (63, 65, 100), (129, 2, 200))),
        *(pytest.param((63, 65, 100), d, id=dtype_id(d)) for d in (torch.bfloat16, torch.float16, torch.float64)),
    ],
)
@pytest.mark.parametrize("case", case_params(PULL))
def test_pull_and_gradients(case, shape, dtype, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    check(case, shape, dtype, backend, reduction="none", labels=pull_labels(*shape[:2]))


@pytest.mark.parametrize("name", PULL_OPTIONS)
@pytest.mark.parametrize("case", case_params(PULL))
def test_pull_options(case, name, backend, poison):
    check(case, (65, 7, 24), torch.float32, backend, **{"labels": pull_labels(65, 7), **PULL_OPTIONS[name](65)})


def test_pull_is_half_the_squared_distance_and_cross_entropy(backend):
    z, w = torch.randn(33, 8, device=device_of(backend)), torch.randn(5, 8, device=device_of(backend))
    labels = pull_labels(33, 5).to(z.device)
    unit_z, unit_w, known = F.normalize(z), F.normalize(w), labels >= 0
    distances = (unit_z[known] - unit_w[labels[known]]).square().sum(1)
    torch.testing.assert_close(label_pull_loss(z, labels, w, backend=backend), distances.mean() / 2)
    expected = F.cross_entropy(unit_z @ unit_w.T / 0.2, labels, ignore_index=-1)
    torch.testing.assert_close(
        label_pull_loss(z, labels, w, form="softmax", temperature=0.2, backend=backend), expected
    )


@pytest.mark.parametrize("form", ["pull", "softmax"])
def test_pull_of_labels_that_have_no_embedding_is_nan(form, backend):
    """No wrong number, and no index error from a kernel."""
    z, w = torch.randn(9, 8, device=device_of(backend)), torch.randn(5, 8, device=device_of(backend))
    for bad in (5, -2, 2**60, -(2**60)):
        labels = torch.arange(9, device=z.device) % 5
        labels[3] = bad
        each = label_pull_loss(z, labels, w, form=form, reduction="none", backend=backend)
        assert each[3].isnan() and each.isfinite().sum() == 8
        assert label_pull_loss(z, labels, w, form=form, backend=backend).isnan()


@pytest.mark.parametrize("form", ["pull", "softmax"])
def test_pull_of_nan_is_nan(form, backend):
    """Also in a row without label."""
    labels = torch.tensor([-1, 0, 1], device=device_of(backend))
    for row in (0, 1):
        z, w = torch.randn(3, 8, device=labels.device), torch.randn(2, 8, device=labels.device)
        z[row, 2] = torch.nan
        assert label_pull_loss(z, labels, w, form=form, backend=backend).isnan()


@pytest.mark.parametrize("form", ["pull", "softmax"])
def test_pull_derivatives(form):
    z, w = torch.randn(5, 3).double().requires_grad_(), torch.randn(3, 3).double().requires_grad_()
    t, labels = torch.tensor(0.5).double().requires_grad_(), torch.tensor([0, 1, -1, 1, 2])

    def loss(z, w, t):
        options = {"temperature": t} if form == "softmax" else {}
        return label_pull_loss(z, labels, w, form=form, backend="torch", **options)

    inputs = (z, w, t) if form == "softmax" else (z, w, 0.1)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


# The reference, the modules, bad input.


def official_sup_con(features, mask, temperature, contrast_mode="all"):
    """The published formula with a mask of positives, as its code has it: exponentials, mask, log."""
    n, v = features.shape[:2]
    z = features.transpose(0, 1).reshape(n * v, -1)
    anchors = z if contrast_mode == "all" else z[:n]
    logits = anchors @ z.T / temperature
    others = torch.ones_like(logits).scatter(1, torch.arange(len(anchors))[:, None], 0)
    positive = mask.repeat(len(anchors) // n, v) * others
    log_probability = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((positive * log_probability).sum(1) / positive.sum(1).clamp(min=1e-6)).mean()


@pytest.mark.parametrize("contrast_mode", ["all", "one"])
def test_reference_is_the_published_code(contrast_mode):
    features = F.normalize(torch.randn(9, 3, 5).double(), dim=-1)
    labels = torch.randint(3, (9,))
    for mask, given in (
        ((labels[:, None] == labels[None, :]).double(), {"labels": labels}),
        (torch.eye(9).double(), {}),
        (asymmetric := (torch.rand(9, 9) < 0.3).double().fill_diagonal_(1), {"mask": asymmetric}),
    ):
        expected = official_sup_con(features, mask, 0.3, contrast_mode)
        ours = reference.sup_con_loss(features, **given, temperature=0.3, contrast_mode=contrast_mode)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def test_reference_by_hand():
    """T = 1, two of a class at cosine 0.6, one other at cosine 0 and 0.8."""
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]).double()
    labels = torch.tensor([0, 0, 1])
    expected = torch.tensor([math.log1p(math.exp(0 - 0.6)), math.log1p(math.exp(0.8 - 0.6)), 0]).double()
    for meaning in MEANINGS:
        each = reference.sup_con_loss(z, labels, temperature=1.0, positives=meaning, reduction="none")
        torch.testing.assert_close(each, expected)
    for average, count in (("all", 3), ("with_positives", 2)):
        mean = reference.sup_con_loss(z, labels, temperature=1.0, average=average)
        torch.testing.assert_close(mean, expected.sum() / count)
    # the third in the class as well, but unlabelled the second
    labels = torch.tensor([0, -1, 0])
    first = math.log(math.exp(0.6) + 1)
    torch.testing.assert_close(
        reference.sup_con_loss(z, labels, temperature=1.0, reduction="none")[:2],
        torch.tensor([first, 0]).double(),
    )
    # two positives, no negatives
    each = {
        m: reference.sup_con_loss(z, labels * 0, temperature=1.0, positives=m, reduction="none")[0] for m in MEANINGS
    }
    assert each["out"].item() == pytest.approx(first - 0.3)
    assert each["in"].item() == pytest.approx(math.log(2))
    assert each["pairwise"] == 0


MODULES = {
    "SupConLoss": (SupConLoss, sup_con_loss, (12, 2, 16), {"temperature": 0.2, "positives": "in"}),
    "SupConLoss-none": (SupConLoss, sup_con_loss, (12, 16), {"logit_scale": 4.0, "reduction": "none"}),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_is_its_function(name, backend):
    module, function, shape, options = MODULES[name]
    features, labels = torch.randn(shape, device=device_of(backend)), some_labels(12).to(device_of(backend))
    weight = torch.rand(12, device=features.device)
    loss = module(**options, backend=backend)
    for given in ((features,), (features, labels)):
        assert torch.equal(loss(*given, weight=weight), function(*given, weight=weight, **options, backend=backend))
    again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(again(features, labels), loss(features, labels))
    for option, value in options.items():
        assert f"{option}={value}" in repr(loss)


def test_pull_module_is_its_function(backend):
    z, w = torch.randn(12, 8, device=device_of(backend)), torch.randn(5, 8, device=device_of(backend))
    labels = pull_labels(12, 5).to(z.device)
    for options in ({}, {"form": "softmax", "temperature": 0.3}):
        loss = LabelPullLoss(**options, backend=backend)
        assert torch.equal(loss(z, labels, w), label_pull_loss(z, labels, w, **options, backend=backend))
    with pytest.raises(TypeError, match="tau"):
        LabelPullLoss(tau=0.1)


def test_a_temperature_parameter_is_trained(backend):
    features = torch.randn(12, 2, 8, device=device_of(backend))
    loss = SupConLoss(torch.nn.Parameter(torch.tensor(0.3)), backend=backend).to(features.device)
    loss(features, torch.arange(12, device=features.device) // 3).backward()
    assert loss.temperature.grad.abs() > 0


def f(*shape, **options):
    return torch.randn(*shape, **options)


def ids(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


BAD = {
    "a list": (lambda: sup_con_loss([[1.0]]), TypeError, "features must be a tensor, not list"),
    "a vector": (lambda: sup_con_loss(f(8)), ValueError, "features (8,) must have shape (N, V, D)"),
    "no views": (lambda: sup_con_loss(f(8, 0, 4)), ValueError, "features (8, 0, 4) must have at least 1 views"),
    "empty": (lambda: sup_con_loss(f(0, 2, 4)), ValueError, "features (0, 2, 4) is an empty batch"),
    "integers": (lambda: sup_con_loss(ids(8, 4)), TypeError, "features has dtype torch.int64"),
    "float labels": (lambda: sup_con_loss(f(8, 4), f(8)), TypeError, "labels has dtype torch.float32"),
    "bool labels": (lambda: sup_con_loss(f(8, 4), f(8) > 0), TypeError, "labels has dtype torch.bool"),
    "label per row": (
        lambda: sup_con_loss(f(8, 2, 4), ids(16)),
        ValueError,
        "labels (16,) must have shape (8,)",
    ),
    "one-hot labels": (lambda: sup_con_loss(f(8, 4), ids(8, 3)), ValueError, "labels (8, 3) must have shape (8,)"),
    "labels elsewhere": (lambda: sup_con_loss(f(8, 4), ids(8).to("meta")), RuntimeError, "labels is on meta"),
    "weight": (lambda: sup_con_loss(f(8, 2, 4), weight=f(16)), ValueError, "weight (16,) must have shape (8,)"),
    "positives": (lambda: sup_con_loss(f(8, 4), positives="sum"), ValueError, "positives 'sum' is unknown"),
    "same_label": (lambda: sup_con_loss(f(8, 4), same_label="drop"), ValueError, "same_label 'drop' is unknown"),
    "average": (lambda: sup_con_loss(f(8, 4), average="pairs"), ValueError, "average 'pairs' is unknown"),
    "contrast_mode": (lambda: sup_con_loss(f(8, 4), contrast_mode="two"), ValueError, "contrast_mode 'two' is unknown"),
    "reduction": (lambda: sup_con_loss(f(8, 4), reduction="row"), ValueError, "reduction 'row' is unknown"),
    "temperature": (lambda: sup_con_loss(f(8, 4), temperature=0.0), ValueError, "temperature 0.0"),
    "both scales": (
        lambda: sup_con_loss(f(8, 4), temperature=0.1, logit_scale=1.0),
        ValueError,
        "temperature and logit_scale",
    ),
    "base temperature": (
        lambda: sup_con_loss(f(8, 4), base_temperature=0.0),
        ValueError,
        "base_temperature 0.0 is too close to zero",
    ),
    "base temperature of a string": (
        lambda: sup_con_loss(f(8, 4), base_temperature="0.07"),
        TypeError,
        "base_temperature must be a number",
    ),
    "no temperature": (
        lambda: sup_con_loss(f(8, 4), logit_scale=0.0, base_temperature=0.07),
        ValueError,
        "logit_scale 0.0 has no temperature",
    ),
    "backend": (lambda: sup_con_loss(f(8, 4), backend="cuda"), ValueError, "backend 'cuda' is unknown"),
    "dimensions": (
        lambda: label_pull_loss(f(8, 4), ids(8), f(3, 5)),
        ValueError,
        "z (8, 4) and label_embeddings (3, 5) must have the same last dimension",
    ),
    "no embeddings": (lambda: label_pull_loss(f(8, 4), ids(8), f(0, 4)), ValueError, "label_embeddings (0, 4) is an"),
    "no rows": (lambda: label_pull_loss(f(0, 4), ids(0), f(3, 4)), ValueError, "z (0, 4) is an empty batch"),
    "mixed": (lambda: label_pull_loss(f(8, 4), ids(8), f(3, 4).double()), TypeError, "label_embeddings is torch.float"),
    "float classes": (lambda: label_pull_loss(f(8, 4), f(8), f(3, 4)), TypeError, "labels has dtype torch.float32"),
    "classes": (lambda: label_pull_loss(f(8, 4), ids(7), f(3, 4)), ValueError, "labels (7,) must have shape (8,)"),
    "form": (lambda: label_pull_loss(f(8, 4), ids(8), f(3, 4), form="push"), ValueError, "form 'push' is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert message in str(caught.value)


@pytest.mark.parametrize("function", [sup_con_loss, label_pull_loss])
def test_reference_has_the_same_arguments(function):
    ours = set(inspect.signature(function).parameters) - {"backend"}
    assert set(inspect.signature(getattr(reference, function.__name__)).parameters) - {"mask"} == ours


def test_the_outcome_of_a_wrong_loss_is_seen():
    """The comparison fails for another meaning of the loss, and for a gradient that is off by a thousandth."""
    case, labels = CASES["out"], some_labels(SHAPE[0])
    features = case.features(SHAPE)
    run = [differentiate(lambda **t: case(ck, t, labels=labels, positives=m), features) for m in ("out", "in")]  # noqa: B023
    with pytest.raises(AssertionError):
        assert_outcomes_match(*run, torch.float32)
    gradients = {k: 1.001 * g for k, g in run[0].gradients.items()}
    with pytest.raises(AssertionError):
        assert_outcomes_match(Outcome(run[0].value, gradients), run[0], torch.float32)
