"""Every backend fulfils the protocol, and the choice between the backends."""

import importlib.metadata
import inspect
import typing

import pytest
import torch

from contrastive_kernels.engine import backends, spec
from contrastive_kernels.engine.backends import BACKENDS, base, choose, triton
from contrastive_kernels.engine.backends.triton import tiles
from contrastive_kernels.primitives.sweep import ALL_PAIRS, _prepare
from tests.support.testing import dtype_id

REQUIRED = {"forward", "backward", "unit_rows", "unit_rows_backward", "views"}
PROTOCOL = {name: member for name, member in vars(base.Backend).items() if not name.startswith("_")}
every_backend = pytest.mark.parametrize("backend", [pytest.param(b, id=name) for name, b in BACKENDS.items()])


def parameters(function, *, of_class=False):
    """Return names and kinds of the parameters of a function or, without self, of a method."""
    found = [(parameter.name, parameter.kind) for parameter in inspect.signature(function).parameters.values()]
    return found[1:] if of_class else found


@every_backend
def test_attributes(backend):
    """Every attribute of the protocol exists with its type, every method with its parameters and result."""
    assert set(PROTOCOL) >= {"name", "saved_scores_bytes", "operators", "not_supported_reasons"}
    for name, member in PROTOCOL.items():
        if isinstance(member, property):
            wanted = typing.get_type_hints(member.fget)["return"]
            assert isinstance(getattr(backend, name), typing.get_origin(wanted) or wanted), name
        else:
            assert parameters(getattr(backend, name)) == parameters(member, of_class=True), name
    x = torch.zeros(3, 4)
    reasons = backend.not_supported_reasons(x)
    assert isinstance(reasons, list)
    assert all(isinstance(reason, str) and reason for reason in reasons)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_dtypes(backend, dtype):
    """Statistics are at least as wide as the compute dtype; what takes part in no forward has no score dtype."""
    x = torch.zeros(3, 4, dtype=dtype)
    if backend.not_supported_reasons(x):
        pytest.skip("not this dtype, or not here")
    assert backend.statistic_dtype(x).itemsize >= spec.compute_dtype(x).itemsize
    for y in (None, x):
        assert isinstance(backend.score_dtype(x, y), (torch.dtype, type(None)))


# What implementations take whose arguments are grouped.
GROUPED = {
    "forward": "inputs, what, *, maximum, save_scores",
    "backward": "upstream, inputs, what, wanted, scores, *, float32_gradients",
    "softmax_total": "weight, own, inputs, what, wanted",
    "softmax_mean": "values, inputs, what",
    "softmax_mean_backward": "upstream, values, inputs, what, wanted",
}


@every_backend
def test_operators(backend):
    """Each has a schema; the required ones are there; implementations take what the schema passes."""
    operators = backend.operators
    if backend.name == "cpp" and not operators:
        pytest.skip("the extension is not built")
    assert REQUIRED <= set(operators) <= set(spec.SCHEMAS)
    for name, function in operators.items():
        if function is None:
            assert backend.name == "cpp"
        elif name.startswith("guided_"):
            assert function is operators[name.removeprefix("guided_")]
        elif name in GROUPED:
            schema = GROUPED[name]
            kinds = {False: inspect.Parameter.POSITIONAL_OR_KEYWORD, True: inspect.Parameter.KEYWORD_ONLY}
            positional, _, keyword = schema.partition(", *, ")
            expected = [(n, kinds[False]) for n in positional.split(", ")]
            expected += [(n, kinds[True]) for n in keyword.split(", ") if n]
            if f"guided_{name}" in operators:  # the same function
                expected.append(("guide", kinds[True]))
            assert parameters(function) == expected
        else:
            arguments = torch._C.parse_schema(f"f{spec.SCHEMAS[name]}").arguments
            assert [n for n, _ in parameters(function)] == [argument.name for argument in arguments]


def test_pytorch_takes_everything():
    """So that one backend always does."""
    assert list(BACKENDS)[-1] == "torch"
    for dtype in (torch.float64, torch.bfloat16):
        assert BACKENDS["torch"].not_supported_reasons(torch.zeros(2, 2, dtype=dtype, device="meta")) == []


def test_the_first_backend_that_takes_the_features(monkeypatch):
    x = torch.zeros(2, 2)
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    for name in BACKENDS:
        for other in BACKENDS.values():
            reasons = [] if other.name == name else ["not in this test"]
            monkeypatch.setattr(other, "not_supported_reasons", lambda x, reasons=reasons: reasons)
        assert choose(x).name == name
        assert choose(x, name).name == name


def test_pytorch_takes_small_sweeps(monkeypatch):
    """Below the crossover of the device, where there is one, unless a backend is asked for or a program is compiled."""
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(BACKENDS["triton"], "not_supported_reasons", lambda x: [])
    x, y = torch.zeros(40, 8), torch.zeros(50, 8)

    def chosen(x, y=None, requested=None):
        return _prepare(x, y, ALL_PAIRS, 1.0, None, (1.0,), False, None, requested)[2].name

    assert tiles.CROSSOVER == {}
    assert chosen(x) == "triton"
    monkeypatch.setattr(tiles, "CROSSOVER", {"interpreter": 2000, 90: 10**9})
    assert [chosen(x), chosen(x, y), chosen(y)] == ["torch", "triton", "triton"]
    assert chosen(x, requested="triton") == "triton"
    assert choose(x).name == "triton"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(x) == "triton"


@pytest.mark.parametrize("operator", spec.SCHEMAS)
@every_backend
def test_pytorch_stands_in_for_a_missing_operator(backend, operator, monkeypatch):
    """The name of the requested backend is still checked, so is whether it takes the features."""
    x = torch.zeros(2, 2)
    monkeypatch.setattr(backend, "not_supported_reasons", lambda x: [])
    has_it = {**backend.operators, operator: backend.operators.get(operator)}
    monkeypatch.setattr(backend, "operators", has_it)
    assert choose(x, backend.name, operator).name == backend.name
    monkeypatch.setattr(backend, "operators", {name: f for name, f in has_it.items() if name != operator})
    assert choose(x, backend.name, operator).name == "torch"
    monkeypatch.setattr(backend, "not_supported_reasons", lambda x: ["not in this test"])
    with pytest.raises(NotImplementedError, match="not in this test"):
        choose(x, backend.name, operator)


@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        ({"triton": "3.6.0", "numpy": "2.4.1"}, "interpreter of Triton 3.6 does not work with numpy 2.4"),
        ({"triton": "3.5.1", "numpy": "2.10.0"}, "interpreter of Triton 3.5 does not work with numpy 2.10"),
        ({"triton": "3.6.0"}, "needs numpy, which is not installed"),
        ({"triton": "3.6.0", "numpy": "2.3.5"}, None),
        ({"triton": "3.7.1", "numpy": "2.4.1"}, None),
    ],
)
def test_the_interpreter_and_numpy(versions, problem, monkeypatch):
    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    triton._interpreter_problem.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(triton, "installed", True)
    x = torch.zeros(2, 2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = triton.not_supported_reasons(x)
    assert (problem in "; ".join(reasons)) if problem else reasons == []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not any("numpy" in reason for reason in triton.not_supported_reasons(x))
    triton._interpreter_problem.cache_clear()
