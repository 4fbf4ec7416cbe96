"""The accuracy contract: against float64 on the same rounded inputs at most 2 (gradients: 3) times PyTorch's error.

PyTorch's form is what a user has before changing the import: `F.normalize`, one matrix product in the dtype of the
features, and `F.cross_entropy` in float32, as autocast does (a loss rounded to bfloat16 is too easy to beat).
"""

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import contrastive_kernels as ck
import python_ref
from tests.support.regimes import CANCELLING, COINCIDING
from tests.support.testing import (
    CASES,
    FAMILY,
    HALF,
    Case,
    device_of,
    differentiate,
    dtype_id,
    errors,
    sizes,
    supports,
    thread_count,
    within,
)
from tests.support.variants import EVERY

N, M, D = 65, 129, 64
# The errors are pooled over the seeds; the scale's gradient is one number a run.
SEEDS, SEEDS_OF_FAMILY = 8, 4


def unit(x):
    return F.normalize(x, dim=-1)


def cross_entropy(positive, *negatives):
    """Return the loss of every row from its positive logit and the logits of its negatives."""
    logits = torch.cat([positive[:, None], *negatives], 1)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64), reduction="none")


def info_nce(query, positive_key, scale):
    logits = scale * (unit(query) @ unit(positive_key).T).float()
    return F.cross_entropy(logits, torch.arange(len(query)), reduction="none")


def info_nce_shared(query, positive_key, negative_keys, scale):
    query, positive_key, negative_keys = map(unit, (query, positive_key, negative_keys))
    positive = (query * positive_key).sum(1).float()
    return cross_entropy(scale * positive, scale * (query @ negative_keys.T).float())


def clip(image_features, text_features, scale):
    logits = scale * (image_features @ text_features.T).float()
    target = torch.arange(len(logits))
    return torch.stack([F.cross_entropy(s, target, reduction="none") for s in (logits, logits.T)])


def nt_xent(z0, z1, scale):
    z = unit(torch.cat([z0, z1]))
    logits = (scale * (z @ z.T).float()).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z0)), reduction="none")


def moco(query, key, queue, scale):
    return info_nce_shared(query, key.detach(), queue.detach(), scale)


def least(similarity):
    return similarity.min(1).values


def pair_similarities(views):
    first, second = torch.triu_indices(views.shape[1], views.shape[1], 1)
    return (views @ views.mT)[:, first, second]


def arcl(denominator, positive=least):
    def loss(views, scale):
        views = unit(views)
        aligned = scale * positive(pair_similarities(views).float())
        first, second = views[:, 0], views[:, 1]
        one = (scale * (first @ first.T).float()).fill_diagonal_(-math.inf)
        both = torch.cat([one, scale * (first @ second.T).float()], 1)
        if denominator == "two_view":
            return both.logsumexp(1) - aligned
        if denominator == "one_view":
            return one.logsumexp(1) - aligned
        if denominator == "positive+one_view":
            return cross_entropy(aligned, one)
        own = torch.arange(len(views))
        return cross_entropy(aligned, both.index_put((own, own + len(views)), torch.tensor(-math.inf)))

    return loss


def moco_arcl(positive):
    def loss(query, keys, queue, scale):
        query, keys, queue = unit(query), unit(keys).detach(), unit(queue).detach()
        similarity = torch.einsum("nd,nvd->nv", query, keys).float()
        negatives = scale * (query @ queue.T).float()
        if positive == "mean_loss":
            return torch.stack([cross_entropy(scale * p, negatives) for p in similarity.unbind(1)], 1).mean(1)
        return cross_entropy(scale * positive(similarity), negatives)

    return loss


def band(z, lower, upper):
    """Return row sums of the band, which is 0 for a row with itself."""
    d = (1 - (z @ z.T).float()) / 2
    return ((d - lower) * (upper - d)).clamp(min=0).fill_diagonal_(0)


def nt_xent_polarized(z0, z1, scale):
    band_values = band(unit(torch.cat([z0, z1])), 0.1, 0.5)
    instance = torch.arange(len(z0)).repeat(2)
    negatives = instance[:, None] != instance
    return nt_xent(z0, z1, scale) + 0.3 * (band_values * negatives).sum(1) / max(2 * len(z0) - 2, 1)


def mean(similarity):
    return similarity.mean(1)


class Autocast(TorchFunctionMode):
    """Products, moments and distances of half precision become float32, and so does all that follows."""

    WIDE = (torch.Tensor.__matmul__, torch.Tensor.mean, torch.Tensor.var)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.pdist:  # there is none in half precision
            return function(args[0].float() if args[0].dtype in HALF else args[0])
        out = function(*args, **(kwargs or {}))
        return out.float() if function in self.WIDE and out.dtype in HALF else out


def dense(case):
    """Return the formula of the reference in the dtype of the features."""

    def loss(**tensors):
        features, options = split(case, tensors)
        with Autocast():
            return case(python_ref, features, **options)

    return loss


def split(case, tensors):
    """Return features and options: the scale if the loss has one, the loss of every anchor if it has anchors."""
    features = {k: v for k, v in tensors.items() if k not in ("scale", "logit_bias")}
    options = {"logit_scale": tensors["scale"]} if case.takes("logit_scale") else {}
    if case.takes("reduction"):
        options["reduction"] = "none"
    return features, options | {k: v for k, v in tensors.items() if k == "logit_bias"}


def euclidean_triplets(anchor, positive, scale):
    """Return the mean hinge of distances from differences, as `F.pairwise_distance` takes them."""
    difference = unit(anchor)[:, None] - unit(positive)
    distance = difference.square().sum(-1).clamp(min=1e-12).sqrt()
    hinges = torch.relu(0.2 + distance.diagonal()[:, None] - distance)
    return (hinges - torch.diag(hinges.diagonal())).sum(1)


def at_size(case, rows, columns):
    """Return the case at other multiples of N and D."""
    return replace(case, shapes=lambda n, m, d: case.shapes(rows * n, rows * m, columns * d))


# For the regimes that cancel, forms that the sizes and the unit rows of other cases do not reach; and many views
# in half precision.
MORE = {
    "spectral_contrastive-moments": at_size(FAMILY["spectral_contrastive"], 2, 1),
    "barlow_twins-batch": at_size(FAMILY["barlow_twins"], 1, 3),
    "vicreg-batch": at_size(FAMILY["vicreg"], 1, 3),
    "sup_con-raw": replace(FAMILY["sup_con"], options={"normalize": False}),
    "sup_con-in-raw": replace(FAMILY["sup_con-in"], options={"positives": "in", "normalize": False}),
    "sup_con-pairwise-raw": replace(FAMILY["sup_con-pairwise"], options={"positives": "pairwise", "normalize": False}),
    "nt_xent-raw": replace(CASES["nt_xent"], options={"normalize": False}),
    "arcl-mean-raw": replace(CASES["arcl-mean"], options={"positive": "mean", "normalize": False}),
    "info_nce-smoothed-raw": replace(CASES["info_nce"], options={"normalize": False, "label_smoothing": 0.1}),
    "nt_xent-nine_views": replace(CASES["nt_xent-views"], shapes=lambda n, m, d: {"z0": (n, 9, d)}),
    "triplet_margin-euclidean-normalized": EVERY["triplet_margin-euclidean-normalized"],
    "triplet_margin-hardest-euclidean-normalized": EVERY["triplet_margin-hardest-euclidean-normalized"],
    "uniformity-unit": EVERY["uniformity-unit"],
    "t_simclr-unit": EVERY["t_simclr-unit"],
}
ALL = {**CASES, **FAMILY, **MORE}

EAGER = {
    "info_nce": info_nce,
    "info_nce-shared": info_nce_shared,
    "nt_xent": nt_xent,
    "clip": clip,
    "moco": moco,
    "nt_xent-polarized": nt_xent_polarized,
    "arcl": arcl("two_view"),
    "arcl-mean": arcl("two_view", mean),
    "arcl-one_view": arcl("one_view"),
    "arcl-positive+one_view": arcl("positive+one_view"),
    "arcl-positive+two_view": arcl("positive+two_view"),
    "moco_arcl": moco_arcl(least),
    "moco_arcl-mean": moco_arcl(mean),
    "moco_arcl-mean_loss": moco_arcl("mean_loss"),
    # the polarization has a test of its own; MMCL's solver magnifies a rounding by its condition number
    **{name: dense(case) for name, case in FAMILY.items() if name not in ("distance_polarization", "mmcl")},
    **{name: dense(case) for name, case in MORE.items()},
    "triplet_margin-euclidean-normalized": euclidean_triplets,
}


def random(features):
    """Return independent rows."""
    return features


def collapsed(features):
    """Return samples whose rows agree and that are orthogonal: losses of about 1e-8, the end of training."""
    axes = torch.linalg.qr(torch.randn(2 * D, 2 * D, dtype=torch.float64)).Q
    out = {}
    for name, x in features.items():
        if not x.is_floating_point():
            out[name] = x
            continue
        rows = axes[N:] if name in ("queue", "negative_keys") else axes[:N]
        centers = rows[torch.arange(len(x)) % len(rows)].reshape(len(x), *(1,) * (x.dim() - 2), -1)
        out[name] = centers + 0.01 * torch.randn(*x.shape[:-1], 2 * D, dtype=torch.float64)
    return out


def clustered(features):
    """Return rows that point almost the same way: every similarity is 1 to three digits."""
    return {name: 1 + 0.03 * x if x.is_floating_point() else x for name, x in features.items()}


def opposed(features):
    """Return positives and views at cosine -1: losses of 2 / T."""
    first = next(iter(features.values()))
    anchor = first if first.dim() == 2 else first[:, 0]
    out = {}
    for name, x in features.items():
        if name in ("queue", "negative_keys", "support", "labels", "label_embeddings") or (x is first and x.dim() == 2):
            out[name] = x
        elif x.dim() == 3:
            signs = torch.tensor([1.0, -1.0] * x.shape[1], dtype=torch.float64)[: x.shape[1], None]
            out[name] = anchor[:, None] * signs + 0.01 * x
        else:
            out[name] = -anchor
    return out


def near_tie(features, tolerance):
    """Return which samples have two least similar pairs so close that rounding decides which one has the gradient."""
    if "views" in features:
        similarity = pair_similarities(unit(features["views"]))
    elif "keys" in features:
        similarity = torch.einsum("nd,nvd->nv", unit(features["query"]), unit(features["keys"]))
    else:
        return None
    if similarity.shape[1] == 1:
        return None
    least, second = similarity.topk(2, largest=False).values.unbind(1)
    return second - least < tolerance


# (features, temperature)
REGIMES = {
    "random": (random, 0.07),
    "collapsed": (collapsed, 0.045),
    "clustered": (clustered, 0.07),
    "opposed": (opposed, 0.07),
    "cold": (random, 0.01),
    **{name: (transform, 0.07) for name, transform in CANCELLING.items()},
}
# Errors beyond the bound, and how far.
KNOWN = {
    ("label_pull-softmax", "clustered", torch.float32): "gradient of label_embeddings: 3.3 times PyTorch's error",
    ("clip", "clustered", torch.float32): "gradient of the scale, a sum that cancels to 0.002: 4.1 times PyTorch's",
    **{
        ("label_pull-softmax", regime, torch.float32): "gradient of label_embeddings: up to 6.2 times PyTorch's error"
        for regime in COINCIDING
    },
    **{
        ("nt_xent-nine_views", regime, torch.float32): "gradient: up to 3.8 times PyTorch's error"
        for regime in ("clustered", *COINCIDING)
    },
    (
        "spectral_contrastive-moments",
        "columns-100",
        torch.float32,
    ): "value, 3e-7 of its size: 3.6 times PyTorch's error",
}


def has_meaning(name, regime, dtype) -> bool:
    """Return whether the comparison has a meaning; the comments say why not."""
    case = ALL[name]
    if case.loss == "false_negative_loss" and regime in ("clustered", *COINCIDING):
        return False  # similarities that are equal in float32 are kept together
    if regime in CANCELLING:
        return dtype == torch.float32
    if name in MORE:
        return name == "nt_xent-nine_views" and regime == "clustered"
    if name in FAMILY and dtype == torch.float16:
        return False  # float16 rounds where bfloat16 does, and PyTorch's own gradients overflow
    if regime == "cold":
        # no temperature: the same as random; the other two overflow in plain float32, see test_hard_negative.py
        return case.takes("logit_scale") and case.loss not in ("debiased_loss", "hard_negative_loss")
    if regime == "opposed":
        return case.loss != "uniformity_loss"  # one tensor of rows has no positives to oppose
    if regime == "clustered":
        if dtype in HALF and case.options.get("metric") == "euclidean":
            return False  # rows of half precision are no unit rows to sqrt(2 - 2 s)
        if dtype in HALF and case.loss in ("debiased_loss", "hard_negative_loss"):
            return False  # all products round to 1: PyTorch's scale gradient is exactly 0, its true size is 0.002
    return True


def contract_params() -> list:
    """Return every loss in every regime and dtype that has a meaning for it."""
    found = []
    for name, regime, dtype in itertools.product(EAGER, REGIMES, (torch.float32, torch.bfloat16, torch.float16)):
        if has_meaning(name, regime, dtype):
            known = KNOWN.get((name, regime, dtype))
            marks = [pytest.mark.xfail(reason=known, strict=True)] if known else []
            found.append(pytest.param(name, regime, dtype, marks=marks, id=f"{name}-{regime}-{dtype_id(dtype)}"))
    return found


def outcomes(case: Case, eager, regime, dtype, backend):
    """Return value and gradients of ours, of eager PyTorch and of the reference, pooled over the seeds."""
    transform, temperature = REGIMES[regime]
    device = device_of(backend)
    runs = {"ours": [], "eager": [], "reference": []}
    for seed in range(SEEDS if case in CASES.values() else SEEDS_OF_FAMILY):
        torch.manual_seed(seed)
        # unit only after the regime has moved them
        drawn = replace(case, unit=False)
        features = transform(drawn.features((N, M, D)))
        for _ in range(30 if transform in (random, clustered) else 0):
            near = near_tie(features, 16 * torch.finfo(dtype).eps)
            if near is None or not near.any():
                break
            again = transform(drawn.features((N, M, D)))
            features = {
                k: x if k == "queue" else torch.where(near.view(-1, *(1,) * (x.dim() - 1)), again[k], x)
                for k, x in features.items()
            }
        if case.unit:
            features = {k: unit(v) if v.is_floating_point() else v for k, v in features.items()}
        features = {k: v.to(dtype) if v.is_floating_point() else v for k, v in features.items()}
        tensors = {**features, "scale": torch.tensor(1 / temperature).float()}
        if case.takes("logit_bias") and "logit_bias" in case.options:
            tensors["logit_bias"] = torch.tensor(case.options["logit_bias"])

        def run(module, **tensors):
            features, options = split(case, tensors)
            return case(module, features, **options, **({"backend": backend} if module is ck else {}))

        on_device = {k: v.to(device) for k, v in tensors.items()}
        wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
        runs["ours"].append(differentiate(partial(run, ck), on_device))
        runs["eager"].append(differentiate(eager, tensors))
        runs["reference"].append(differentiate(partial(run, python_ref), wide))

    def pooled(results, name):
        return torch.stack([(r.value if name == "value" else r.gradients[name]).cpu() for r in results])

    names = ["value", *(k for k, gradient in runs["reference"][0].gradients.items() if gradient is not None)]
    return {name: {who: pooled(results, name) for who, results in runs.items()} for name in names}


@pytest.mark.parametrize(("name", "regime", "dtype"), contract_params())
def test_error_is_within_the_contract(name, regime, dtype, backend):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    failures = []
    # The sums of several threads are shorter and round less, some of them to within the bound.
    with thread_count(1) if (name, regime, dtype) in KNOWN else nullcontext():
        found = outcomes(ALL[name], EAGER[name], regime, dtype, backend)
    for what, by in found.items():
        if what == "scale" and regime in COINCIDING:
            continue  # 1e-7 of the terms that it is a sum of, which cancel
        if regime in CANCELLING and errors(by["eager"], by["reference"])[0] >= sizes(by["reference"])[0]:
            continue  # PyTorch has no digit of it
        factor = 2 if what == "value" else 3
        # there the largest error is that of the one pair whose rounding is magnified most
        most = 2 * factor if regime in CANCELLING else factor
        result = dtype if what not in ("value", "scale", "logit_bias") else torch.float32
        if failure := within(by["ours"], by["eager"], by["reference"], factor, result, most):
            failures.append(f"{what}: {failure}")
    assert not failures, "; ".join(failures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distance_polarization_is_within_the_contract(reduction, dtype, backend):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    runs = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        z = {"z": torch.randn(N, D, dtype=torch.float64).to(dtype)}

        def eager(z):
            rows = band(unit(z), 0.3, 0.6).sum(1)
            return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (N * (N - 1))}[reduction]

        def ours(z):
            return ck.distance_polarization(z, lower=0.3, upper=0.6, reduction=reduction, backend=backend)

        def reference(z):
            return python_ref.distance_polarization(z, lower=0.3, upper=0.6, reduction=reduction)

        runs.append(
            (
                differentiate(ours, {"z": z["z"].to(device_of(backend))}),
                differentiate(eager, z),
                differentiate(reference, {"z": z["z"].double()}),
            )
        )
    values = [torch.stack([r.value.cpu() for r in results]) for results in zip(*runs, strict=True)]
    gradients = [torch.stack([r.gradients["z"].cpu() for r in results]) for results in zip(*runs, strict=True)]
    assert (failure := within(*values, 2, torch.float32)) is None, failure
    assert (failure := within(*gradients, 3, dtype)) is None, failure


@pytest.mark.parametrize("loss", ["info_nce", "nt_xent", "clip", "moco", "arcl-positive+two_view"])
def test_a_loss_of_1e_minus_8_keeps_five_digits(loss, backend):
    """I21 tiny losses: subtracting the positive from the log-sum-exp would leave 0 or 1e-7."""
    by = outcomes(CASES[loss], EAGER[loss], "collapsed", torch.float32, backend)["value"]
    assert 1e-10 < by["reference"].median() < 1e-7
    relative = ((by["ours"] - by["reference"]) / by["reference"]).abs()
    # a similarity near 1 is off by 6e-8 of rounding; divided by T that is 1.3e-6 in the logit
    assert relative.max() < 1e-5
