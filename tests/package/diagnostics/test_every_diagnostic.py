"""What holds for every diagnostic: it does not depend on where it is called, and never hides broken data."""

import inspect

import numpy as np
import pytest
import torch

from contrastive_kernels import diagnostics as dg
from tests.support.diagnostics import DIAGNOSTICS, Measured, measure

each = pytest.mark.parametrize("name", DIAGNOSTICS)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def assert_same(found, expected, **tolerance):
    """The same names, dtypes and, without a tolerance, bits."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **(tolerance or dict(rtol=0, atol=0)), equal_nan=True)


def test_every_diagnostic_is_here():
    functions = {name for name in dg.__all__ if inspect.isfunction(getattr(dg, name))}
    assert {name.partition(" ")[0] for name in DIAGNOSTICS} == functions


@each
def test_autocast_changes_nothing(name):
    measured = Measured.make()
    expected = measure(name, measured)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(name, measured)
        assert torch.is_autocast_enabled("cpu")
    assert_same(found, expected)


@halves
@each
def test_half_precision_is_widened(name, dtype):
    """Half precision rounds the inputs and nothing else; autocast, as evaluation loops run, makes no difference."""
    half = Measured.make().map(lambda x: x.to(dtype))
    expected = measure(name, half.map(lambda x: x.float()))
    assert_same(measure(name, half), expected)
    with torch.autocast("cpu", dtype):
        assert_same(measure(name, half), expected)


@halves
@each
def test_half_precision_goes_with_float32(name, dtype):
    """As the class means of half features, which are float32."""
    measured = Measured.make()
    y, means, joint = (x.to(dtype) for x in (measured.y, measured.means, measured.joint))
    for mixed in (measured._replace(y=y), measured._replace(means=means), measured._replace(joint=joint)):
        if "views" in name or name == "centre_bound":
            mixed = mixed._replace(y=mixed.y.float())  # one tensor holds both views
        assert_same(measure(name, mixed), measure(name, mixed.map(lambda x: x.float())))


@each
def test_modes_of_autograd_change_nothing(name):
    measured = Measured.make()
    expected = measure(name, measured)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(measure(name, measured), expected)
    with torch.inference_mode():
        inference = measured.map(torch.clone)
    assert_same(measure(name, inference), expected)


@each
def test_strides_change_nothing(name):
    measured = Measured.make()
    strided = measured.map(lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0])
    assert not strided.x.is_contiguous()
    # The order of a sum follows the strides.
    assert_same(measure(name, strided), measure(name, measured), rtol=1e-3, atol=1e-4)


@each
def test_inputs_are_untouched(name):
    measured = Measured.make()
    before = [x.clone() for x in measured]
    measure(name, measured)
    for x, y in zip(measured, before, strict=True):
        assert torch.equal(x, y)


def shows_the_damage(name, found, damaged):
    """Whether a result says that the rows `damaged` of x and y, or of the joint distribution, are broken."""
    match name.partition(" ")[0]:
        case "positive_rank":
            return (found["result"][damaged] == len(found["result"])).all()
        case "retrieval_accuracy":
            return (found["result"] <= 1 - len(damaged) / 48).all()
        case "distance_histogram":
            return found["invalid"] > 0
        case "band_count":
            return found["invalid"] > 0 and found["fraction"].isnan()
        case _:
            return not all(value.isfinite().all() for value in found.values())


# Plots have tests of their own; infinite raw rows have infinite products, which have an order.
BROKEN = [
    (name, value)
    for name in DIAGNOSTICS
    for value in (torch.nan, torch.inf)
    if not name.startswith("plot_") and (name, value) != ("positive_rank raw", torch.inf)
]


@pytest.mark.parametrize("rows", [[5], range(48)], ids=["one", "all"])
@pytest.mark.parametrize(("name", "value"), BROKEN)
def test_broken_rows_show(name, value, rows):
    """NaN gives NaN, or is counted; so does infinity, which has no direction."""

    def damage(x):
        x = x.clone()
        if len(x) == 48:
            x[rows] = value
        return x

    measured = Measured.make()
    assert not shows_the_damage(name, measure(name, measured), rows)
    assert shows_the_damage(name, measure(name, measured.map(damage)), rows)


NUMPY = {
    "class_means": lambda n: dg.class_means(torch.eye(8), torch.arange(8), n(3)),
    "centre_bound": lambda n: dg.centre_bound(
        torch.eye(8)[:, None].expand(8, 2, 8), torch.arange(8) % 3, n(3), sigma=n(1), delta=n(0), lipschitz=n(1),
        epsilon=n(0), radius=n(2),
    ),
    "distance_histogram": lambda n: dg.distance_histogram(torch.eye(8), bins=n(4)),
    "band_count": lambda n: dg.band_count(torch.eye(8), lower=n(0), upper=n(1)),
    "retrieval_accuracy": lambda n: dg.retrieval_accuracy(torch.eye(8), torch.eye(8), k=n(2)),
    "retrieval_accuracy of several": lambda n: dg.retrieval_accuracy(torch.eye(8), torch.eye(8), k=(n(2), n(3))),
    "spectral_optimum": lambda n: dg.spectral_optimum(torch.eye(8) / 8, n(2)),
    "adversarial_radius": lambda n: dg.adversarial_radius(
        torch.eye(8), torch.arange(8), torch.eye(8), lipschitz=n(2)
    ),
    "alignment": lambda n: dg.alignment(torch.eye(8), torch.ones(8, 8), exponent=n(3)),
    "uniformity": lambda n: dg.uniformity(torch.eye(8), t=n(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMPY)
def test_numbers_of_numpy(name):
    expected = NUMPY[name](int)
    for kind in (np.int64, np.int32, np.uint8):
        found = NUMPY[name](kind)
        for x, y in zip(*((r,) if torch.is_tensor(r) else r for r in (found, expected)), strict=True):
            assert torch.equal(x, y) or (x.isnan() & y.isnan()).all()
    with pytest.raises(TypeError, match="bool"):
        NUMPY[name](bool)
