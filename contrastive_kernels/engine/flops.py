"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators: the products of rows that they take.

As PyTorch counts, a product of two rows of D numbers is 2 D operations, and what is elementwise or takes O(N * D), as
unit rows and row dots, is none. Similarities that are computed again in a backward count again. Of x with itself a
symmetric sweep of C++ and Triton visits every unordered pair once; PyTorch's visits all.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from contrastive_kernels.engine.spec import (
    BackwardArguments,
    Description,
    ForwardArguments,
    GroupArguments,
    Guide,
    Inputs,
    SoftmaxArguments,
    SoftmaxMeanArguments,
    SoftmaxMeanBackwardArguments,
    Wanted,
)

__all__ = ["register"]

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]

# The formulas take the arguments of the operators, in which shapes stand for the tensors.


def _sizes(inputs: Inputs) -> tuple[int, int, int]:
    """Return N, M and D."""
    rows, columns = tuple(inputs.x), tuple(inputs.x if inputs.y is None else inputs.y)
    return rows[0], columns[0], rows[1]


def _is_halved(backend: str, inputs: Inputs, what: Description) -> bool:
    """Return whether a sweep visits one of (i, j) and (j, i)."""
    asymmetric = (inputs.bias, inputs.cutoff, inputs.term_offset)
    return backend != "torch" and inputs.y is None and not what.column_lse and all(v is None for v in asymmetric)


def _visits(backend: str, inputs: Inputs, what: Description) -> int:
    """Return the number of pairs whose similarity a sweep computes."""
    n, m, _ = _sizes(inputs)
    return n * (n + 1) // 2 if _is_halved(backend, inputs, what) else n * m


def _gradient_products(backend: str, inputs: Inputs, what: Description, wanted: Wanted) -> int:
    """Return the number of pairs that the products with G take."""
    n, m, _ = _sizes(inputs)
    if inputs.y is not None:
        return (wanted.x + wanted.y) * n * m
    # W = G + G^T meets all pairs in one product, G and G^T in one each
    return wanted.x * (1 if _is_halved(backend, inputs, what) else 2) * n * n


def _forward(backend: str, *flat: Any) -> int:
    inputs, what, *_ = ForwardArguments.of(flat)
    return 2 * _sizes(inputs)[2] * _visits(backend, inputs, what)


def _backward(backend: str, *flat: Any) -> int:
    _, inputs, what, wanted, scores, _ = BackwardArguments.of(flat)
    again = 0 if scores is not None and all(scores) else _visits(backend, inputs, what)
    return 2 * _sizes(inputs)[2] * (again + _gradient_products(backend, inputs, what, wanted))


def _softmax_total(backend: str, *flat: Any) -> int:
    # strips of rows with all columns, in every backend
    _, _, inputs, _, (of_x, of_y, _) = SoftmaxArguments.of(flat)
    n, m, d = _sizes(inputs)
    of_columns = of_x if inputs.y is None else of_y
    return 2 * d * n * m * (1 + of_x + of_columns)


def _of_guide(inputs: Inputs, guide: Guide) -> int:
    n, m, _ = _sizes(inputs)
    width: int = tuple(guide.guide_x)[1]
    return 2 * width * n * m


def _guided_forward(backend: str, *flat: Any) -> int:
    arguments, guide = Guide.split(flat)
    return _forward(backend, *arguments) + _of_guide(ForwardArguments.of(arguments).inputs, guide)


def _guided_backward(backend: str, *flat: Any) -> int:
    arguments, guide = Guide.split(flat)
    return _backward(backend, *arguments) + _of_guide(BackwardArguments.of(arguments).inputs, guide)


def _softmax_mean(backend: str, *flat: Any) -> int:
    values, inputs, _ = SoftmaxMeanArguments.of(flat)
    n, m, d = _sizes(inputs)
    width: int = tuple(values)[1]
    return 2 * n * m * (d + width)


def _softmax_mean_backward(backend: str, *flat: Any) -> int:
    _, values, inputs, _, wanted = SoftmaxMeanBackwardArguments.of(flat)
    n, m, d = _sizes(inputs)
    of_columns = wanted.y or (wanted.x and inputs.y is None)
    of_values, width = wanted.values + any(wanted[:-1]), int(tuple(values)[1])
    return 2 * n * m * (d * (1 + wanted.x + of_columns) + width * of_values)


def _views(backend: str, views: Shape) -> int:
    n, v, d = views
    return 2 * d * n * (v * v if backend == "torch" else v * (v - 1) // 2)


def _select(backend: str, x: Shape, y: Shape | None, *_: Any) -> int:
    return 2 * x[1] * x[0] * (x if y is None else y)[0]


def _nothing(backend: str, *_: Any) -> int:
    return 0


FORMULAS: dict[str, Callable[..., int]] = {
    "forward": _forward,
    "backward": _backward,
    "softmax_total": _softmax_total,
    "guided_forward": _guided_forward,
    "guided_backward": _guided_backward,
    "softmax_mean": _softmax_mean,
    "softmax_mean_backward": _softmax_mean_backward,
    "unit_rows": _nothing,
    "unit_rows_backward": _nothing,
    "row_dot": _nothing,
    "row_dot_backward": _nothing,
    "views": _views,
    "select": _select,
}


# Over a group: this rank's rows with its own columns as above, and with those of the others. Two ranks' rows meet once
# where only one log-sum-exp is asked for, on one of them: a rank counts half, and all ranks together all.


def _others(inputs: Inputs, what: Description, sizes: Iterable[int]) -> tuple[int, float]:
    """Return the number of pairs with other ranks' columns, and the share of them that is swept here."""
    n, m, _ = _sizes(inputs)
    one = len(what.exponents) == 1 and what.exponents[0] == 1 and not what.term
    once = one and _is_halved("", inputs, what)
    return n * (sum(sizes) - m), 0.5 if once else 1


def _group_sweep(_: str, *flat: Any) -> int:
    arguments, of_group = GroupArguments.split(flat)
    inputs, what, *_rest = ForwardArguments.of(arguments)
    pairs, share = _others(inputs, what, of_group.sizes)
    return _forward(of_group.backend, *arguments) + int(2 * _sizes(inputs)[2] * pairs * share)


def _group_sweep_backward(_: str, *flat: Any) -> int:
    arguments, of_group = GroupArguments.split(flat)
    _upstream, inputs, what, wanted, *_rest = BackwardArguments.of(arguments)
    pairs, share = _others(inputs, what, of_group.sizes)
    products = 1 + wanted.x + (wanted.x if inputs.y is None else wanted.y)
    return _backward(of_group.backend, *arguments) + int(2 * _sizes(inputs)[2] * pairs * share * products)


def _group_select(_: str, *flat: Any) -> int:
    arguments, of_group = GroupArguments.split(flat)
    x: Shape = arguments[0]
    return 2 * x[1] * x[0] * sum(of_group.sizes)


GROUP_FORMULAS: dict[str, Callable[..., int]] = {
    "sweep": _group_sweep,
    "sweep_backward": _group_sweep_backward,
    "select": _group_select,
    "same_rows": _nothing,
    "sum": _nothing,
    "sum_at_home": _nothing,
    "class_sums": _nothing,
}


# Registration


class _AfterImport:
    """Finds PyTorch's counter when someone imports it, and calls a function with it.

    Importing it here would import Triton, a third of a second for every user of the package.
    """

    def __init__(self, then: Callable[[Any], None]) -> None:
        self.then = then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Return where the counter is, as the other finders know it; None for every other module."""
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            self.then(module)

        vars(spec.loader)["exec_module"] = execute_and_register
        return spec


def register(namespace: str, operators: Mapping[str, Iterable[str]]) -> None:
    """Register the formulas of the operators of every backend and of a group, once there is a counter.

    Args:
        namespace: of the operators.
        operators: the names of the operators by that of their backend, or by ``"group"``.
    """

    def then(counter: Any) -> None:
        for backend, names in operators.items():
            for name in names:
                packet = getattr(getattr(torch.ops, namespace), f"{backend}_{name}")
                formula = partial(_counted, GROUP_FORMULAS[name] if backend == "group" else FORMULAS[name], backend)
                counter.register_flop_formula(packet)(formula)

    if COUNTER in sys.modules:
        then(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport(then))


def _counted(formula: Callable[..., int], backend: str, *flat: Any, out_shape: Any = None) -> int:
    return formula(backend, *flat)
