"""Terms: unique names, slopes that are derivatives of the values, and no slope at a kink."""

import itertools

import pytest
import torch

from contrastive_kernels.engine import terms

# One instance of every term, and the arguments v of `value` where it has a kink.
INSTANCES = {
    "identity": (terms.Identity(), []),
    "count": (terms.Count(), []),
    "square": (terms.Square(), []),
    "band": (terms.Band(0.1, 0.6), [0.8, -0.2]),
    "softplus": (terms.Softplus(3.0, -1.0), []),
    "hinge": (terms.Hinge(0.2), [0.0]),
    "distance_hinge": (terms.DistanceHinge(0.2), [0.0]),
    "student": (terms.Student(2.5, -2.0, 1.5), []),
    "gaussian": (terms.Gaussian(2.0), []),
}
every_term = pytest.mark.parametrize("name", INSTANCES)


def subclasses(cls):
    return [*cls.__subclasses__(), *itertools.chain(*(subclasses(sub) for sub in cls.__subclasses__()))]


def test_names_are_unique():
    classes = subclasses(terms.Term)
    assert len({cls.name for cls in classes}) == len(classes)
    assert {cls.name: cls for cls in classes} == terms.TERMS
    assert {name: type(term) for name, (term, _) in INSTANCES.items()} == terms.TERMS


@every_term
def test_slope_is_the_derivative_of_the_value(name):
    """Away from kinks, in float64; for Student's kernel above 0, below which the value of 0 keeps its slope."""
    term, kinks = INSTANCES[name]
    constants = term.operands().constants
    v = torch.linspace(0.0 if name == "student" else -3.0, 3.0, 601, dtype=torch.float64) + 1e-3
    for kink in kinks:
        assert ((v - kink).abs() > 1e-4).all()
    v.requires_grad_()
    value = term.value(v, *constants)
    (derivative,) = torch.autograd.grad(value.sum() + 0 * v.sum(), v)
    slope = term.slope(v.detach(), *constants)
    assert value.shape == slope.shape == v.shape
    torch.testing.assert_close(slope, derivative, rtol=1e-12, atol=1e-14)


@every_term
def test_slope_at_a_kink_is_0(name):
    term, kinks = INSTANCES[name]
    v = torch.tensor(kinks, dtype=torch.float64)
    assert not term.slope(v, *term.operands().constants).any()


def test_student_below_0():
    """A squared distance that rounding made negative counts as 0, and the slope stays that of 0."""
    term = terms.Student(2.5)
    v = torch.tensor([-0.5, -1e-9, 0.0], dtype=torch.float64)
    assert term.value(v, 2.5).tolist() == [1.0] * 3
    assert term.slope(v, 2.5).tolist() == [-2.5] * 3


@pytest.mark.parametrize("name", [name for name in INSTANCES if name not in ("count", "identity")])
def test_nan_survives_value_and_slope(name):
    term, _ = INSTANCES[name]
    nan = torch.tensor([torch.nan])
    assert term.value(nan, *term.operands().constants).isnan().all()
    assert term.slope(nan, *term.operands().constants).isnan().all()
