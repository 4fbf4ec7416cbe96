"""SupCon in its three meanings, with partial labels; test_every_loss.py has what it shares with the other losses."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.losses import Largest, assert_module_is_function, assert_refused
from tests.support.testing import (
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
from tests.support.variants import MEANINGS, SUP_CON, partial_labels

SHAPE = (65, 1, 24)
every_form = pytest.mark.parametrize("case", case_params(SUP_CON))


def without_labels(case):
    """Return the case of the same features that takes its labels as an option."""
    return Case(case.loss, lambda n, m, d: {"features": case.shapes(n, m, d)["features"]}, case.options)


OPTIONS = {
    "with positives": lambda n: {"average": "with_positives"},
    "weight, with positives": lambda n: {"weight": torch.rand(n).double(), "average": "with_positives"},
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
@every_form
def test_options(case, name, backend, poison):
    """In float32; the scalars' gradients are in their own dtype."""
    n = SHAPE[0]
    options = {"labels": partial_labels(n), **OPTIONS[name](n)}
    ours, _ = check(without_labels(case), SHAPE, torch.float32, backend, **options)
    for scalar in ("logit_scale", "temperature", "base_temperature"):
        if scalar in ours.gradients:
            assert ours.gradients[scalar].dtype == torch.float64


@every_form
def test_statistics_without_labels(case, backend, poison):
    for shape in ((1, 1, 24), SHAPE):
        check_statistics(without_labels(case), shape, torch.float32, backend, reduction="none")


@pytest.mark.parametrize("temperature", [0.01, 0.05])
@pytest.mark.parametrize("meaning", MEANINGS)
def test_cold_two_views_keep_their_digits(meaning, temperature, backend):
    """Losses that the difference of log-sum-exp and logit rounds to 0 or to 1e-6."""
    z = F.normalize(torch.eye(24)[:20] + 0.02 * torch.randn(20, 24), dim=1)
    features = torch.stack([z, F.normalize(z + 0.05 * torch.randn(20, 24), dim=1)], 1)
    options = dict(positives=meaning, temperature=temperature, normalize=False, reduction="none")
    ours = differentiate(
        lambda features: ck.sup_con_loss(features, **options, backend=backend),
        {"features": features.to(device_of(backend))},
    )
    # the reference of "out" and "in" is a sum whose gradient cancels to a rounding of 1
    single = {**options, "positives": "pairwise"}
    expected = differentiate(
        lambda features: python_ref.sup_con_loss(features, **single), {"features": features.double()}
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
    expected = python_ref.sup_con_loss(features.double(), **options)
    assert 1e-10 < expected.median() < 1e-6
    options["labels"] = labels.to(device_of(backend))
    ours = ck.sup_con_loss(features.to(device_of(backend)), **options, backend=backend)
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=0)


# Identities


def drawn(backend, n=21, count=3, d=8):
    return torch.randn(n, count, d, dtype=precise(backend), device=device_of(backend))


def close(ours, expected, scale=10.0):
    assert_matches(ours.detach(), expected.detach().cpu(), ours.dtype, scale=scale)


@pytest.mark.parametrize("count", [2, 3])
def test_without_labels_it_is_nt_xent(count, backend):
    """I2 SupCon limits: and its multiple with a base temperature."""
    features = drawn(backend, count=count)
    weight = torch.rand(len(features), dtype=features.dtype, device=features.device)
    for reduction in ("mean", "sum", "none"):
        options = dict(temperature=0.3, reduction=reduction, weight=weight, backend=backend)
        expected = ck.nt_xent_loss(features, **options)
        close(ck.sup_con_loss(features, **options), expected)
        close(ck.sup_con_loss(features, base_temperature=0.1, **options), 3 * expected)
        unlabelled = torch.full((len(features),), -1, device=features.device)
        for same_label in ("positive", "ignore", "negative"):
            close(ck.sup_con_loss(features, unlabelled, same_label=same_label, **options), expected)


@pytest.mark.parametrize("labelled", [False, True])
def test_of_one_positive_all_meanings_are_nt_xent(labelled, backend):
    """I2 SupCon limits: two views of a sample, or two samples of a class."""
    features = drawn(backend, count=2)
    labels = torch.arange(len(features), device=features.device) if labelled else None
    expected = ck.nt_xent_loss(*features.unbind(1), temperature=0.3, reduction="none", backend=backend)
    for meaning in MEANINGS:
        options = dict(temperature=0.3, positives=meaning, reduction="none", backend=backend)
        close(ck.sup_con_loss(features, labels, **options), expected)
    pairs = torch.arange(len(features), device=features.device).repeat(2)
    flat = features.transpose(0, 1).flatten(0, 1)
    for meaning in MEANINGS:
        options = dict(temperature=0.3, positives=meaning, reduction="none", backend=backend)
        close(ck.sup_con_loss(flat, pairs, **options), expected)


@pytest.mark.parametrize("same_label", ["positive", "ignore", "negative"])
def test_in_and_pairwise_are_not_above_out(same_label, backend):
    """I2 SupCon limits: per anchor; and the meanings are different losses."""
    features, labels = drawn(backend), partial_labels(21).to(device_of(backend))
    options = dict(same_label=same_label, temperature=0.3, reduction="none", backend=backend)
    outside, inside, pairwise = (ck.sup_con_loss(features, labels, positives=m, **options) for m in MEANINGS)
    for loss in (inside, pairwise):
        assert (loss <= outside + 1e-5).all()
        assert (loss < outside - 1e-3).any()


def test_a_policy_for_the_same_label(backend):
    """ "ignore" leaves out candidates, so it is below "negative"; there the labels have no effect."""
    features, labels = drawn(backend), partial_labels(21, 3).to(device_of(backend))
    options = dict(temperature=0.3, reduction="none", backend=backend)
    ignore = ck.sup_con_loss(features, labels, same_label="ignore", **options)
    negative = ck.sup_con_loss(features, labels, same_label="negative", **options)
    plain = ck.sup_con_loss(features, **options)
    close(negative, plain)
    labelled = (labels >= 0).repeat(3) & (labels < 10**12).repeat(3)
    assert (ignore < plain - 1e-4)[labelled].all()
    close(ignore[~labelled], plain[~labelled])


@every_form
def test_names_of_classes_and_order_of_samples_are_irrelevant(case, backend):
    """I17 permutation: the labels may be any integers, also those that ids inside could take, in any integer dtype."""
    n, device = 21, device_of(backend)
    case = without_labels(case)
    features = case.features((n, 1, 8), precise(backend), device)["features"]
    labels = partial_labels(n, 5)
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


def test_pairwise_is_the_mean_over_pairs(backend):
    """An anchor counts once for each of its positives."""
    features, labels = drawn(backend), torch.tensor([0] * 6 + [1] * 4 + [2] + [-1] * 10, device=device_of(backend))
    k = torch.tensor([17.0] * 6 + [11.0] * 4 + [2.0] * 11, dtype=features.dtype, device=features.device).repeat(3)
    options = dict(positives="pairwise", backend=backend)
    each = ck.sup_con_loss(features, labels, reduction="none", **options)
    for average in ("all", "with_positives"):
        close(ck.sup_con_loss(features, labels, average=average, **options), (k * each).sum() / k.sum())


# Edges


@pytest.mark.parametrize("same_label", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("meaning", MEANINGS)
def test_no_positives_at_all(meaning, same_label, backend, poison):
    """Classes of one member, no labels, one sample: loss 0, gradient 0, whatever the mean is over."""
    device = device_of(backend)
    for n, labels in ((9, torch.arange(9)), (9, torch.full((9,), -1)), (9, None), (1, torch.zeros(1).long())):
        features = {"features": torch.randn(n, 24, device=device)}
        given = labels if labels is None else labels.to(device)
        fixed = dict(labels=given, positives=meaning, same_label=same_label, backend=backend)
        for options in ({}, {"average": "with_positives"}, {"reduction": "sum"}, {"reduction": "none"}):
            out = differentiate(lambda features: ck.sup_con_loss(features, **fixed, **options), features)  # noqa: B023
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
        options = dict(positives=meaning, contrast_mode=contrast_mode, reduction="none", backend=backend)
        return differentiate(lambda features: ck.sup_con_loss(features, labels, **options), features)

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


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@every_form
def test_half_precision_accumulates_in_float32(case, dtype, backend):
    """Similarities and sums of classes of rows that are rounded already have the digits of float32."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    case = without_labels(case)
    features = F.normalize(case.features(SHAPE)["features"], dim=-1).to(dtype)
    options = dict(normalize=False, reduction="none", temperature=0.5)
    labels = torch.arange(SHAPE[0]) // 20
    expected = case(python_ref, {"features": features.double()}, labels=labels, **options)
    device = device_of(backend)
    ours = case(ck, {"features": features.to(device)}, labels=labels.to(device), **options, backend=backend)
    assert_matches(ours, expected, torch.float32, scale=2)


@pytest.mark.skipif(not supports("cpp", torch.float32), reason="the torch backend holds chunks of the matrix")
@every_form
def test_nothing_is_quadratic_in_the_batch(case, monkeypatch):
    """Neither the similarities nor a matrix of labels, forward and backward."""
    monkeypatch.setenv("CONTRASTIVE_KERNELS_SAVED_SCORES_MB", "0")
    features = case.features((400, 1, 8), torch.float32)
    features["features"].requires_grad_()
    with Largest() as largest:
        case(ck, features, backend="cpp").backward()
    # a few vectors of (V N, D), V = 3
    assert 400 * 8 <= largest.elements <= 2 * 3 * 400 * 8


def test_softplus_with_a_bias_per_row(backend):
    """The term that "pairwise" sums."""
    x, y = torch.randn(33, 8).double(), torch.randn(17, 8).double()
    bias = torch.linspace(-30, 30, 33).double()

    def ours(x, y, bias):
        return ck.similarity_sum(x, y, term=ck.Softplus(-2.0, bias), backend=backend)

    def expected(x, y, bias):
        term = type("Softplus", (SimpleNamespace,), {})(scale=-2.0, bias=bias[:, None])
        return python_ref.similarity_sum(x, y, term=term)

    tensors = {"x": x.float(), "y": y.float(), "bias": bias.float()}
    assert_outcomes_match(
        differentiate(ours, {k: v.to(device_of(backend)) for k, v in tensors.items()}),
        differentiate(expected, {k: v.double() for k, v in tensors.items()}),
        torch.float32,
        scale=1.0,
    )
    with pytest.raises(ValueError, match=r"bias \(32,\) must have shape \(33,\)"):
        ck.similarity_sum(x, y, term=ck.Softplus(1.0, bias[1:]))


def test_the_outcome_of_a_wrong_loss_is_seen():
    """The comparison fails for another meaning of the loss, and for a gradient that is off by a thousandth."""
    case = SUP_CON["sup_con-out-partial"]
    features = case.features(SHAPE)
    run = [differentiate(lambda **t: case(ck, t, positives=m), features) for m in ("out", "in")]  # noqa: B023
    with pytest.raises(AssertionError):
        assert_outcomes_match(*run, torch.float32)
    gradients = {k: 1.001 * g for k, g in run[0].gradients.items()}
    with pytest.raises(AssertionError):
        assert_outcomes_match(Outcome(run[0].value, gradients), run[0], torch.float32)


# The module and bad input


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((12, 2, 16), {"temperature": 0.2, "positives": "in"}),
        ((12, 16), {"logit_scale": 4.0, "reduction": "none"}),
    ],
    ids=["views", "one view"],
)
@pytest.mark.parametrize("labelled", [False, True])
def test_module_is_its_function(labelled, shape, options, backend):
    features = torch.randn(shape, device=device_of(backend))
    inputs = (features, partial_labels(12).to(features.device)) if labelled else (features,)
    weight = torch.rand(12, device=features.device)
    assert_module_is_function(ck.SupConLoss, ck.sup_con_loss, inputs, options, backend, weight=weight)


def test_module_trains_its_temperature(backend):
    features = torch.randn(12, 2, 8, device=device_of(backend))
    loss = ck.SupConLoss(torch.nn.Parameter(torch.tensor(0.3)), backend=backend).to(features.device)
    loss(features, torch.arange(12, device=features.device) // 3).backward()
    assert loss.temperature.grad.abs() > 0


def f(*shape):
    return torch.randn(*shape)


def ids(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


def sup_con(*labels, **options):
    return ck.sup_con_loss(f(8, 4), *labels, **options)


def test_a_long_row_is_no_part_of_its_positives(backend):
    """Its square, a hundred million times the products, would leave no digit of the mean of its positives."""
    features, labels = torch.randn(33, 1, 24, dtype=torch.float64), torch.arange(33) % 3
    features[4] *= 1e4
    options = {"temperature": 1e3, "normalize": False, "reduction": "none", "return_stats": True}
    features, device = features.float(), device_of(backend)
    _, stats = ck.sup_con_loss(features.to(device), labels.to(device), **options, backend=backend)
    _, expected = python_ref.sup_con_loss(features.double(), labels, **options)
    torch.testing.assert_close(stats.positive_logit.cpu().double(), expected.positive_logit, rtol=1e-4, atol=1e-6)


BAD = {
    "a list": (lambda: ck.sup_con_loss([[1.0]]), TypeError, "features must be a tensor, not list"),
    "a vector": (lambda: ck.sup_con_loss(f(8)), ValueError, "features (8,) must have shape (N, V, D)"),
    "no views": (lambda: ck.sup_con_loss(f(8, 0, 4)), ValueError, "features (8, 0, 4) must have at least 1 views"),
    "empty": (lambda: ck.sup_con_loss(f(0, 2, 4)), ValueError, "features (0, 2, 4) is an empty batch"),
    "integers": (lambda: ck.sup_con_loss(ids(8, 4)), TypeError, "features has dtype torch.int64"),
    "complex labels": (lambda: sup_con(f(8) + 0j), TypeError, "labels has dtype torch.complex64"),
    "unlabelled": (lambda: sup_con(ids(8), unlabelled="none"), TypeError, "unlabelled must be a number"),
    "label per row": (
        lambda: ck.sup_con_loss(f(8, 2, 4), ids(16)),
        ValueError,
        "labels (16,) must have shape (8,)",
    ),
    "one-hot labels": (lambda: sup_con(ids(8, 3)), ValueError, "labels (8, 3) must have shape (8,)"),
    "labels elsewhere": (lambda: sup_con(ids(8).to("meta")), RuntimeError, "labels is on meta"),
    "weight": (lambda: ck.sup_con_loss(f(8, 2, 4), weight=f(16)), ValueError, "weight (16,) must have shape (8,)"),
    "positives": (lambda: sup_con(positives="all"), ValueError, "positives 'all' is unknown"),
    "same_label": (lambda: sup_con(same_label="drop"), ValueError, "same_label 'drop' is unknown"),
    "average": (lambda: sup_con(average="pairs"), ValueError, "average 'pairs' is unknown"),
    "contrast_mode": (lambda: sup_con(contrast_mode="two"), ValueError, "contrast_mode 'two' is unknown"),
    "reduction": (lambda: sup_con(reduction="row"), ValueError, "reduction 'row' is unknown"),
    "temperature": (lambda: sup_con(temperature=0.0), ValueError, "temperature 0.0"),
    "both scales": (lambda: sup_con(temperature=0.1, logit_scale=1.0), ValueError, "temperature and logit_scale"),
    "base temperature": (
        lambda: sup_con(base_temperature=0.0),
        ValueError,
        "base_temperature 0.0 is too close to zero",
    ),
    "base temperature of a string": (
        lambda: sup_con(base_temperature="0.07"),
        TypeError,
        "base_temperature must be a number",
    ),
    "no temperature": (
        lambda: sup_con(logit_scale=0.0, base_temperature=0.07),
        ValueError,
        "logit_scale 0.0 has no temperature",
    ),
    "backend": (lambda: sup_con(backend="cuda"), ValueError, "backend 'cuda' is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    assert_refused(*BAD[name])


# The reference


def test_reference_has_the_same_arguments():
    ours = {*inspect.signature(ck.sup_con_loss).parameters} - {"backend", "group"}
    assert {*inspect.signature(python_ref.sup_con_loss).parameters} - {"mask"} == ours


def official(features, mask, temperature, contrast_mode="all"):
    """Return the published formula with a mask of positives, as its code has it: exponentials, mask, log."""
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
        expected = official(features, mask, 0.3, contrast_mode)
        ours = python_ref.sup_con_loss(features, **given, temperature=0.3, contrast_mode=contrast_mode)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def test_reference_by_hand():
    """T = 1, two of a class at cosine 0.6, one other at cosine 0 and 0.8."""
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]).double()
    labels = torch.tensor([0, 0, 1])
    expected = torch.tensor([math.log1p(math.exp(0 - 0.6)), math.log1p(math.exp(0.8 - 0.6)), 0]).double()
    for meaning in MEANINGS:
        each = python_ref.sup_con_loss(z, labels, temperature=1.0, positives=meaning, reduction="none")
        torch.testing.assert_close(each, expected)
    for average, count in (("all", 3), ("with_positives", 2)):
        mean = python_ref.sup_con_loss(z, labels, temperature=1.0, average=average)
        torch.testing.assert_close(mean, expected.sum() / count)
    # the third in the class as well, but unlabelled the second
    labels = torch.tensor([0, -1, 0])
    first = math.log(math.exp(0.6) + 1)
    each = python_ref.sup_con_loss(z, labels, temperature=1.0, reduction="none")
    torch.testing.assert_close(each[:2], torch.tensor([first, 0]).double())
    # two positives, no negatives
    each = {
        m: python_ref.sup_con_loss(z, labels * 0, temperature=1.0, positives=m, reduction="none")[0] for m in MEANINGS
    }
    assert each["out"].item() == pytest.approx(first - 0.3)
    assert each["in"].item() == pytest.approx(math.log(2))
    assert each["pairwise"] == 0
