"""What holds for every loss whatever its formula: edges, layouts, repeated bits, identities; and the mutants."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from tests.support.testing import (
    CASES,
    FAMILY,
    TOLERANCE,
    Case,
    assert_matches,
    assert_outcomes_match,
    case_params,
    check,
    device_of,
    differentiate,
    dtype_id,
    errors,
    precise,
    sizes,
    supports,
    thread_count,
    two,
)
from tests.support.variants import ALL, EVERY, SUP_CON

SHAPE = (33, 40, 24)
every_loss = pytest.mark.parametrize("case", case_params(ALL))
every_form = pytest.mark.parametrize("case", case_params(EVERY))


def test_every_loss_is_here():
    losses = {name for name in ck.__all__ if name.endswith("_loss") or name == "distance_polarization"}
    assert losses == {case.loss for case in ALL.values()}


# The comparison itself


def more(x):
    """Return x with a gradient larger by a tenth."""
    return x.detach() + 1.1 * (x - x.detach())


def without_first(x):
    """Return x with no gradient for its first row."""
    return torch.cat([x[:1].detach(), x[1:]])


class Mutant(Case):
    """A case of which ours has a wrong gradient for its first differentiable tensor."""

    def __call__(self, module, features, **options):
        if module is ck:
            name = next(k for k, x in features.items() if x.is_floating_point() and k not in self.detached)
            features = {**features, name: type(self).tamper(features[name])}
        return super().__call__(module, features, **options)


class WithoutPositive(Case):
    """A case of which ours has no gradient from the similarity of its positives."""

    def __call__(self, module, features, **options):
        loss = super().__call__(module, features, **options)
        if module is python_ref:
            return loss
        first, second = (F.normalize(x.float(), dim=1) for x in list(features.values())[:2])
        positive = 10.0 * (first * second).sum(1).mean()
        return loss + (positive - positive.detach()).to(loss)


def mutants():
    found = []
    for name, case in ALL.items():
        fields = vars(case)
        for tamper in (more, without_first):
            kind = type(tamper.__name__, (Mutant,), {"tamper": staticmethod(tamper)})
            found.append(pytest.param(kind(**fields), id=f"{name}-{tamper.__name__}"))
        if {*case.shapes(2, 2, 2)} & {"z1", "positive_key", "text_features"} and case.takes("logit_scale"):
            found.append(pytest.param(WithoutPositive(**fields), id=f"{name}-without_positive"))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("case", mutants())
def test_the_check_sees_a_wrong_gradient(case, dtype):
    """In every dtype: a tenth too much, a row without its gradient, the share of the positives missing."""
    options = {"logit_scale": 10.0} if case.takes("logit_scale") else {}
    right = Case(**vars(case))
    check(right, SHAPE, dtype, "torch", **options)
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="gradient of"):
        check(case, SHAPE, dtype, "torch", **options)


# The edges of the inputs


def collapsed(features):
    """Return one direction for all rows of all tensors."""
    return {k: torch.ones_like(x) if x.is_floating_point() else x for k, x in features.items()}


def opposed(features):
    """Return a second tensor, or second view, that is the negative of the first one."""
    (first, x), *others = features.items()
    if x.dim() == 3:
        return {**features, first: torch.cat([x[:, :1], -x[:, :1], x[:, 2:]], 1)}
    return {**features, **{k: -x for k, other in others[:1] if other.shape == x.shape}}


def duplicated(features):
    """Return every row twice."""
    return {k: torch.cat([x[::2], x[::2]]) if x.is_floating_point() else x for k, x in features.items()}


def with_zero_rows(features):
    """Return tensors whose first two rows are 0."""
    return {k: torch.cat([0 * x[:2], x[2:]]) if x.is_floating_point() else x for k, x in features.items()}


EDGES = {"collapsed": collapsed, "opposed": opposed, "duplicated": duplicated, "zero": with_zero_rows}


def outcome(case, features, backend, **options):
    on_device = {k: x.to(device_of(backend)) for k, x in features.items()}
    return differentiate(lambda **t: case(ck, t, **options, backend=backend), on_device)


def oracle(case, features, **options):
    wide = {k: x.double() if x.is_floating_point() else x for k, x in features.items()}
    return differentiate(lambda **t: case(python_ref, t, **options), wide)


@pytest.mark.parametrize("edge", EDGES)
@every_loss
def test_edges(case, edge, backend):
    """The reference's value and gradients; finite ones where equal similarities leave the selection open."""
    dtype = precise(backend)
    features = EDGES[edge](case.features((32, 40, 24), dtype))
    ours, reference = outcome(case, features, backend), oracle(case, features)
    for name, expected in reference.gradients.items():
        assert (ours.gradients[name] is None) == (expected is None)
        assert expected is None or ours.gradients[name].isfinite().all()
    assert ours.value.isfinite()
    # the reference flags the first of equal similarities, ours all or none of them
    if not (case.loss == "false_negative_loss" and edge in ("collapsed", "duplicated")):
        # the weights of the support vectors are up to 100
        assert_matches(ours.value, reference.value, dtype, scale=100.0)
        assert_outcomes_match(ours._replace(value=reference.value), reference, dtype, 1e3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", case_params({k: c for k, c in ALL.items() if c.takes("logit_scale")}))
def test_scale_of_100(case, dtype, backend):
    """The temperature 0.01: a hundred times the rounding of a similarity, in the logits."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    features = case.features((65, 129, 24), dtype)
    ours, reference = outcome(case, features, backend, logit_scale=100.0), oracle(case, features, logit_scale=100.0)
    for name, expected in {"value": reference.value, **reference.gradients}.items():
        if expected is not None:
            error = errors(ours.value if name == "value" else ours.gradients[name], expected)[0]
            assert error <= 2.5 * TOLERANCE[dtype] * sizes(expected)[0], name


@pytest.mark.parametrize(("value", "options"), [(float("nan"), {}), (float("inf"), {"normalize": True})], ids=str)
@every_form
def test_nan_and_infinity_give_nan(case, value, options, backend):
    """In one feature of one row of any tensor."""
    features = case.features(SHAPE, torch.float32, device_of(backend))
    if case.takes("reduction"):
        options = {"reduction": "mean", **options}
    for name in (k for k, x in features.items() if x.is_floating_point()):
        # the first row, and a row that may serve only to choose others
        for place in (1, -3):
            poisoned = features[name].clone()
            poisoned.view(-1)[place] = value
            assert case(ck, {**features, name: poisoned}, **options, backend=backend).isnan(), name


@every_form
def test_infinity_in_raw_rows_gives_no_number(case, backend):
    """The similarities are infinite, and so the loss may be, but it is not finite."""
    features = case.features(SHAPE, torch.float32, device_of(backend))
    # A paired negative has one similarity; where that is -inf, it has no part in the loss.
    names = features.keys() - ({"negative_keys"} if case.options.get("negative_mode") == "paired" else set())
    options = {"reduction": "mean"} if case.takes("reduction") else {}
    for name in (k for k in names if features[k].is_floating_point()):
        poisoned = features[name].clone()
        poisoned.view(-1)[1] = float("inf")
        loss = case(ck, {**features, name: poisoned}, normalize=False, **options, backend=backend)
        assert not loss.isfinite(), name


# Layouts, repeated calls, wanted gradients


def strided(x):
    """Return x with every other number of a transposed tensor."""
    wide = torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]
    return wide.mT.contiguous().mT if x.dim() == 3 else wide if x.dim() == 1 else wide.T.contiguous().T


def interleaved(x):
    return torch.stack([x, x], -1)[..., 0]


def transposed(x):
    """Return x with its rows as the last dimension in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@every_form
def test_inputs_in_any_layout(case, backend, poison):
    """Transposed and strided tensors are as good as contiguous ones, and none is written to."""
    features = case.features(SHAPE, torch.float32, device_of(backend))
    expected = outcome(case, features, backend)
    for layout in (strided, interleaved, transposed):
        other = {k: layout(x) for k, x in features.items()}
        before = {k: x.clone() for k, x in other.items()}
        # the norms may be summed in another order
        assert_outcomes_match(outcome(case, other, backend), expected, torch.float32, 1.0)
        assert all(torch.equal(before[k], x) for k, x in other.items())


@every_form
def test_inputs_stay_as_they_were_and_bits_repeat(case, backend):
    """So many rows, and without `use_deterministic_algorithms`, that threads share out what PyTorch itself adds up."""
    features = case.features((520, 129, 100), torch.float32, device_of(backend))
    before = {k: x.clone() for k, x in features.items()}
    first, again = outcome(case, features, backend), outcome(case, features, backend)
    assert all(torch.equal(before[k], x) for k, x in features.items())
    assert torch.equal(first.value, again.value)
    for name, gradient in first.gradients.items():
        assert gradient is None or torch.equal(gradient, again.gradients[name])


@every_form
def test_gradients_that_are_not_wanted(case, backend):
    """One tensor at a time asks for its gradient and gets the one it gets among others; without any, no graph."""
    features = case.features(SHAPE, torch.float32, device_of(backend))
    options = {"reduction": "mean"} if case.takes("reduction") else {}
    expected = outcome(case, features, backend, **options)
    plain = case(ck, features, **options, backend=backend)
    assert not plain.requires_grad
    for name, gradient in expected.gradients.items():
        if gradient is None:
            continue
        leaf = features[name].clone().requires_grad_()
        loss = case(ck, {**features, name: leaf}, **options, backend=backend)
        loss.backward(torch.tensor(0.7, device=loss.device))
        got = expected._replace(value=loss.detach(), gradients={name: leaf.grad})
        assert_outcomes_match(got, expected._replace(gradients={name: gradient}), torch.float32)
        with torch.no_grad():
            assert not case(ck, {**features, name: leaf}, **options, backend=backend).requires_grad


@pytest.mark.parametrize("threads", [1, 2])
@every_form
def test_the_value_does_not_depend_on_the_gradients(case, threads, backend):
    """The same bits, whether gradients are wanted or not."""
    if device_of(backend) != "cpu" or backend == "triton":
        pytest.skip("a kernel of the gradients adds up in tiles of its own")
    features = case.features(SHAPE if case.loss == "mmcl_loss" else (520, 129, 100), torch.float32)
    leaves = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in features.items()}
    with thread_count(threads):
        for reduction in ("mean", "sum") if case.takes("reduction") else (None,):
            options = {} if reduction is None else {"reduction": reduction}
            with torch.no_grad():
                alone = case(ck, features, **options, backend=backend)
            assert torch.equal(case(ck, leaves, **options, backend=backend).detach(), alone)


@every_form
def test_a_large_upstream_gradient(case, backend):
    """A power of two, which rounds nothing, as a scaler of gradients may multiply with: no product overflows."""
    features = case.features(SHAPE, torch.float32, device_of(backend))
    options = {"reduction": "mean"} if case.takes("reduction") else {}
    if case.takes("logit_scale") and "temperature" not in case.options:
        options["logit_scale"] = 40.0
    leaves = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in features.items()}
    loss = case(ck, leaves, **options, backend=backend)
    wanted = [x for k, x in leaves.items() if x.is_floating_point() and k not in case.detached]
    plain = torch.autograd.grad(loss, wanted, retain_graph=True)
    large = torch.autograd.grad(loss, wanted, torch.full_like(loss, 2.0**90))
    for got, expected in zip(large, plain, strict=True):
        close(got / 2.0**90, expected)


# Identities


def close(ours, expected, scale=10.0):
    assert_matches(ours.detach(), expected.detach(), ours.dtype, scale=scale)


ORDERED = {k: c for k, c in EVERY.items() if c.loss != "quick_thoughts_loss" and k not in CASES}


@pytest.mark.parametrize("case", case_params(ORDERED))
def test_order_of_samples_is_irrelevant(case, backend):
    """I17 permutation: of the samples, and of the queue or the support on its own; test_properties.py has CASES."""
    features = case.features(SHAPE, precise(backend), device_of(backend))
    order = {n: torch.randperm(n).to(device_of(backend)) for n in sorted({len(x) for x in features.values()})}
    # labels are the numbers of the embeddings
    shuffled = {k: x if k == "label_embeddings" else x[order[len(x)]] for k, x in features.items()}
    options = {"reduction": "mean"} if case.takes("reduction") else {}
    close(case(ck, shuffled, **options, backend=backend), case(ck, features, **options, backend=backend), 20.0)


def counts_anchors(case):
    """Return whether the mean is over all anchors, not over pairs or over the anchors with a label."""
    by_pairs = case.options.get("positives") == "pairwise" or case.loss == "triplet_margin_loss"
    return case.options.get("mining") == "hardest" or not (by_pairs or case.loss == "label_pull_loss")


# A polarization is a mean over pairs whatever the reduction.
REDUCED = {
    k: c
    for k, c in EVERY.items()
    if c.takes("reduction") and k not in CASES and k != "distance_polarization" and "polarization" not in c.options
}


@pytest.mark.parametrize("case", case_params(REDUCED))
def test_reductions_agree(case, backend):
    """The mean and the sum of the losses of all anchors; test_properties.py has CASES."""
    features = case.features(SHAPE, precise(backend), device_of(backend))
    each, total, mean = (case(ck, features, reduction=r, backend=backend) for r in ("none", "sum", "mean"))
    close(total, each.sum(), 10.0 * each.numel())
    if counts_anchors(case):
        close(mean, each.mean())


SHIFTED = {
    "info_nce": CASES["info_nce"],
    "info_nce-symmetric": CASES["info_nce-symmetric"],
    "nt_xent": CASES["nt_xent"],
    "clip": CASES["clip"],
    "moco": CASES["moco"],
    **{name: FAMILY[name] for name in ("sup_con", "sup_con-in", "sup_con-pairwise", "label_pull-softmax")},
    **{name: FAMILY[name] for name in ("debiased", "hard_negative", "decoupled", "nnclr", "easy_negative")},
    "false_negative": Case("false_negative_loss", two("z0", "z1"), {"threshold": None, "top_k": 5}),
    "quick_thoughts-exclude": Case("quick_thoughts_loss", two("first", "second"), {"diagonal": "exclude"}),
}
# A logit of 0 in the denominator, a floor, a sigmoid.
MOVED = {
    "quick_thoughts": FAMILY["quick_thoughts"],
    "debiased-floor": Case("debiased_loss", two("z0", "z1"), {"tau_plus": 0.9}),
    "siglip": FAMILY["siglip"],
}


@pytest.mark.parametrize(
    ("case", "moves"),
    [pytest.param(c, False, id=k) for k, c in SHIFTED.items()]
    + [pytest.param(c, True, id=k) for k, c in MOVED.items()],
)
def test_similarities_may_be_shifted(case, moves, backend):
    """I15 zero row sums: one coordinate more, the same for all rows, adds a constant to all similarities."""
    features = replace(case, unit=True).features((33, 40, 24), precise(backend), device_of(backend))
    wider = {k: F.pad(x, (0, 1), value=0.3) if x.is_floating_point() else x for k, x in features.items()}
    options = {"normalize": False, "reduction": "none", "logit_scale": 2.0, "backend": backend}
    plain, shifted = case(ck, features, **options), case(ck, wider, **options)
    if moves:
        assert ((shifted - plain).abs() > 1e-3).any()
    else:
        close(shifted, plain)


TWO_SIDED = ("quick_thoughts", "quick_thoughts-exclude")
# Losses that depend on the scaled similarities alone, and a scale that leaves the losses of these rows moderate.
SCALED = {
    **dict.fromkeys(("nnclr", "false_negative", "false_negative-attract", "easy_negative"), 5.0),
    **dict.fromkeys((name for name in SUP_CON if "first" not in name), 0.6),
    **dict.fromkeys(("decoupled", *TWO_SIDED), 3.0),
}


@pytest.mark.parametrize("name", SCALED)
def test_scale_gradient_is_the_inner_product(name, backend):
    """I10 scale gradient: <X, dX>, the same of each of two sides, half of it where both sides are one."""
    case = EVERY[name]
    if name in ("decoupled", *TWO_SIDED):
        case = replace(case, unit=True)
    features = case.features((33, 40, 12), precise(backend), device_of(backend))
    scale = torch.tensor(SCALED[name], dtype=precise(backend), device=device_of(backend))
    got = differentiate(
        lambda logit_scale, **t: case(ck, t, logit_scale=logit_scale, normalize=False, backend=backend),
        {**features, "logit_scale": scale},
    ).gradients
    inner = [(features[k] * got[k]).sum() for k in features if got.get(k) is not None]
    assert got["logit_scale"].abs() > 1e-3
    for expected in inner if name in TWO_SIDED else [sum(inner) / (1 if case.detached else 2)]:
        close(scale * got["logit_scale"], expected)


def test_the_gradient_of_info_nce_in_closed_form(backend):
    """I18 closed gradient: dX = (O - Y) / (N T), O the rows of Y weighted by the softmax."""
    x, y = F.normalize(torch.randn(2, 33, 24, dtype=precise(backend), device=device_of(backend)), dim=-1)
    loss = ck.info_nce_loss(x.requires_grad_(), y, temperature=0.2, normalize=False, backend=backend)
    (got,) = torch.autograd.grad(loss, x)
    close(got, ((x @ y.T / 0.2).softmax(1) @ y - y) / (33 * 0.2))


@pytest.mark.parametrize("positives", ["out", "in", "pairwise"])
def test_without_labels_nothing_is_ignored(positives, backend):
    """I16 nothing dropped: "ignore" is "negative" when no row has a label."""
    features = torch.randn(33, 2, 24, dtype=precise(backend), device=device_of(backend))
    unlabelled = torch.full((33,), -1, device=features.device)
    ignore, negative = (
        ck.sup_con_loss(features, unlabelled, positives=positives, same_label=same_label, backend=backend)
        for same_label in ("ignore", "negative")
    )
    close(ignore, negative)


def test_the_trace_of_the_correlation_is_a_distance():
    """I14 alignment split: sum_a (1 - C_aa) is half the mean squared distance; Barlow Twins squares its terms."""
    z0, z1 = torch.randn(2, 33, 1, dtype=torch.float64)
    first, second = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z0, z1))
    # the epsilon of the variance keeps their squares just below 1
    below = 1 - (first.square().mean() + second.square().mean()) / 2
    distance = (first - second).square().mean() / 2 + below
    close(ck.barlow_twins_loss(z0, z1), distance**2)
