"""The operators' schemas, generated from the fields of the tuples, and the order of their flat arguments."""

import pytest
import torch

from contrastive_kernels.engine import operators, spec

PREFIX = "contrastive_kernels::"

# Exported programs pass these arguments by position: a field that moves breaks them.
SWEEP = (
    "Tensor x, Tensor? y, Tensor scale, Tensor? bias, Tensor? x_ids, Tensor? y_ids, Tensor? cutoff, "
    "Tensor? term_scale, Tensor? term_offset, float[] exponents, bool column_lse, str term, float[] constants, "
    "bool keep_equal_ids, int diagonals, "
)
UPSTREAM = "Tensor grad_row_lse, Tensor grad_col_lse, Tensor grad_row_sum, Tensor row_lse, Tensor col_lse, "
WRITTEN_OUT = {
    "forward": f"({SWEEP}bool maximum, bool save_scores=False) -> ({', '.join(['Tensor'] * 6)})",
    "backward": f"({UPSTREAM}{SWEEP}bool[] wanted, Tensor? scores=None, bool float32_gradients=False) -> "
    f"({', '.join(['Tensor'] * 7)})",
}

# importing `operators` has registered them
REGISTERED = {
    schema.name.removeprefix(PREFIX): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith(PREFIX)
}
OPERATORS = [(backend.name, operator) for backend in operators.BACKENDS.values() for operator in backend.operators]


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_schemas_of_the_sweep(name):
    assert spec.SCHEMAS[name] == WRITTEN_OUT[name]


@pytest.mark.parametrize(("backend", "operator"), OPERATORS)
def test_registered_schema(backend, operator):
    """Python and C++ alike register the generated schema, argument names included."""
    name = f"{backend}_{operator}"
    assert REGISTERED[name] == torch._C.parse_schema(PREFIX + name + spec.SCHEMAS[operator])


def test_no_other_operator_is_registered():
    of_groups = {f"group_{operator}" for operator in spec.GROUP_SCHEMAS}
    assert set(REGISTERED) == {f"{backend}_{operator}" for backend, operator in OPERATORS} | of_groups


def names(operator):
    """Return the names of an operator's arguments, each of which stands for its value below."""
    return [argument.name for argument in torch._C.parse_schema(f"{operator}{spec.SCHEMAS[operator]}").arguments]


def named(fields):
    return fields(*fields._fields)


def test_grouped_arguments_of_the_forward():
    *flat, maximum, save_scores = names("forward")
    assert (maximum, save_scores) == ("maximum", "save_scores")
    expected = spec.ForwardArguments(named(spec.Inputs), named(spec.Description), True, True)
    assert spec.ForwardArguments.of([*flat, True, True]) == expected
    # an exported program leaves out a default
    assert spec.ForwardArguments.of([*flat, True]) == expected._replace(save_scores=False)


def test_grouped_arguments_of_the_backward():
    *flat, wanted, scores, float32_gradients = names("backward")
    assert (wanted, scores, float32_gradients) == ("wanted", "scores", "float32_gradients")
    wanted = spec.Wanted(*(index % 2 == 0 for index in range(len(spec.Wanted._fields))))
    expected = spec.BackwardArguments(
        named(spec.Upstream), named(spec.Inputs), named(spec.Description), wanted, "scores", True
    )
    assert spec.BackwardArguments.of([*flat, list(wanted), "scores", True]) == expected
    # an exported program leaves out defaults
    expected = expected._replace(float32_gradients=False)
    assert spec.BackwardArguments.of([*flat, list(wanted), "scores"]) == expected
    assert spec.BackwardArguments.of([*flat, list(wanted)]) == expected._replace(scores=None)


def test_fields_that_belong_together():
    """`Wanted` has the fields of `Gradients`, whose derivatives stand in the order of the inputs."""
    assert spec.Wanted._fields == spec.Gradients._fields
    assert [spec.Inputs._fields[position] for position in spec.DIFFERENTIABLE] == list(spec.DERIVATIVES)
    assert spec.Gradients._fields == (*spec.DERIVATIVES, "total")
    assert spec.Upstream._fields == (*(f"grad_{name}" for name in spec.Statistics._fields[:3]), "row_lse", "col_lse")
