"""What PyTorch's counter counts for the operators: the products of rows that are computed, pair by pair."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import contrastive_kernels as ck
from contrastive_kernels.engine import flops, spec
from contrastive_kernels.engine.backends import BACKENDS
from contrastive_kernels.engine.operators import operator
from tests.engine.test_operators import sweep_arguments

N, D = 24, 16
PRODUCT = 2 * D * N * N
KINDS = ("plain", "empty", "no columns", "one", "options", "self", "term")


def counted(function, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def test_every_operator_has_a_formula():
    names = {f"{name}_{operator}" for name, backend in BACKENDS.items() for operator in backend.operators}
    names |= {f"group_{name}" for name in spec.GROUP_SCHEMAS}
    assert set(spec.SCHEMAS) == set(flops.FORMULAS) and set(spec.GROUP_SCHEMAS) == set(flops.GROUP_FORMULAS)
    for name in names:
        assert getattr(torch.ops.contrastive_kernels, name) in flop_registry


def inside(name: str, *flat) -> int:
    """Return what the counter sees of the matrix products inside an operator of the PyTorch backend."""
    function = BACKENDS["torch"].operators[name]
    grouped = {
        "forward": lambda: function(*spec.ForwardArguments.of(flat)[:2], maximum=flat[-1], save_scores=False),
        "backward": lambda: function(*spec.BackwardArguments.of(flat)[:-1]),
        "softmax_total": lambda: function(*spec.SoftmaxArguments.of(flat)),
        "softmax_mean": lambda: function(*spec.SoftmaxMeanArguments.of(flat)),
        "softmax_mean_backward": lambda: function(*spec.SoftmaxMeanBackwardArguments.of(flat)),
    }
    return counted(grouped.get(name, lambda: function(*flat)))


@pytest.mark.parametrize("kind", KINDS)
def test_sweeps_count_the_products_inside(kind):
    inputs, what, maximum = sweep_arguments(kind, torch.float32, "cpu")
    forward, backward = operator("torch", "forward"), operator("torch", "backward")
    arguments = (*inputs, *what, maximum)
    assert counted(forward, *arguments) == inside("forward", *arguments)
    statistics = forward(*arguments)
    grads = [torch.randn_like(s, dtype=inputs.scale.dtype) for s in statistics[:3]]
    given = [getattr(inputs, name) is not None for name in spec.DERIVATIVES]
    for of_x, of_y in itertools.product([True, False], [given[1], False]):
        wanted = [of_x, of_y, *given[2:], False]
        arguments = (*grads, *statistics[:2], *inputs, *what, wanted)
        assert counted(backward, *arguments) == inside("backward", *arguments)


@pytest.mark.parametrize("kind", ["plain", "self"])
def test_softmax_totals_count_the_products_inside(kind):
    inputs, *_ = sweep_arguments(kind, torch.float32, "cpu")
    what = spec.Description([1.0], False, "", [], False, 0)
    weight, own = torch.randn(2, inputs.x.shape[0]).unbind(0)
    for wanted in ([True, inputs.y is not None, True], [True, False, False], [False, False, False]):
        arguments = (weight, own, *inputs, *what, wanted)
        assert counted(operator("torch", "softmax_total"), *arguments) == inside("softmax_total", *arguments) > 0


@pytest.mark.parametrize("kind", ["plain", "self"])
def test_softmax_means_count_the_products_inside(kind):
    inputs, *_ = sweep_arguments(kind, torch.float32, "cpu")
    columns = inputs.x if inputs.y is None else inputs.y
    what = spec.Description([1.0], False, "", [], False, 0)
    values = torch.randn(columns.shape[0], 5)
    arguments = (values, *inputs, *what)
    assert counted(operator("torch", "softmax_mean"), *arguments) == inside("softmax_mean", *arguments) > 0
    mean, row_lse = operator("torch", "softmax_mean")(*arguments)
    flow = torch.randn_like(mean), torch.randn_like(row_lse).float(), row_lse.float()
    for wanted in itertools.product([True, False], [True, False], [False], [False], [True, False]):
        if inputs.y is None and wanted[1]:
            continue
        arguments = (*flow, values, *inputs, *what, list(wanted))
        expected = inside("softmax_mean_backward", *arguments)
        assert counted(operator("torch", "softmax_mean_backward"), *arguments) == expected


@pytest.mark.parametrize("kind", ["plain", "self"])
def test_a_guide_counts_one_product_more(kind):
    inputs, what, maximum = sweep_arguments(kind, torch.float32, "cpu")
    n, m = inputs.x.shape[0], (inputs.x if inputs.y is None else inputs.y).shape[0]
    guide = torch.randn(n, 7), None if inputs.y is None else torch.randn(m, 7), torch.zeros(n)
    plain, guided = (
        counted(operator("torch", name), *inputs, *what, maximum, *more)
        for name, more in (("forward", ()), ("guided_forward", guide))
    )
    assert guided == plain + 2 * 7 * n * m
    function = BACKENDS["torch"].operators["forward"]
    assert guided == counted(lambda: function(inputs, what, maximum=maximum, guide=spec.Guide(*guide)))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("views", (torch.ones(5, 3, 8),)),
        ("select", (torch.ones(17, 8), torch.ones(9, 8), 3, True, None, None, False)),
        ("select", (torch.ones(17, 8), None, 3, True, None, None, True)),
        ("unit_rows", (torch.ones(5, 8),)),
    ],
)
def test_other_operators_count_the_products_inside(name, arguments):
    assert counted(operator("torch", name), *arguments) == inside(name, *arguments)


def test_unordered_pairs_are_visited_once():
    """C++ and Triton: the diagonal, and one of (i, j) and (j, i); the gradient then takes one product of all pairs."""
    pairs = sum(1 for _ in itertools.combinations_with_replacement(range(N), 2))
    inputs = spec.Inputs((N, D), None, (), *[None] * 6)
    what = spec.Description([1.0], False, "", [], False, 1)
    wanted = [True, False, False, False, False, False]
    upstream = ((1, N), (0,), (0,), (1, N), (0,))
    for cutoff, visited, products in ((None, pairs, N * N), ((N,), N * N, 2 * N * N)):
        of_cutoff = inputs._replace(cutoff=cutoff)
        for backend in ("cpp", "triton"):
            assert flops.FORMULAS["forward"](backend, *of_cutoff, *what, False) == 2 * D * visited
            backward = flops.FORMULAS["backward"](backend, *upstream, *of_cutoff, *what, wanted)
            assert backward == 2 * D * (visited + products)
    views = (5, 4, D)
    assert flops.FORMULAS["views"]("cpp", views) == 2 * D * 5 * len(list(itertools.combinations(range(4), 2)))


@pytest.mark.parametrize("sizes", [(N, N), (N, 7, 11), (5, 0, 3, 9)])
def test_ranks_of_a_group_count_every_pair_once(sizes):
    """Of x with itself and one log-sum-exp; in all other sweeps once in either direction."""
    total, what = sum(sizes), spec.Description([1.0], False, "", [], False, 1)
    wanted = [True, False, False, False, False, False]

    def of_all(inputs, name, *more):
        formula = flops.GROUP_FORMULAS[name]
        last = ("cpp", "group", list(sizes), 1 << 20)
        return sum(formula("group", *more, *inputs(n), *what, *rest[name], *last) for n in sizes)

    rest = {"sweep": (False,), "sweep_backward": (wanted,)}
    itself = lambda n: spec.Inputs((n, D), None, (), *[None] * 6)  # noqa: E731
    cut = lambda n: itself(n)._replace(cutoff=(n,))  # noqa: E731
    upstream = ((1, N), (0,), (0,), (1, N), (0,))
    assert of_all(itself, "sweep") == 2 * D * total * (total + 1) // 2
    assert of_all(cut, "sweep") == 2 * D * total * total
    own = sum(n * (n + 1) // 2 + n * n for n in sizes)
    others = sum(a * b for a, b in itertools.combinations(sizes, 2))
    assert of_all(itself, "sweep_backward", *upstream) == 2 * D * (own + 3 * others)
    select, last = flops.GROUP_FORMULAS["select"], ("cpp", "group", list(sizes), 0)
    selected = sum(select("group", (n, D), *[None] * 7, *last) for n in sizes)
    assert selected == 2 * D * total * total


def dense(x, y):
    logits, target = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T, torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def test_a_loss_counts_as_its_products(backend):
    x, y = torch.randn(2, N, D).unbind(0)
    x.requires_grad_(), y.requires_grad_()
    # C++ saves the similarities of so few rows, as the dense loss does; the other backends compute them again
    again = 0 if BACKENDS[backend].score_dtype(x, y) and BACKENDS[backend].saved_scores_bytes else PRODUCT
    assert counted(lambda: dense(x, y).backward()) == 3 * PRODUCT
    ours = counted(lambda: ck.clip_loss(x, y, 2.0, normalize=True, backend=backend).backward())
    assert ours == 3 * PRODUCT + again
    assert counted(lambda: ck.clip_loss(x.detach(), y.detach(), 2.0, backend=backend)) == PRODUCT


def test_the_counter_may_be_imported_later():
    """The package does not import it, because it imports Triton."""
    script = """
import sys, torch
import contrastive_kernels as ck
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(8, 4)
with FlopCounterMode(display=False) as counter:
    ck.clip_loss(x, x + 1, 1.0, backend="torch")
assert counter.get_total_flops() == 2 * 8 * 8 * 4
"""
    subprocess.run([sys.executable, "-c", script], check=True)
