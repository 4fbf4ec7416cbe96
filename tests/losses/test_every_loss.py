"""Every loss in every form against the reference: values and gradients, options, statistics, derivatives.

The file of a loss has what is its own; test_invariants.py has what holds without a reference.
"""

import pytest
import torch

import contrastive_kernels as ck
import python_ref
from tests.support.testing import (
    CASES,
    HALF,
    OPTIONS,
    SOFTMAX,
    assert_matches,
    assert_outcomes_match,
    case_params,
    check,
    check_statistics,
    device_of,
    differentiate,
    dtype_id,
    matching_ids,
    precise,
    shape_id,
    supports,
)
from tests.support.variants import DECOUPLED, EVERY, MOMENTS, NEGATIVES, grid_of, rows_as_they_are

SHAPE = (65, 129, 24)  # one row more than a tile, M != N, D no multiple of 16


def compared(case, features, backend, **options):
    """Return the outcomes of `case` on the backend and of the reference in float64 on the same features."""
    on_device = {k: x.to(device_of(backend)) for k, x in features.items()}
    wide = {k: x.double() if x.is_floating_point() else x for k, x in features.items()}
    return (
        differentiate(lambda **t: case(ck, t, backend=backend, **options), on_device),
        differentiate(lambda **t: case(python_ref, t, **options), wide),
    )


# Values and gradients


def each_loss(case):
    """Return the option for the loss of every anchor, unless the case has a reduction of its own or takes none."""
    return {"reduction": "none"} if case.takes("reduction") and "reduction" not in case.options else {}


GRID = [
    pytest.param(case, shape, dtype, id=f"{name}-{shape_id(shape)}-{dtype_id(dtype)}")
    for name, case in EVERY.items()
    for shape, dtype in grid_of(case)
]


@pytest.mark.parametrize(("case", "shape", "dtype"), GRID)
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    """Every anchor's loss, and the gradient for an upstream gradient that differs from anchor to anchor."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    check(case, shape, dtype, backend, **each_loss(case), **rows_as_they_are(case, dtype))


@pytest.mark.parametrize("d", [1, 63])
@pytest.mark.parametrize("case", case_params(MOMENTS))
def test_moments_of_two_rows(case, d, backend, poison):
    """Standardised columns are 1 and -1 whatever the rows: gradients are rounding over a small standard deviation."""
    ours, reference = compared(case, case.features((2, 2, d), torch.float32), backend)
    # the epsilon of the variance leaves the last digits of the gradients
    assert_outcomes_match(ours, reference, torch.float16, 2e3)


# Options


SCALES = {"temperature", "logit_scale"}
# Their estimate of the negatives is a difference, which loses digits at a lower temperature.
DIFFERENCES = ("debiased-floor", "hard_negative-floor")


def applies(option, case):
    """Return whether a case takes all arguments of an option and its own options do not exclude them."""
    arguments = {*OPTIONS[option](case, 4, 4)}
    scales = SCALES & arguments, SCALES & {*case.options}
    return all(case.takes(k) for k in arguments) and (not all(scales) or scales[0] == scales[1])


OPTION_PARAMS = [
    pytest.param(case, OPTIONS[option], id=f"{name}-{option.replace(' ', '_')}")
    for name, case in EVERY.items()
    if name not in DIFFERENCES
    for option in OPTIONS
    if applies(option, case)
]


@pytest.mark.parametrize(("case", "options"), OPTION_PARAMS)
def test_options(case, options, backend, poison):
    """In float32, so that what must stay exact under rounding is seen; the scales' gradients are in their own dtype."""
    ours, _ = check(case, SHAPE, torch.float32, backend, **options(case, *SHAPE[:2]))
    for name in ("logit_scale", "temperature"):
        if name in ours.gradients and ours.gradients[name] is not None:
            assert ours.gradients[name].dtype == torch.float64


@pytest.mark.parametrize("case", case_params({k: c for k, c in EVERY.items() if c.unit and c.takes("normalize")}))
def test_rows_of_any_length_are_normalised(case, backend, poison):
    """Unit rows of other lengths select the same pairs, also at a cold temperature."""
    features = {
        k: x * (1 + torch.rand(*x.shape[:-1], 1)) if x.dim() > 1 else x
        for k, x in case.features(SHAPE, torch.float32).items()
    }
    cold = [{"temperature": 0.02}] if case.takes("temperature") and case.scale == "temperature" else []
    for options in ({}, *cold):
        ours, reference = compared(case, features, backend, normalize=True, **options)
        assert_outcomes_match(ours, reference, torch.float32, 20.0)


STATISTICS = [
    pytest.param(case, with_ids, id=f"{name}-{'ids' if with_ids else 'all'}")
    for name, case in EVERY.items()
    if case.takes("return_stats") and case.loss != "mmcl_loss"
    for with_ids in ((False, True) if applies("ids", case) else (False,))
]


@pytest.mark.parametrize("shape", [(1, 1, 24), SHAPE], ids=shape_id)
@pytest.mark.parametrize(("case", "with_ids"), STATISTICS)
def test_statistics(case, shape, with_ids, backend, poison):
    options = matching_ids(case, *shape[:2]) if with_ids else {}
    check_statistics(case, shape, torch.float32, backend, **options)
    further = {"cutoff_margin": 0.1} if case.takes("cutoff_margin") else {}
    check_statistics(case, shape, torch.float32, backend, reduction="none", **further, **options)


# Anchors without negatives, zero rows

# Losses in which the positive alone is left.
LONELY = (*SOFTMAX, "debiased", "hard_negative", *NEGATIVES, *DECOUPLED)
LONELY_PARAMS = [
    pytest.param(case, why, id=f"{name}-{why.replace(' ', '_')}")
    for name, case in EVERY.items()
    if name in LONELY and name != "nt_xent-views"
    for why in ("ids", "cutoff", "single sample")
    # one sample has no negatives if they come from the batch
    if why != "single sample" or not {"queue", "negative_keys"} & {*case.shapes(1, 1, 1)}
]


@pytest.mark.parametrize(("case", "why"), LONELY_PARAMS)
def test_anchors_without_negatives_lose_nothing(case, why, backend, poison):
    """Loss 0, gradient 0 and accuracy 1 for equal ids, for a cutoff below everything and for a single sample."""
    n, m, d = SHAPE
    if why == "single sample":
        n, m, options = 1, 1, {}
    elif why == "ids":
        options = {k: torch.zeros_like(v).to(device_of(backend)) for k, v in matching_ids(case, n, m).items()}
    else:
        options = {"cutoff": -2.0}
    features = case.features((n, m, d), torch.float32, device_of(backend))
    for smoothing in (0.0, 0.1) if case.takes("label_smoothing") else (None,):
        smoothed = {} if smoothing is None else {"label_smoothing": smoothing}
        out = differentiate(
            lambda **t: case(ck, t, **options, **smoothed, reduction="none", backend=backend),  # noqa: B023
            features,
        )
        # with the positive as the only candidate, smoothing has nowhere to go; its sums cancel to a rounding
        bound = 1e-4 if smoothing else 0.0
        for x in (out.value, *(g for g in out.gradients.values() if g is not None)):
            assert x.nan_to_num(1.0).abs().max() <= bound
    _, stats = case(ck, features, **options, return_stats=True, backend=backend)
    assert stats.accuracy == 1
    if case.loss == "decoupled_loss":
        assert stats.lse.isneginf().all()
    else:
        torch.testing.assert_close(stats.lse, stats.positive_logit)


@pytest.mark.parametrize("case", case_params(EVERY))
def test_zero_rows_have_zero_gradients(case, backend):
    """A row below the epsilon of the normalisation has similarity 0 to all others, and no gradient."""
    features = case.features(SHAPE, torch.float32)
    for x in features.values():
        if x.is_floating_point():
            x[1] = 0
            x[3] = 1e-30
    ours, reference = compared(case, features, backend, **{**each_loss(case), "normalize": True})
    if case.loss != "false_negative_loss":
        assert_matches(ours.value, reference.value, torch.float32, scale=20)
    for name, gradient in ours.gradients.items():
        if gradient is not None:
            assert gradient.isfinite().all()
            assert not gradient[1].any(), name
            assert not gradient[3].any(), name
            assert gradient[2].any(), name


# Derivatives

SCALARS = {
    "siglip_loss": {"logit_scale": 1.3, "logit_bias": 0.4},
    "triplet_margin_loss": {"margin": 0.4},
    "uniformity_loss": {"t": 0.7},
    "t_simclr_loss": {"temperature": 0.7},
    "sup_con_loss": {"temperature": 0.5, "base_temperature": 0.3},
    "label_pull_loss": {"temperature": 0.5},
}
# Detached weights make another gradient than the value's, and so do the constant coefficients of MMCL.
UNDERIVED = ("hard_negative-detached", "decoupled-weighted", "mmcl")
# Losses of many forms, of whose second derivatives random directions are checked.
MANY_FORMS = ("sup_con_loss", "label_pull_loss", "nnclr_loss", "false_negative_loss", "easy_negative_loss")
DERIVED = {k: case for k, case in EVERY.items() if k not in CASES and k not in UNDERIVED}


@pytest.mark.parametrize("case", case_params(DERIVED))
def test_derivatives(case, backend):
    """First and second, of all features and of the scalars that the loss takes."""
    if precise(backend) != torch.float64:
        pytest.skip(f"{backend} has no float64")
    features = case.features((5, 6, 3), torch.float64, device_of(backend))
    scalars = {k: v for k, v in SCALARS.get(case.loss, {"logit_scale": 1.7}).items() if case.takes(k)}
    tensors = {k: x for k, x in features.items() if x.is_floating_point() and k not in case.detached}
    tensors |= {k: torch.tensor(v, dtype=torch.float64, device=device_of(backend)) for k, v in scalars.items()}
    fixed = {k: v for k, v in case.options.items() if k != "temperature" or "logit_scale" not in scalars}
    smoothed = {"label_smoothing": 0.1} if case.takes("label_smoothing") else {}

    def loss(*leaves):
        given = dict(zip(tensors, leaves, strict=True))
        return type(case)(case.loss, case.shapes, fixed)(ck, {**features, **given}, **smoothed, backend=backend)

    inputs = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=case.loss in MANY_FORMS)


# Precision

# Rows that are rounded already and taken as they are: what the gradients may be off by, in roundings of their dtype.
ROUNDED = {
    "siglip-mild": 2,
    "triplet_margin": 2,
    "triplet_margin-euclidean-normalized": 2,
    "triplet_margin-hardest-normalized": 2,
    "triplet_margin-hardest-euclidean-normalized": 2,
    # the rounded weights of a sum of differences
    "uniformity": 4,
    "t_simclr": 4,
}


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("name", ROUNDED)
def test_half_precision_rounds_the_gradients_only(name, dtype, backend, poison):
    """The loss of rows as they are has the accuracy of float32, the gradient that of its dtype."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    case = EVERY[name]
    features = case.features(SHAPE)
    if "siglip" in name or "triplet_margin" in name:
        features = {k: torch.nn.functional.normalize(x, dim=-1) for k, x in features.items()}
    ours, reference = compared(case, {k: x.to(dtype) for k, x in features.items()}, backend, normalize=False)
    assert_matches(ours.value, reference.value, torch.float32)
    for k, expected in reference.gradients.items():
        error = (ours.gradients[k].cpu().double() - expected).norm() / expected.norm()
        assert error <= ROUNDED[name] * torch.finfo(dtype).eps, k


AUTOCAST = (
    "alignment",
    "augmentation_robust",
    "uniformity",
    "uniformity-unit",
    "t_simclr",
    "t_simclr-unit",
    "spectral_contrastive-correlated",
    "spectral_contrastive-tile",
    "barlow_twins-correlated",
    "vicreg-correlated",
)


@pytest.mark.parametrize("shape", [(65, 65, 24), (24, 24, 65)], ids=shape_id)
@pytest.mark.parametrize("case", case_params({name: EVERY[name] for name in AUTOCAST}))
def test_autocast_rounds_the_features_only(case, shape, backend):
    """The features become bfloat16, sums and moments stay float32."""
    if not supports(backend, torch.bfloat16):
        pytest.skip(f"{backend} does not take bfloat16")
    features = case.features(shape, torch.float32, device_of(backend))
    with torch.autocast(device_of(backend), torch.bfloat16):
        ours = differentiate(lambda **t: case(ck, t, normalize=False, backend=backend), features)
    assert ours.value.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in ours.gradients.values())
    rounded = {k: x.bfloat16().double().cpu() for k, x in features.items()}
    expected = case(python_ref, rounded, normalize=False)
    assert_matches(ours.value, expected, torch.float32, scale=1.0)
    if not expected.dim():
        torch.testing.assert_close(ours.value.cpu().double(), expected, rtol=2e-6, atol=0)
