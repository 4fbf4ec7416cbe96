"""Made-up kernels and the calls that the tests of a kernel's first use make."""

from __future__ import annotations

import warnings

import torch

from contrastive_kernels.engine.backends.triton import comparison, first_use
from contrastive_kernels.engine.spec import Wanted
from tests.support import kernels


class Kernel:
    """A made-up kernel of an operator: PyTorch's results, changed by `change`; counts its calls."""

    def __init__(self, operator, change=None):
        self.operator, self.change, self.calls = operator, change, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        result = first_use._in_pytorch(self.operator, arguments, options)
        return result if self.change is None else self.change(result)


def arguments_of(operator, n=48, m=32, d=24, dtype=torch.float32, name="columns"):
    """Return a call of an operator as (arguments, options)."""
    case = kernels.CASES[name]
    x = torch.randn(n, d).to(dtype)
    if operator in ("forward", "backward"):
        inputs, what = kernels.inputs(case, n, m, d, dtype), kernels.description(case)
        if operator == "forward":
            return (inputs, what), {"maximum": case.maximum, "save_scores": False}
        upstream = comparison._Draw(inputs.x).upstream(inputs, what)
        return (upstream, inputs, what, wanted_of(case), None), {}
    others = {
        "unit_rows": (x,),
        "unit_rows_backward": (torch.randn_like(x), x, x.float().norm(dim=1, keepdim=True)),
        "row_dot": (x, x.flip(0)),
        "row_dot_backward": (torch.randn(n), x, x.flip(0), [True, False]),
        "views": (x.view(n // 4, 4, d),),
    }
    return others[operator], {}


def wanted_of(case):
    soft = bool(case.exponents) or case.column_lse
    return Wanted(
        True, not case.self_similarity, soft, case.bias, case.term_scale is not None, case.term_offset,
        kernels.alone(case),
    )  # fmt: skip


def warned(call):
    """Return what a call returns, and the texts of the warnings about kernels; numpy warns of infinities."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in caught if "Triton kernel" in str(warning.message)]
