"""Row selection, NNCLR, false-negative cancellation and easy negatives: values, gradients, ties and edge cases."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from testing import (
    assert_matches,
    assert_outcomes_match,
    device_of,
    differentiate,
    dtype_id,
    precise,
    supports,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import contrastive_kernels as ck
import python_ref as reference
from contrastive_kernels import select
from contrastive_kernels.functional import neighbors
from contrastive_kernels.modules.neighbors import EasyNegativeLoss, FalseNegativeLoss, NNCLRLoss
from contrastive_kernels.select import row_select

# (N, M, D) and what it is for.
SHAPES = {
    (1, 1, 1): "one of everything: no negative in the batch",
    (2, 63, 24): "fewer candidates in the batch than are selected",
    (65, 129, 24): "one more than a tile",
    (129, 33, 100): "more rows than columns, D no multiple of 8",
}
GRID = [
    *((shape, torch.float32) for shape in SHAPES),
    *(((65, 129, 24), dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
]
CASES = {
    "nnclr": ("nnclr_loss", {}),
    "nnclr-both": ("nnclr_loss", {}),
    "eliminate": ("false_negative_loss", {"threshold": 0.2, "top_k": 3}),
    "eliminate-threshold": ("false_negative_loss", {"threshold": 0.2, "top_k": None}),
    "eliminate-top_k": ("false_negative_loss", {"threshold": None, "top_k": 5, "factor": 1.0}),
    "eliminate-views": ("false_negative_loss", {"threshold": 0.1, "top_k": 4}),
    "attract": ("false_negative_loss", {"mode": "attract", "threshold": 0.2, "top_k": 3}),
    "attract-threshold": ("false_negative_loss", {"mode": "attract", "threshold": 0.2, "top_k": None}),
    "attract-top_k": ("false_negative_loss", {"mode": "attract", "threshold": None, "top_k": 1}),
    "attract-views": ("false_negative_loss", {"mode": "attract", "threshold": 0.1, "top_k": 4, "factor": 1.0}),
    "easy": ("easy_negative_loss", {"k": 5}),
    "easy-one": ("easy_negative_loss", {"k": 1}),
    "easy-below": ("easy_negative_loss", {"select": "below", "threshold": -0.1}),
    "easy-shared": ("easy_negative_loss", {"k": 20}),
}
cases = pytest.mark.parametrize("case", CASES)
DETACHED = ("z", "support")


def draw(case, n, m, d, dtype=torch.float64, device="cpu"):
    """Unit rows, so that a half precision loss may be asked to take them as they are and select the same."""
    loss, _ = CASES[case]
    if loss == "nnclr_loss":
        shape = (n, 2, d) if case.endswith("both") else (n, d)
        shapes = {"z": shape, "predictions": shape, "support": (m, d)}
    elif loss == "false_negative_loss":
        shapes = {"z0": (n, 3, d)} if case.endswith("views") else {"z0": (n, d), "z1": (n, d)}
    else:
        shapes = {"query": (n, d), "positive_key": (n, d)}
        if case.endswith("shared"):
            shapes["negative_keys"] = (m, d)
    unit = {name: F.normalize(torch.randn(s, dtype=torch.float64), dim=-1) for name, s in shapes.items()}
    return {name: x.to(dtype).to(device) for name, x in unit.items()}


def ours(case, tensors, backend=None, **options):
    loss, fixed = CASES[case]
    return getattr(neighbors, loss)(**{**fixed, **options, **tensors}, backend=backend)


def oracle(case, tensors, **options):
    loss, fixed = CASES[case]
    return getattr(reference, loss)(**{**fixed, **options, **tensors})


def check(case, tensors, dtype, backend, **options):
    """Against the reference in float64 on the same rounded inputs."""
    out = differentiate(lambda **t: ours(case, t, backend, **options), tensors)
    wide = {k: v.cpu().double() if v.is_floating_point() else v.cpu() for k, v in tensors.items()}
    expected = differentiate(lambda **t: oracle(case, t, **options), wide)
    assert out.value.dtype == (dtype if dtype == torch.float64 else torch.float32)
    for name, gradient in out.gradients.items():
        if name in DETACHED:
            assert gradient is None, f"{name} is detached"
    assert_outcomes_match(out, expected, dtype, 20.0)
    return out


@pytest.mark.parametrize(
    ("shape", "dtype"), [pytest.param(s, t, id="-".join(map(str, s)) + f"-{dtype_id(t)}") for s, t in GRID]
)
@cases
def test_loss_and_gradients(case, shape, dtype, backend, poison):
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    tensors = draw(case, *shape, dtype, device_of(backend))
    check(case, tensors, dtype, backend, reduction="none", normalize=False)


OPTIONS = {
    "mean": lambda n: {},
    "sum": lambda n: {"reduction": "sum", "temperature": 0.3},
    "cold": lambda n: {"temperature": 0.02},
    "scale": lambda n: {"logit_scale": torch.tensor(7.0, dtype=torch.float64)},
    "temperature": lambda n: {"temperature": torch.tensor(0.2, dtype=torch.float64)},
    "weight": lambda n: {"weight": torch.rand(n, dtype=torch.float64)},
    "smoothing": lambda n: {"label_smoothing": 0.1, "reduction": "none"},
}


@pytest.mark.parametrize("option", OPTIONS)
@cases
def test_options(case, option, backend, poison):
    tensors = draw(case, 65, 129, 24, torch.float32, device_of(backend))
    # rows of any length: normalised inside
    tensors = {name: x * (1 + torch.rand(*x.shape[:-1], 1, device=x.device)) for name, x in tensors.items()}
    options = OPTIONS[option](65)
    for name in list(options):
        if torch.is_tensor(options[name]):
            tensors[name] = options.pop(name).to(device_of(backend))
    check(case, tensors, torch.float32, backend, **options)


@cases
def test_ids(case, backend, poison):
    """Two samples with each id: neither negatives, nor flagged, nor counted among the k."""
    tensors = draw(case, 65, 129, 24, torch.float32, device_of(backend))
    ids = torch.randint(33, (65,), device=device_of(backend))
    if not case.startswith("easy"):
        tensors["ids"] = ids
    elif case.endswith("shared"):
        tensors |= {"query_ids": ids, "key_ids": torch.randint(33, (129,), device=device_of(backend))}
    else:
        tensors["query_ids"] = ids
    check(case, tensors, torch.float32, backend, reduction="none")


@pytest.mark.parametrize("option", [{"cutoff": 0.1}, {"cutoff_margin": 0.05}], ids=str)
@pytest.mark.parametrize("case", ["nnclr", "nnclr-both"])
def test_nnclr_cutoffs(case, option, backend):
    tensors = draw(case, 65, 129, 24, torch.float32, device_of(backend))
    check(case, tensors, torch.float32, backend, reduction="none", **option)


@pytest.mark.parametrize("case", ["eliminate", "attract-threshold", "easy-below"])
def test_a_threshold_per_anchor(case, backend):
    tensors = draw(case, 65, 129, 24, torch.float32, device_of(backend))
    anchors = 65 if case.startswith("easy") else 130
    tensors["threshold"] = torch.linspace(-0.2, 0.4, anchors, dtype=torch.float64).to(device_of(backend))
    out = check(case, tensors, torch.float32, backend, reduction="none")
    assert out.gradients["threshold"] is None


@cases
def test_statistics(case, backend):
    tensors = draw(case, 65, 129, 24, torch.float32, device_of(backend))
    plain = ours(case, tensors, backend)
    loss, stats = ours(case, {k: v.requires_grad_() for k, v in tensors.items()}, backend, return_stats=True)
    torch.testing.assert_close(loss.detach(), plain)
    _, expected = oracle(case, {k: v.detach().cpu().double() for k, v in tensors.items()}, return_stats=True)
    for name in expected._fields:
        value = getattr(stats, name)
        assert not value.requires_grad
        assert_matches(value, getattr(expected, name), torch.float32, name, 20.0)


@cases
def test_gradcheck(case):
    tensors = draw(case, 5, 6, 3)
    names = [name for name in tensors if name not in DETACHED]

    def loss(*leaves):
        return ours(case, {**tensors, **dict(zip(names, leaves, strict=True))}, "torch", temperature=0.7)

    assert torch.autograd.gradcheck(loss, [tensors[name].clone().requires_grad_() for name in names])


@cases
def test_nan_gives_nan(case, backend):
    """In any one feature, also of a row that chooses only."""
    for name in draw(case, 65, 129, 24):
        for bad in (math.nan, math.inf):
            tensors = draw(case, 65, 129, 24, torch.float32, device_of(backend))
            tensors[name].reshape(-1)[-3] = bad
            assert ours(case, tensors, backend).isnan(), f"{bad} in {name}"


@cases
def test_zero_rows_have_zero_gradients(case, backend):
    tensors = draw(case, 65, 129, 24, torch.float32, device_of(backend))
    for x in tensors.values():
        x[3] = 0
    out = differentiate(lambda **t: ours(case, t, backend), tensors)
    assert out.value.isfinite()
    for name, gradient in out.gradients.items():
        if name not in DETACHED:
            assert gradient.isfinite().all()
            assert not gradient[3].any()
            assert gradient[4].any()


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("nnclr") and c not in ("easy-shared",)])
def test_one_sample_loses_nothing(case, backend, poison):
    """No candidates: loss 0, gradient 0."""
    tensors = draw(case, 1, 1, 24, torch.float32, device_of(backend))
    if case.endswith("views"):
        # three views of one sample still meet each other
        tensors["z0"] = tensors["z0"][:, :2]
    out = differentiate(lambda **t: ours(case, t, backend), tensors)
    assert out.value == 0
    assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


@cases
def test_order_of_samples_is_irrelevant(case, backend):
    dtype = precise(backend)
    tensors = draw(case, 65, 129, 24, dtype, device_of(backend))
    order = {n: torch.randperm(n).to(device_of(backend)) for n in (65, 129)}
    shuffled = {name: x[order[len(x)]] for name, x in tensors.items()}
    assert_matches(ours(case, shuffled, backend), ours(case, tensors, backend), dtype, scale=20.0)


@cases
def test_inputs_stay_as_they_were_and_bits_repeat(case, backend, poison):
    tensors = draw(case, 65, 129, 24, torch.float32, device_of(backend))
    before = {k: v.clone() for k, v in tensors.items()}
    first, again = (differentiate(lambda **t: ours(case, t, backend), tensors) for _ in range(2))
    assert all(torch.equal(before[k], tensors[k]) for k in tensors)
    assert torch.equal(first.value, again.value)
    for name, gradient in first.gradients.items():
        assert gradient is None or torch.equal(gradient, again.gradients[name])


@pytest.mark.parametrize("mode", ["eliminate", "attract"])
@pytest.mark.parametrize("top_k", [3, None])
def test_nothing_flagged_is_nt_xent_times_the_factor(mode, top_k, backend):
    dtype = precise(backend)
    for views in (2, 4):
        z = torch.randn(33, views, 24, dtype=dtype, device=device_of(backend))
        options = {"temperature": 0.1, "reduction": "none", "backend": backend}
        plain = ck.nt_xent_loss(z, **options)
        loss = neighbors.false_negative_loss(z, mode=mode, threshold=1.5, top_k=top_k, **options)
        assert_matches(loss, 2 * plain, dtype, scale=20.0)
        loss = neighbors.false_negative_loss(z, mode=mode, threshold=1.5, top_k=top_k, factor=1.0, **options)
        assert_matches(loss, plain, dtype, scale=20.0)


def test_everything_eliminated_loses_nothing(backend, poison):
    """Two views, every negative flagged: the positive is alone."""
    z0, z1 = torch.randn(2, 33, 24, device=device_of(backend))
    for options in ({"threshold": -1.5, "top_k": None}, {"threshold": None, "top_k": 64}, {"top_k": 99}):
        options = {"threshold": -1.5, **options}
        out = differentiate(
            lambda **t: neighbors.false_negative_loss(**t, **options, reduction="none", backend=backend),  # noqa: B023
            {"z0": z0, "z1": z1},
        )
        assert not out.value.nan_to_num(1.0).any()
        assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


def test_easy_negatives_all_of_them_is_info_nce(backend):
    dtype = precise(backend)
    query, key, keys = (torch.randn(n, 24, dtype=dtype, device=device_of(backend)) for n in (33, 33, 50))
    options = {"temperature": 0.1, "backend": backend}
    for negatives, counts in ((None, (32, 33, 100)), (keys, (50, 51))):
        plain = ck.info_nce_loss(query, key, negatives, **options)
        for k in counts:
            assert_matches(neighbors.easy_negative_loss(query, key, negatives, k=k, **options), plain, dtype, scale=10)
        below = neighbors.easy_negative_loss(query, key, negatives, select="below", threshold=1.5, **options)
        assert_matches(below, plain, dtype, scale=10)
        fewer = neighbors.easy_negative_loss(query, key, negatives, k=20, **options)
        assert fewer < plain


def test_no_shared_negatives_at_all(backend, poison):
    query, key = torch.randn(2, 33, 24, device=device_of(backend)).unbind(0)
    none = query.new_empty(0, 24)
    out = differentiate(
        lambda **t: neighbors.easy_negative_loss(**t, negative_keys=none, k=3, backend=backend),
        {"query": query, "positive_key": key},
    )
    assert out.value == 0
    assert not any(g.nan_to_num(1.0).any() for g in out.gradients.values())


@pytest.mark.parametrize("d", [16, 100, 200])
def test_the_kth_similarity_is_on_its_side_of_the_cutoff_whatever_the_backend_rounds(d, backend):
    """The sums of the kept similarities say how many there were: none is lost to another order of summation."""
    for _ in range(5):
        query, key = F.normalize(torch.randn(2, 65, d, device=device_of(backend)), dim=-1).unbind(0)
        _, stats = neighbors.easy_negative_loss(
            query, key, k=1, temperature=1.0, normalize=False, return_stats=True, backend=backend
        )
        # of one negative the log-sum-exp of the denominator follows
        values, _ = row_select(query, key, 1, largest=False, exclude_diagonal=True)
        torch.testing.assert_close(stats.lse, torch.logaddexp(stats.positive_logit, values[:, 0]))


@pytest.mark.parametrize("d", [24, 200])
def test_equals_at_the_boundary_are_all_kept(d, backend):
    """Where k ends among copies of one row, however the two passes round their similarities."""
    query, key = F.normalize(torch.randn(2, 65, d, device=device_of(backend)), dim=-1).unbind(0)
    copies = torch.cat([key[:1]] * 4)
    _, stats = neighbors.easy_negative_loss(
        query, key, copies, k=2, temperature=0.1, normalize=False, return_stats=True, backend=backend
    )
    four = query @ key[0] / 0.1 + math.log(4)
    torch.testing.assert_close(stats.lse, torch.logaddexp(stats.positive_logit, four))
    # three copies of each sample: four rows as similar to an anchor as its other view
    z = key[:21].repeat(3, 1)
    loss = neighbors.false_negative_loss(z, z.clone(), threshold=None, top_k=2, normalize=False, backend=backend)
    torch.testing.assert_close(loss, 2 * ck.nt_xent_loss(z, z.clone(), normalize=False, backend=backend))
    fewer = neighbors.false_negative_loss(z, z.clone(), threshold=None, top_k=4, normalize=False, backend=backend)
    assert fewer < 0.99 * loss


def test_the_cutoff_between_two_similarities():
    """Halfway; above both where rounding could exchange them; open where there is no second one."""
    x = F.normalize(torch.randn(7, 8), dim=1)
    inner = torch.tensor([0.3, 0.5, 0.0, 0.3, 0.3, -math.inf, math.inf])
    outer = torch.tensor([0.5, 0.3, 1e-7, math.inf, -math.inf, -math.inf, math.inf])
    cutoff = neighbors._between(inner, outer, x, x)
    torch.testing.assert_close(cutoff[:2], torch.full((2,), 0.4))
    assert 2e-7 < cutoff[2] < 1e-5
    assert torch.equal(cutoff[3:], torch.tensor([math.inf, -math.inf, -math.inf, math.inf]))


@pytest.mark.parametrize("case", ["eliminate-threshold", "attract-threshold", "attract", "easy-below"])
def test_a_similarity_at_the_threshold_is_not_above_it(case, backend):
    """Small integers: many similarities are the threshold exactly, and those above it tie."""
    names = draw(case, 2, 2, 2)
    tensors = {name: torch.randint(-1, 2, (33, 4), device=device_of(backend)).float() for name in names}
    for threshold in (1.0, 2.0):
        options = {"threshold": threshold, "normalize": False, "temperature": 5.0, "reduction": "none"}
        check(case, tensors, torch.float32, backend, **options)


def test_attraction_takes_the_lower_of_equals(backend):
    """Samples 1, 2 and 3 are one point, the next one for sample 0: one of them is attracted."""
    device = device_of(backend)
    axes = torch.eye(4, device=device)
    points = torch.stack([axes[0], *[(axes[0] + axes[1]) / math.sqrt(2)] * 3])
    z0, z1 = points.clone().requires_grad_(), (-points).requires_grad_()
    losses = neighbors.false_negative_loss(
        z0, z1, mode="attract", threshold=0.5, top_k=1, normalize=False, reduction="none", backend=backend
    )
    expected = reference.false_negative_loss(
        z0.double().cpu(), z1.double().cpu(), mode="attract", threshold=0.5, top_k=1, normalize=False, reduction="none"
    )
    assert_matches(losses, expected.detach(), torch.float32, scale=4.0)


def test_nnclr_of_its_own_support_is_info_nce(backend):
    """Every projection finds itself; the gradient is the predictions' alone, whatever else requires one."""
    z, p = torch.randn(2, 33, 24, device=device_of(backend))
    loss = neighbors.nnclr_loss(z, p, z.clone(), backend=backend)
    torch.testing.assert_close(loss, ck.info_nce_loss(z, p, temperature=0.1, backend=backend))


def test_nnclr_both_directions(backend):
    z, p = torch.randn(2, 33, 2, 24, device=device_of(backend))
    support = torch.randn(50, 24, device=device_of(backend))
    both = neighbors.nnclr_loss(z, p, support, backend=backend)
    one = neighbors.nnclr_loss(z[:, 0], p[:, 1], support, backend=backend)
    other = neighbors.nnclr_loss(z[:, 1], p[:, 0], support, backend=backend)
    torch.testing.assert_close(both, (one + other) / 2)
    assert neighbors.nnclr_loss(z, p, support, reduction="none", backend=backend).shape == (2, 33)


# The selection itself.


@pytest.fixture
def selecting(backend, monkeypatch):
    """The backend that is chosen by default."""
    monkeypatch.setenv("CONTRASTIVE_KERNELS_BACKEND", backend)
    return device_of(backend)


def selections():
    for largest in (True, False):
        for k in (1, 2, 5, 40):
            for restriction in ("none", "ids", "diagonal", "both"):
                yield pytest.param(
                    largest, k, restriction, id=f"{'largest' if largest else 'smallest'}-{k}-{restriction}"
                )


def restricted(restriction, n, m):
    options = {}
    if restriction in ("ids", "both"):
        options |= {"x_ids": torch.randint(5, (n,)), "y_ids": torch.randint(5, (m,))}
    return options | ({"exclude_diagonal": True} if restriction in ("diagonal", "both") else {})


@pytest.mark.parametrize(("largest", "k", "restriction"), list(selections()))
@pytest.mark.parametrize("columns", [None, 7, 64])
def test_row_select(largest, k, restriction, columns, monkeypatch, poison, selecting, backend):
    """Small integers, so that most similarities are tied exactly; tiles of a few rows and columns."""
    if not supports(backend, torch.float64):
        pytest.skip(f"{backend} does not take float64")
    if columns is not None:
        monkeypatch.setattr(select, "TILE_COLUMNS", columns)
        monkeypatch.setattr(select, "TILE_ELEMENTS", {"cpu": 5 * columns})
    # with the tiles as they are also several of them each way, the last ones ragged
    for n, m in ((33, 65), (9, 20), (3, 1), *([(270, 1100)] if columns is None else [])):
        x, y = (torch.randint(-2, 3, (rows, 3)).double() for rows in (n, m))
        options = {"k": k, "largest": largest, **restricted(restriction, n, m)}
        values, found = row_select(x, y, **options)
        expected, order = reference.row_select(x, y, **options)
        assert torch.equal(values, expected)
        assert torch.equal(found, order)
        options.pop("y_ids", None)
        for got, want in zip(row_select(x, **options), reference.row_select(x, **options), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_row_select_accumulates_in_float32(dtype, selecting, backend):
    if not supports(backend, dtype) or selecting != "cpu":
        pytest.skip("not this dtype, or not the CPU's autocast")
    x, y = (torch.randn(n, 200).to(dtype).requires_grad_() for n in (33, 129))
    values, columns = row_select(x, y, 4)
    assert values.dtype == torch.float32
    assert not values.requires_grad
    similarity = x.detach().float() @ y.detach().float().T
    torch.testing.assert_close(values, similarity.sort(1, descending=True).values[:, :4])
    torch.testing.assert_close(similarity.gather(1, columns), values)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = row_select(x.detach().float(), y.detach().float(), 4)
    expected = x.detach().bfloat16().double() @ y.detach().bfloat16().double().T
    assert_matches(values, expected.sort(1, descending=True).values[:, :4], torch.float32)


@pytest.mark.parametrize("largest", [True, False])
def test_row_select_puts_nan_first(largest, selecting):
    x, y = torch.randn(5, 8), torch.randn(20, 8)
    y[[3, 17], 2] = torch.nan
    values, columns = row_select(x, y, 3, largest=largest)
    assert torch.equal(columns[:, :2], torch.tensor([[3, 17]]).expand(5, 2))
    assert values[:, :2].isnan().all()
    assert values[:, 2].isfinite().all()
    # unless the pair is not allowed
    values, _ = row_select(x, y, 3, largest=largest, x_ids=torch.zeros(5).long(), y_ids=y[:, 2].isfinite().long())
    assert values.isfinite().all()


def test_row_select_of_nothing(selecting):
    for n, m in ((0, 5), (5, 0), (0, 0)):
        values, columns = row_select(torch.randn(n, 4), torch.randn(m, 4), 3)
        assert values.shape == columns.shape == (n, 3)
        assert (values == -math.inf).all()
        assert (columns == -1).all()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_row_select_does_not_store_the_matrix(selecting):
    """200 rows against 20,000, four tiles' worth: no tensor is larger than a tile and the columns kept before it."""
    x, y = torch.randn(200, 2), torch.randn(20_000, 2)
    with Largest() as largest:
        row_select(x, y, 3)
    assert largest.elements <= select.TILE_ELEMENTS["cpu"] * 1.01


# Modules.


def test_modules_are_their_functions(backend):
    device = device_of(backend)
    pairs = [
        (FalseNegativeLoss, neighbors.false_negative_loss, {"temperature": 0.2, "threshold": 0.1, "mode": "attract"}),
        (EasyNegativeLoss, neighbors.easy_negative_loss, {"temperature": 0.2, "k": 4}),
    ]
    inputs = torch.randn(2, 12, 16, device=device).unbind(0)
    for module, function, options in pairs:
        loss = module(**options, backend=backend)
        expected = function(*inputs, **options, backend=backend)
        assert torch.equal(loss(*inputs), expected)
        assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(loss)))(*inputs), expected)
        for option, value in options.items():
            assert f"{option}={value}" in repr(loss)
        with pytest.raises(TypeError, match="tau"):
            module(tau=0.1)


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_nnclr_module_uses_the_queue_as_it_was_and_then_fills_it(both, backend):
    device = device_of(backend)
    loss = NNCLRLoss(16, 30, 0.2, backend=backend).to(device)
    z, predictions = torch.randn(2, 12, 2, 16, device=device).unbind(0)
    if not both:
        z, predictions = z[:, 0], predictions[:, 1]
    z.requires_grad_()
    before = loss.queue.clone()
    value = loss(z, predictions)
    expected = neighbors.nnclr_loss(z, predictions, before, temperature=0.2, backend=backend)
    torch.testing.assert_close(value, expected)
    stored = F.normalize(z.detach()[:, 0] if both else z.detach(), dim=1)
    torch.testing.assert_close(loss.queue, torch.cat([stored, before[12:]]))
    loss.eval()
    after = loss.queue.clone()
    loss(z, predictions)
    assert torch.equal(loss.queue, after)


# Bad input.


def f(*shape):
    return torch.randn(*shape)


def cancel(**options):
    return neighbors.false_negative_loss(f(8, 16), f(8, 16), **options)


def easy(**options):
    return neighbors.easy_negative_loss(f(8, 16), f(8, 16), **options)


BAD = {
    "support of another dimension": (
        lambda: neighbors.nnclr_loss(f(8, 16), f(8, 16), f(9, 15)),
        ValueError,
        "z (8, 16) and support (9, 15) must have the same last dimension",
    ),
    "predictions of other samples": (
        lambda: neighbors.nnclr_loss(f(8, 16), f(7, 16), f(9, 16)),
        ValueError,
        "z (8, 16) and predictions (7, 16) must have the same first dimension",
    ),
    "one direction of one": (
        lambda: neighbors.nnclr_loss(f(8, 2, 16), f(8, 16), f(9, 16)),
        ValueError,
        "predictions (8, 16) must have shape (N, V, D)",
    ),
    "three views": (
        lambda: neighbors.nnclr_loss(f(8, 3, 16), f(8, 3, 16), f(9, 16)),
        ValueError,
        "must have 2 views",
    ),
    "no support": (lambda: neighbors.nnclr_loss(f(8, 16), f(8, 16), f(0, 16)), ValueError, "support (0, 16) is empty"),
    "nobody": (lambda: neighbors.nnclr_loss(f(0, 16), f(0, 16), f(9, 16)), ValueError, "z (0, 16) is an empty batch"),
    "a list": (lambda: neighbors.nnclr_loss([1.0], f(8, 16), f(9, 16)), TypeError, "z must be a tensor"),
    "mode": (lambda: cancel(mode="ignore"), ValueError, "mode 'ignore' is unknown"),
    "score": (lambda: cancel(score="image"), NotImplementedError, "python_ref.false_negative_loss"),
    "unknown score": (lambda: cancel(score="view"), ValueError, "score 'view' is unknown"),
    "no rule": (lambda: cancel(threshold=None, top_k=None), ValueError, "threshold and top_k are both None"),
    "top_k of nothing": (lambda: cancel(top_k=0), ValueError, "top_k 0 must be at least 1"),
    "top_k of a float": (lambda: cancel(top_k=1.5), TypeError, "top_k must be an integer"),
    "threshold per sample": (lambda: cancel(threshold=f(8)), ValueError, "threshold (8,) must have shape (16,)"),
    "factor": (lambda: cancel(factor="two"), TypeError, "factor must be a number"),
    "ids": (lambda: cancel(ids=torch.zeros(8)), TypeError, "ids has dtype torch.float32"),
    "views differ": (
        lambda: neighbors.false_negative_loss(f(8, 16), f(7, 16)),
        ValueError,
        "z0 (8, 16) and z1 (7, 16) must have the same first dimension",
    ),
    "select": (lambda: easy(select="topk", k=3), ValueError, "select 'topk' is unknown"),
    "k missing": (lambda: easy(), ValueError, "select='bottomk' takes k and not threshold"),
    "threshold missing": (lambda: easy(select="below", k=3), ValueError, "select='below' takes threshold and not k"),
    "both": (lambda: easy(k=3, threshold=0.1), ValueError, "takes k and not threshold"),
    "k of nothing": (lambda: easy(k=0), ValueError, "k 0 must be at least 1"),
    "key ids alone": (lambda: easy(k=3, key_ids=torch.zeros(8).long()), ValueError, "query_ids is not"),
    "temperature": (lambda: easy(k=3, temperature=0.0), ValueError, "temperature 0.0"),
    "empty": (
        lambda: neighbors.easy_negative_loss(f(0, 16), f(0, 16), k=1),
        ValueError,
        "query (0, 16) is an empty batch",
    ),
    "negatives of another dimension": (
        lambda: neighbors.easy_negative_loss(f(8, 16), f(8, 16), f(9, 15), k=1),
        ValueError,
        "query (8, 16) and negative_keys (9, 15) must have the same last dimension",
    ),
    "k of a bool": (lambda: row_select(f(8, 16), k=True), TypeError, "k must be an integer"),
    "select k of nothing": (lambda: row_select(f(8, 16), k=0), ValueError, "k 0 must be at least 1"),
    "select dimensions": (
        lambda: row_select(f(8, 16), f(9, 15)),
        ValueError,
        "x (8, 16) and y (9, 15) must have the same last dimension",
    ),
    "select one of two ids": (
        lambda: row_select(f(8, 16), f(9, 16), x_ids=torch.zeros(8).long()),
        ValueError,
        "y_ids is not",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert message in str(caught.value)
