"""Every backend's functions as PyTorch operators: opaque to torch.compile, checked by opcheck, with fake versions.

The C++ extension registers its own kernels (csrc/extension.cpp); here they only get their fake versions.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from contrastive_kernels.backends import BACKENDS
from contrastive_kernels.sweep import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    ROW_DOT_BACKWARD_SCHEMA,
    ROW_DOT_SCHEMA,
    UNIT_ROWS_BACKWARD_SCHEMA,
    UNIT_ROWS_SCHEMA,
    VIEWS_SCHEMA,
    compute_dtype,
)

__all__ = ["operator"]

_NAMESPACE = "contrastive_kernels"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")


def operator(backend: str, function: str) -> torch._ops.OpOverload:
    """A backend's operator: one of those below."""
    return getattr(getattr(torch.ops, _NAMESPACE), f"{backend}_{function}").default


def _without_autocast(function):
    """The features arrive in the dtype that autocast wants; inside, float32 means float32."""

    def kernel(*args):
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return tuple(result) if isinstance(result := function(*args), tuple) else result

    return kernel


def _fake_forward(backend: ModuleType):
    def fake(x, y, scale, bias, x_ids, y_ids, cutoff, term_scale, term_offset, exponents, columns, term, constants,
             same, exclude_diagonal, maximum, keep=False):  # fmt: skip
        n, m = x.shape[0], (x if y is None else y).shape[0]
        dtype = backend.statistic_dtype(x)
        shapes = (
            (len(exponents), n),
            (m if columns else 0,),
            (n if term else 0,),
            (n if maximum else 0,),
            (m if columns and maximum else 0,),
        )
        score_dtype = backend.score_dtype(x, y)
        scores = x.new_empty((n, m) if keep and score_dtype else (0,), dtype=score_dtype or compute_dtype(x))
        return *(x.new_empty(shape, dtype=dtype) for shape in shapes), scores

    return fake


def _fake_backward(backend: ModuleType):
    def fake(grad_row_lse, grad_col_lse, grad_row_sum, row_lse, col_lse, x, y, scale, bias, x_ids, y_ids, cutoff,
             term_scale, term_offset, exponents, columns, term, constants, same, exclude_diagonal, needs,
             scores=None):  # fmt: skip
        m = (x if y is None else y).shape[0]
        shapes = (x.shape, (m, x.shape[1]), (), (m,), (), (x.shape[0],), ())
        dtypes = (x.dtype, x.dtype, *(scale.dtype,) * 4, backend.statistic_dtype(x))
        return tuple(
            x.new_empty(shape if need else (0,), dtype=dtype)
            for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
        )

    return fake


def _fake_unit_rows(x):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x))


def _fake_select(x, y, k, largest, x_ids, y_ids, exclude_diagonal):
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=compute_dtype(x)), x.new_empty(shape, dtype=torch.int64)


def _fake_row_dot(x, y):
    return x.new_empty(x.shape[:-1], dtype=compute_dtype(x))


def _fake_row_dot_backward(grad, x, y, needs):
    return tuple(x.new_empty(x.shape if need else (0,)) for need in needs)


def _fake_views(views):
    return views.new_empty((views.shape[0], 2), dtype=torch.int64)


for _name, _backend in BACKENDS.items():
    if _name == "cpp":
        if not hasattr(getattr(torch.ops, _NAMESPACE), "cpp_forward"):
            continue
    else:
        _functions = [
            ("forward", FORWARD_SCHEMA, _backend.forward),
            ("backward", BACKWARD_SCHEMA, _backend.backward),
            ("unit_rows", UNIT_ROWS_SCHEMA, _backend.unit_rows),
            ("unit_rows_backward", UNIT_ROWS_BACKWARD_SCHEMA, _backend.unit_rows_backward),
            ("views", VIEWS_SCHEMA, _backend.view_minimum),
        ]
        if _name == "triton":
            _functions += [
                ("row_dot", ROW_DOT_SCHEMA, _backend.row_dot),
                ("row_dot_backward", ROW_DOT_BACKWARD_SCHEMA, _backend.row_dot_backward),
            ]
        for _function, _schema, _kernel in _functions:
            _library.define(f"{_name}_{_function}{_schema}")
            _library.impl(f"{_name}_{_function}", _without_autocast(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{_name}_forward", _fake_forward(_backend), lib=_library)
    torch.library.register_fake(f"{_NAMESPACE}::{_name}_backward", _fake_backward(_backend), lib=_library)
    if _name == "cpp":
        torch.library.register_fake(f"{_NAMESPACE}::cpp_select", _fake_select, lib=_library)
    if _name == "triton":
        torch.library.register_fake(f"{_NAMESPACE}::triton_row_dot", _fake_row_dot, lib=_library)
        torch.library.register_fake(f"{_NAMESPACE}::triton_row_dot_backward", _fake_row_dot_backward, lib=_library)
    torch.library.register_fake(f"{_NAMESPACE}::{_name}_unit_rows", _fake_unit_rows, lib=_library)
    torch.library.register_fake(
        f"{_NAMESPACE}::{_name}_unit_rows_backward", lambda grad, x, norm: x.new_empty(x.shape), lib=_library
    )
    torch.library.register_fake(f"{_NAMESPACE}::{_name}_views", _fake_views, lib=_library)
