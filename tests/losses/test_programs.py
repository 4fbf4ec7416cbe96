"""Every loss in a compiled graph and in an exported program: any batch size, and the gradients of the eager loss."""

import pytest
import torch
from torch.export import Dim

import contrastive_kernels as ck
from tests.support.testing import Outcome, assert_matches, assert_outcomes_match, backends, device_of, differentiate
from tests.support.variants import ALL, EVERY

PREFERRED = backends()[-1]
SIZES = ((33, 17, 24), (40, 21, 24), (52, 35, 24))
MAIN = {case.loss: name for name, case in reversed(ALL.items())}.values()  # the first form of every loss


def twice(case, backend):
    """Return the loss added to itself, at another temperature where it has one, with the options that a graph needs."""
    function = getattr(ck, case.loss)
    options = {**case.options, **({"backend": backend} if case.takes("backend") else {})}
    colder = (
        {"temperature": 0.3} if case.takes("temperature") and not {"temperature", "logit_scale"} & {*options} else {}
    )
    if case.options.get("form") == "pull":
        colder = {}

    def loss(**features):
        return function(**options, **features) + 0.5 * function(**{**options, **colder}, **features)

    return loss


def wide(outcome):
    """Return an outcome in float64, as a reference."""
    return Outcome(outcome.value.double(), {k: None if g is None else g.double() for k, g in outcome.gradients.items()})


@pytest.mark.parametrize(("name", "dynamic"), [*((name, None) for name in ALL), *((name, True) for name in MAIN)])
def test_compiles_for_every_batch_size(name, dynamic):
    """Twice in one graph; at most two graphs for three sizes."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    case = ALL[name]
    loss = twice(case, PREFERRED)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="eager")
    for shape in SIZES:
        features = case.features(shape, torch.float32, device_of(PREFERRED))
        ours, eager = differentiate(compiled, features), differentiate(loss, features)
        assert_outcomes_match(ours, wide(eager), torch.float32, 5.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def one_tensor(case, features):
    """Return the names of two features that may be one tensor."""
    names = [
        name for name, x in features.items() if x.is_floating_point() and x.shape == next(iter(features.values())).shape
    ]
    return names if len(names) > 1 and not case.detached else []


TWO_SIDED = [name for name in MAIN if one_tensor(ALL[name], ALL[name].features(SIZES[0]))]


@pytest.mark.parametrize("name", TWO_SIDED)
def test_one_tensor_on_both_sides_compiles(name):
    torch.compiler.reset()
    case = ALL[name]
    features = case.features(SIZES[0], torch.float32, device_of(PREFERRED))
    first, *others = one_tensor(case, features)
    loss = twice(case, PREFERRED)

    def same(x):
        return loss(**{**features, first: x, **dict.fromkeys(others, x)})

    compiled = torch.compile(same, fullgraph=True, backend="aot_eager")
    ours, eager = (differentiate(function, {"x": features[first]}) for function in (compiled, same))
    assert_outcomes_match(ours, wide(eager), torch.float32, 5.0)


class Model(torch.nn.Module):
    """A layer that is trained, before a loss with all its inputs in one tuple."""

    def __init__(self, case, names) -> None:
        super().__init__()
        self.function, self.names = getattr(ck, case.loss), names
        self.options = {**case.options, **({"backend": PREFERRED} if case.takes("backend") else {})}
        self.layer = torch.nn.Linear(8, 8).to(device_of(PREFERRED))

    def forward(self, tensors):
        features = [self.layer(x) if x.is_floating_point() else x for x in tensors]
        value = self.function(**self.options, **dict(zip(self.names, features, strict=True)))
        return value.mean()


def exported_matches(case, strict, dynamic):
    """Compare an exported program with its module at the size of the export and at another one."""
    torch.compiler.reset()
    small, large = (case.features(shape, torch.float32, device_of(PREFERRED)) for shape in ((24, 18, 8), (33, 21, 8)))
    model = Model(case, list(small))
    sizes = {24: dynamic("rows"), 18: dynamic("columns")}
    shapes = tuple({0: sizes[len(x)]} if len(x) in sizes else {} for x in small.values())
    inputs = (tuple(small.values()),)
    program = torch.export.export(model, inputs, dynamic_shapes=(shapes,), strict=strict).module()
    for features in (small, large):
        found = []
        for module in (program, model):
            module.zero_grad()
            value = module(tuple(features.values()))
            value.backward()
            found.append((value.detach(), *(p.grad.clone() for p in module.parameters())))
        for ours, eager in zip(*found, strict=True):
            assert_matches(ours, eager.double(), torch.float32, "value or gradient", 1.0)
    return program, model


def named(name):
    return Dim(name, min=16, max=4096)


@pytest.mark.parametrize("name", [*ALL, "decoupled-weighted", "spectral_contrastive-gram", "hard_negative-polarized"])
def test_exports_with_a_dynamic_batch(name):
    exported_matches(EVERY[name], False, named)


@pytest.mark.parametrize("name", MAIN)
def test_program_exported_without_gradients_has_them(name):
    """What needs a gradient may change after the export: the features, a weight."""
    case = ALL[name]
    features = case.features((24, 18, 8), torch.float32, device_of(PREFERRED))
    if case.takes("weight"):
        features["weight"] = torch.rand(24, device=device_of(PREFERRED))
    names = list(features)
    function = getattr(ck, case.loss)
    options = {**case.options, **({"backend": PREFERRED} if case.takes("backend") else {})}

    class Loss(torch.nn.Module):
        def forward(self, *tensors):
            return function(**options, **dict(zip(names, tensors, strict=True)))

    program = torch.export.export(Loss(), tuple(features.values())).module()
    exported = differentiate(lambda **tensors: program(*tensors.values()), features)
    eager = differentiate(lambda **tensors: function(**options, **tensors), features)
    assert_outcomes_match(exported, wide(eager), torch.float32, 5.0)


@pytest.mark.parametrize("name", MAIN)
def test_exports_strictly(name):
    exported_matches(ALL[name], True, named)


def test_exported_sizes_are_not_bounded_by_the_saved_scores():
    """A small batch saves its similarities; a program that guards on it would refuse a large one."""
    program, model = exported_matches(ALL["clip"], False, lambda name: Dim.AUTO)
    features = tuple(ALL["clip"].features((2000, 1, 8), torch.float32, device_of(PREFERRED)).values())
    torch.testing.assert_close(program(features), model(features))
