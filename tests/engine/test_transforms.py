"""Transforms and higher derivatives: those of the dense loss or an error, never a gradient that got lost."""

import pytest
import torch
from torch.autograd import forward_ad

import contrastive_kernels as ck
import python_ref
from tests.support.testing import backends, device_of, precise
from tests.support.variants import EVERY

# One sweep, two directions, one sweep with its gradients, a selection, views, moments, a regulariser.
NAMES = ("info_nce", "clip", "siglip", "easy_negative", "arcl", "spectral_contrastive", "nt_xent-polarized")

PREFERRED = backends()[-1]


class Transformed:
    """A case as a function of its first features, of the package and of the reference."""

    def __init__(self, name: str, backend: str) -> None:
        if precise(backend) != torch.float64:
            pytest.skip(f"{backend} has no float64")
        case = EVERY[name]
        features = case.features((6, 5, 4), torch.float64, device_of(backend))
        self.name = next(iter(features))
        self.x, self.v, self.w = (
            features[self.name],
            *torch.randn(2, *features[self.name].shape).to(features[self.name]),
        )
        self.reference = lambda x: case(python_ref, {**features, self.name: x})
        options = {"backend": backend, **case.options}
        function = getattr(ck, case.loss)  # Dynamo does not see the case
        self.loss = lambda x: function(**{**features, self.name: x}, **options)


def second(loss, x, v, **options):
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return torch.autograd.grad((first * v).sum(), leaf, **options)[0]


def third(loss, x, v, w):
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), leaf, create_graph=True)
    return torch.autograd.grad((second * w).sum(), leaf)[0]


WAYS = {
    "torch.func.grad": lambda loss, x, v, w: torch.func.grad(loss)(x),
    "torch.func.vjp": lambda loss, x, v, w: torch.func.vjp(loss, x)[1](x.new_tensor(2.0))[0],
    "torch.func.jacrev": lambda loss, x, v, w: torch.func.jacrev(loss)(x),
    "vmap": lambda loss, x, v, w: torch.func.vmap(loss)(torch.stack([x, v, w])),
    "vmap of grad": lambda loss, x, v, w: torch.func.vmap(torch.func.grad(loss), in_dims=1)(torch.stack([x, v, w], 1)),
    "grad of grad": lambda loss, x, v, w: torch.func.grad(lambda a: (torch.func.grad(loss)(a) * v).sum())(x),
    "second derivative": lambda loss, x, v, w: second(loss, x, v),
    "second derivative with a graph": lambda loss, x, v, w: second(loss, x, v, create_graph=True).detach(),
    "hvp": lambda loss, x, v, w: torch.autograd.functional.hvp(loss, x, v)[1],
    "vhp": lambda loss, x, v, w: torch.autograd.functional.vhp(loss, x, v)[1],
    "third derivative": third,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_transforms_are_those_of_the_dense_loss(name, way, backend):
    case = Transformed(name, backend)
    expected = WAYS[way](case.reference, case.x, case.v, case.w)
    assert expected.any() or (name, way) == ("spectral_contrastive", "third derivative")  # it is quadratic
    torch.testing.assert_close(WAYS[way](case.loss, case.x, case.v, case.w), expected)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(name, backend):
    """A tangent that gets lost would be a derivative of zero."""
    case = Transformed(name, backend)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(case.loss, (case.x,), (case.v,))
    for context in (torch.enable_grad(), torch.no_grad()):
        with forward_ad.dual_level(), context, pytest.raises(NotImplementedError, match="jvp"):
            case.loss(forward_ad.make_dual(case.x, case.v))


COMPILED = {
    "grad": lambda loss, x, v: torch.func.grad(loss)(x),
    "jvp": lambda loss, x, v: torch.func.jvp(loss, (x,), (v,))[1],
    "vmap": lambda loss, x, v: torch.func.vmap(loss)(torch.stack([x, v])),
    "vmap of grad": lambda loss, x, v: torch.func.vmap(torch.func.grad(loss))(torch.stack([x, v])),
    "grad of grad": lambda loss, x, v: torch.func.grad(lambda a: (torch.func.grad(loss)(a) * v).sum())(x),
    "gradient inside": lambda loss, x, v: second(loss, x, v).detach(),
}


@pytest.mark.parametrize("backend", [PREFERRED])
@pytest.mark.parametrize(("compiler", "fullgraph"), [("eager", True), ("aot_eager", False)])
@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("name", ["clip", "siglip", "spectral_contrastive"])
def test_compiled_transforms_are_right_or_refused(name, way, compiler, fullgraph, backend):
    case = Transformed(name, backend)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, v: COMPILED[way](case.loss, x, v), backend=compiler, fullgraph=fullgraph)
    expected = COMPILED[way](case.reference, case.x, case.v)
    assert expected.any()
    try:
        found = compiled(case.x, case.v)
    except Exception:  # the compiler wraps the refusal in errors of its own
        assert fullgraph or way not in ("grad", "vmap")  # these run uncompiled where the graph may break
        return
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", [PREFERRED])
@pytest.mark.parametrize("name", ["clip", "siglip", "spectral_contrastive"])
def test_second_derivatives_of_a_compiled_loss_are_right_or_refused(name, backend):
    case = Transformed(name, backend)
    torch.compiler.reset()
    found = second(torch.compile(case.loss, backend="eager"), case.x, case.v)
    torch.testing.assert_close(found, second(case.reference, case.x, case.v))
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=r"double back|not have been used"):
        second(torch.compile(case.loss, backend="aot_eager"), case.x, case.v)
