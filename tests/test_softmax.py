"""InfoNCE, NT-Xent, CLIP and MoCo: values, gradients and options against the reference."""

import math

import pytest
import torch
from testing import (
    BAND,
    SOFTMAX,
    Case,
    assert_matches,
    assert_outcomes_match,
    case_params,
    check,
    check_statistics,
    device_of,
    differentiate,
    grid_params,
    matching_ids,
    option_params,
    shape_id,
    supports,
)

import contrastive_kernels as ck
import python_ref

SHAPE = (65, 129, 24)  # one row more than a tile, M != N, D no multiple of 16


@pytest.mark.parametrize(("shape", "dtype"), grid_params())
@pytest.mark.parametrize("case", case_params(SOFTMAX))
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    """Every anchor's loss, and the gradient for an upstream gradient that differs from anchor to anchor."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    check(case, shape, dtype, backend, reduction="none")


@pytest.mark.parametrize(("case", "options"), option_params(SOFTMAX))
def test_options(case, options, backend, poison):
    """In float32, so that what must stay exact under rounding is seen; the scales' gradients are in their own dtype."""
    ours, _ = check(case, SHAPE, torch.float32, backend, **options(case, *SHAPE[:2]))
    for name in ("logit_scale", "temperature"):
        if name in ours.gradients:
            assert ours.gradients[name].dtype == torch.float64


@pytest.mark.parametrize("with_ids", [False, True], ids=["all", "ids"])
@pytest.mark.parametrize("shape", [(1, 1, 24), SHAPE], ids=shape_id)
@pytest.mark.parametrize("case", case_params(SOFTMAX))
def test_statistics(case, shape, with_ids, backend, poison):
    options = matching_ids(case, *shape[:2]) if with_ids else {}
    check_statistics(case, shape, torch.float32, backend, **options)
    check_statistics(case, shape, torch.float32, backend, cutoff_margin=0.1, reduction="none", **options)


def test_clip_bias_has_no_gradient_and_no_effect(backend):
    x, y = torch.randn(2, 65, 24, device=device_of(backend))
    bias = torch.tensor(-10.0, device=x.device, requires_grad=True)
    with_bias, stats = ck.clip_loss(x, y, 2.0, bias, return_stats=True, backend=backend)
    without, plain = ck.clip_loss(x, y, 2.0, return_stats=True, backend=backend)
    torch.testing.assert_close(with_bias, without)
    torch.testing.assert_close(stats.positive_logit, plain.positive_logit - 10)
    torch.testing.assert_close(stats.lse, plain.lse - 10)
    torch.testing.assert_close(stats.logit_max, plain.logit_max - 10)
    if with_bias.requires_grad:
        (gradient,) = torch.autograd.grad(with_bias, bias, allow_unused=True)
        assert gradient is None or abs(gradient) < 1e-5


def test_nt_xent_sum_directions_is_twice_the_mean(backend):
    z0, z1 = torch.randn(2, 65, 24, device=device_of(backend))
    weight = torch.rand(65, device=z0.device)
    for options in ({}, {"weight": weight}):
        mean = ck.nt_xent_loss(z0, z1, backend=backend, **options)
        torch.testing.assert_close(
            ck.nt_xent_loss(z0, z1, reduction="sum_directions", backend=backend, **options), 2 * mean
        )


def test_nt_xent_of_the_pairs_of_views(backend, poison):
    """The mean of the two-view loss over the three pairs."""
    case = Case("nt_xent_loss", lambda n, m, d: {"z0": (n, 3, d)}, {"multi_view": "pairs"})
    check(case, SHAPE, torch.float32, backend)
    check(case, SHAPE, torch.float32, backend, reduction="sum", weight=torch.rand(65).double(), label_smoothing=0.1)


@pytest.mark.parametrize("argument", ["cutoff", "cutoff_margin"])
def test_nt_xent_takes_a_threshold_per_anchor_or_per_sample(argument, backend):
    z = {"z0": torch.randn(65, 24).double(), "z1": torch.randn(65, 24).double()}
    values = torch.linspace(-0.3, 0.3, 130).double()
    for threshold in (values, values[:65]):
        ours = ck.nt_xent_loss(
            *(x.to(device_of(backend)).float() for x in z.values()),
            **{argument: threshold.to(device_of(backend))},
            reduction="none",
            backend=backend,
        )
        assert_matches(
            ours, python_ref.nt_xent_loss(**z, **{argument: threshold}, reduction="none"), torch.float32, scale=20
        )


@pytest.mark.parametrize("case", case_params(SOFTMAX))
def test_zero_rows_have_zero_gradients(case, backend):
    """A row below the epsilon of the normalisation has similarity 0 to all others, and no gradient."""
    features = case.features(SHAPE, torch.float32, device_of(backend))
    for x in features.values():
        x[3] = 0
        x[5] = 1e-30
    ours = differentiate(lambda **t: case(ck, t, normalize=True, reduction="none", backend=backend), features)
    reference = differentiate(
        lambda **t: case(python_ref, t, normalize=True, reduction="none"),
        {k: v.cpu().double() for k, v in features.items()},
    )
    assert_matches(ours.value, reference.value, torch.float32, scale=20)
    for name, gradient in ours.gradients.items():
        if gradient is not None:
            assert gradient.isfinite().all()
            assert not gradient[3].any(), name
            assert not gradient[5].any(), name
            assert gradient[4].any(), name


@pytest.mark.parametrize("case", case_params({k: v for k, v in SOFTMAX.items() if k != "nt_xent-views"}))
def test_anchors_without_negatives_lose_nothing(case, backend, poison):
    """Equal ids everywhere: loss 0, gradient 0, accuracy 1, and nothing becomes NaN."""
    n, m, _ = SHAPE
    ids = {k: torch.zeros_like(v).to(device_of(backend)) for k, v in matching_ids(case, n, m).items()}
    features = case.features(SHAPE, torch.float32, device_of(backend))
    for options in ({}, {"label_smoothing": 0.1}):
        out = differentiate(
            lambda **t: case(ck, t, **ids, **options, reduction="none", backend=backend),  # noqa: B023
            features,
        )
        # with the positive as the only candidate, smoothing has nowhere to go; its sums cancel to a rounding
        bound = 1e-4 if options else 0.0
        for x in (out.value, *(g for g in out.gradients.values() if g is not None)):
            assert x.nan_to_num(1.0).abs().max() <= bound
    _, stats = case(ck, features, **ids, return_stats=True, backend=backend)
    assert stats.accuracy == 1
    torch.testing.assert_close(stats.lse, stats.positive_logit)


@pytest.mark.parametrize("case", case_params(SOFTMAX))
def test_nan_and_infinity_give_nan(case, backend):
    """In one feature of one row: NaN in the loss, no error and no wrong finite number."""
    for bad in (math.nan, math.inf):
        for name in case.shapes(*SHAPE):
            features = case.features(SHAPE, torch.float32, device_of(backend))
            features[name].reshape(-1)[7] = bad
            loss = case(ck, features, normalize=True, backend=backend)
            assert loss.isnan(), f"{bad} in {name}"


@pytest.mark.parametrize("case", case_params(SOFTMAX))
def test_unneeded_gradients_are_not_computed(case, backend):
    """One input at a time needs a gradient, and gets the one it gets among others."""
    features = case.features(SHAPE, torch.float32, device_of(backend))
    full = differentiate(lambda **t: case(ck, t, backend=backend), features).gradients
    for name in features:
        if name not in case.detached:
            alone = differentiate(
                lambda **t: case(ck, {**features, **t}, backend=backend),
                {name: features[name]},
            )
            torch.testing.assert_close(alone.gradients[name], full[name], rtol=1e-5, atol=1e-6)
    assert not case(ck, features, backend=backend).requires_grad


@pytest.mark.parametrize("case", case_params(SOFTMAX))
def test_inputs_stay_as_they_were_and_bits_repeat(case, backend, poison):
    """The same call twice; a transposed batch is as good as a contiguous one."""
    features = case.features(SHAPE, torch.float32, device_of(backend))
    before = {k: v.clone() for k, v in features.items()}
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in features.items()}

    def run(features):
        return differentiate(lambda **t: case(ck, t, backend=backend), features)

    first, again = run(features), run(features)
    assert all(torch.equal(before[k], features[k]) for k in features)
    assert torch.equal(first.value, again.value)
    for name, gradient in first.gradients.items():
        assert gradient is None or torch.equal(gradient, again.gradients[name])
    # the norms are summed in another order there
    assert_outcomes_match(run(strided), first, torch.float32, 1.0)


def test_moco_takes_the_official_queue_layout(backend):
    """(D, K) in memory, passed as its transpose."""
    query, key = torch.randn(2, 33, 24, device=device_of(backend))
    queue = torch.randn(24, 129, device=device_of(backend))
    torch.testing.assert_close(
        ck.moco_loss(query, key, queue.T, backend=backend),
        ck.moco_loss(query, key, queue.T.contiguous(), backend=backend),
    )


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"label_smoothing": 0.1, "polarization": BAND}], ids=str)
def test_positive_with_another_id_is_counted_once(options, backend):
    """Key ids need not be the query's: the positive is in the denominator once, and no cutoff drops it."""
    n = SHAPE[0]
    features = {k: torch.randn(n, 16, device=device_of(backend)) for k in ("query", "positive_key")}
    ids = {"query_ids": torch.arange(n), "key_ids": torch.arange(n).flip(0) + n // 2}
    for cutoff in (None, 0.1):
        reference = python_ref.info_nce_loss(
            **{k: v.cpu().double() for k, v in features.items()}, **ids, **options, cutoff=cutoff, reduction="none"
        )
        on_device = {k: v.to(device_of(backend)) for k, v in ids.items()}
        ours = ck.info_nce_loss(**features, **on_device, **options, cutoff=cutoff, reduction="none", backend=backend)
        assert_matches(ours, reference, torch.float32, scale=20)
