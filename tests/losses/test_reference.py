"""python_ref beside the package, and its primitives against numbers that can be checked by hand.

The closed forms of a loss are in the loss's own file.
"""

import ast
import math
import pathlib
from types import SimpleNamespace

import pytest
import torch

import python_ref as ref
from tests.support.losses import assert_exact

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("double")


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
    assert_exact(ref.similarity_sum(x, y, term=term, **ids), [expected])


def test_logsumexp_masks():
    x, y = torch.randn(5, 3), torch.randn(4, 3)
    s, bias = x @ y.T, torch.randn(4)
    assert_exact(ref.similarity_logsumexp(x, y, scale=2.0, y_bias=bias), (2 * s + bias).logsumexp(1))
    rows, columns = ref.similarity_logsumexp(x, y, columns=True)
    assert_exact(rows, s.logsumexp(1))
    assert_exact(columns, s.logsumexp(0))
    median = s.median(1).values
    assert_exact(ref.similarity_logsumexp(x, y, cutoff=median), s.sort(1).values[:, :2].logsumexp(1))


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


def test_first_pair_wins_a_tie():
    views = torch.eye(3)[None].clone().requires_grad_()
    values, pairs = ref.min_view_similarity(views)
    assert pairs.tolist() == [[0, 1]]
    (gradient,) = torch.autograd.grad(values.sum(), views)
    assert gradient.tolist() == [[[0, 1, 0], [1, 0, 0], [0, 0, 0]]]


def test_gradients():
    """The sub-gradient rules are choices; everything else is gradcheck's."""
    views = torch.randn(4, 3, 3, requires_grad=True)
    polarization = SimpleNamespace(lower=0.1, upper=0.6, weight=0.5)
    assert torch.autograd.gradcheck(
        lambda v: ref.nt_xent_loss(v[:, 0], v[:, 1], polarization=polarization, label_smoothing=0.1), views
    )
    assert torch.autograd.gradcheck(lambda v: ref.arcl_loss(v), views)
