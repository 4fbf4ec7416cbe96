"""Every backend's functions as PyTorch operators: opaque to torch.compile, checked by opcheck, with fake versions.

The C++ extension registers its own kernels (csrc/extension.cpp); here they only get their fake versions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.engine import flops, groups
from contrastive_kernels.engine.backends import BACKENDS, Backend
from contrastive_kernels.engine.spec import (
    GROUP_SCHEMAS,
    SCHEMAS,
    BackwardArguments,
    ForwardArguments,
    GroupArguments,
    Guide,
    SoftmaxArguments,
    SoftmaxMeanArguments,
    SoftmaxMeanBackwardArguments,
    compute_dtype,
)

__all__ = ["operator", "register_autograd"]

Function = Callable[..., Any]

_NAMESPACE = "contrastive_kernels"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")


def operator(backend: str, function: str) -> Function:
    """Return an operator of a backend, one of `engine.spec.SCHEMAS`."""
    overload: Function = getattr(getattr(torch.ops, _NAMESPACE), f"{backend}_{function}").default
    return overload


def register_autograd(backend: str, function: str, kernel: Function) -> None:
    """Let an operator of a backend do this where autograd meets it."""
    _library.impl(f"{backend}_{function}", kernel, "Autograd")


def _kernel(name: str, function: Function) -> Function:
    """Return the function as an operator's kernel: flat arguments and results, and without autocast.

    The features arrive in the dtype that autocast wants; inside, float32 means float32.
    """

    def kernel(*flat: Any) -> Any:
        device = next(argument for argument in flat if isinstance(argument, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            if name == "forward":
                inputs, what, maximum, save_scores = ForwardArguments.of(flat)
                return tuple(function(inputs, what, maximum=maximum, save_scores=save_scores))
            if name == "backward":
                *grouped, float32_gradients = BackwardArguments.of(flat)
                return tuple(function(*grouped, float32_gradients=float32_gradients))
            if name == "guided_forward":
                arguments, guide = Guide.split(flat)
                inputs, what, maximum, _ = ForwardArguments.of(arguments)
                return tuple(function(inputs, what, maximum=maximum, guide=guide))
            if name == "guided_backward":
                arguments, guide = Guide.split(flat)
                return tuple(function(*BackwardArguments.of(arguments)[:4], guide=guide))
            if name == "softmax_total":
                return tuple(function(*SoftmaxArguments.of(flat)))
            if name == "softmax_mean":
                return tuple(function(*SoftmaxMeanArguments.of(flat)))
            if name == "softmax_mean_backward":
                return tuple(function(*SoftmaxMeanBackwardArguments.of(flat)))
            return function(*flat)

    return kernel


def _fake_forward(backend: Backend) -> Function:
    def fake(*flat: Any) -> tuple[Tensor, ...]:
        inputs, what, maximum, save_scores = ForwardArguments.of(flat)
        x, y = inputs.x, inputs.y
        n, m = x.shape[0], (x if y is None else y).shape[0]
        dtype = backend.statistic_dtype(x)
        shapes = (
            (len(what.exponents), n),
            (m if what.column_lse else 0,),
            (n if what.term else 0,),
            (n if maximum else 0,),
            (m if what.column_lse and maximum else 0,),
        )
        score_dtype = backend.score_dtype(x, y)
        scores = x.new_empty((n, m) if save_scores and score_dtype else (0,), dtype=score_dtype or compute_dtype(x))
        return *(x.new_empty(shape, dtype=dtype) for shape in shapes), scores

    return fake


def _fake_backward(backend: Backend) -> Function:
    def fake(*flat: Any) -> tuple[Tensor, ...]:
        _, inputs, _, wanted, _, float32_gradients = BackwardArguments.of(flat)
        x, y = inputs.x, inputs.y
        features = compute_dtype(x) if float32_gradients else x.dtype
        m = (x if y is None else y).shape[0]
        shapes = (x.shape, (m, x.shape[1]), (), (m,), (), (x.shape[0],), ())
        dtypes = (features, features, *(inputs.scale.dtype,) * 4, backend.statistic_dtype(x))
        return tuple(
            x.new_empty(shape if want else (0,), dtype=dtype)
            for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
        )

    return fake


def _fake_softmax_total(backend: Backend) -> Function:
    def fake(*flat: Any) -> tuple[Tensor, ...]:
        _, own, inputs, _, wanted = SoftmaxArguments.of(flat)
        x, y = inputs.x, inputs.y
        results = x, x if y is None else y, inputs.scale, own
        return (
            *(r.new_empty(r.shape if want else (0,)) for r, want in zip(results, (*wanted, True), strict=True)),
            x.new_empty((), dtype=backend.statistic_dtype(x)),
        )

    return fake


def _fake_softmax_mean(backend: Backend) -> Function:
    def fake(*flat: Any) -> tuple[Tensor, Tensor]:
        values, inputs, _ = SoftmaxMeanArguments.of(flat)
        x = inputs.x
        mean = x.new_empty((x.shape[0], values.shape[1]), dtype=compute_dtype(x))
        return mean, x.new_empty(x.shape[0], dtype=backend.statistic_dtype(x))

    return fake


def _fake_softmax_mean_backward(backend: Backend) -> Function:
    def fake(*flat: Any) -> tuple[Tensor, ...]:
        _, values, inputs, _, wanted = SoftmaxMeanBackwardArguments.of(flat)
        y, scale = inputs.x if inputs.y is None else inputs.y, inputs.scale
        like = inputs.x, y, scale, scale.new_empty(y.shape[0]), values
        return tuple(r.new_empty(r.shape if want else (0,)) for r, want in zip(like, wanted, strict=True))

    return fake


def _fake_unit_rows(backend: Backend) -> Function:
    return lambda x: (x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x)))


def _fake_unit_rows_backward(backend: Backend) -> Function:
    return lambda grad, x, norm: x.new_empty(x.shape)


def _fake_row_dot(backend: Backend) -> Function:
    return lambda x, y: x.new_empty(x.shape[:-1], dtype=compute_dtype(x))


def _fake_row_dot_backward(backend: Backend) -> Function:
    return lambda grad, x, y, wanted: tuple(x.new_empty(x.shape if want else (0,)) for want in wanted)


def _fake_views(backend: Backend) -> Function:
    return lambda views: views.new_empty((views.shape[0], 2), dtype=torch.int64)


def _fake_select(backend: Backend) -> Function:
    def fake(x: Tensor, y: Tensor | None, k: int, *_: Any) -> tuple[Tensor, Tensor]:
        shape = (x.shape[0], k)
        return x.new_empty(shape, dtype=compute_dtype(x)), x.new_empty(shape, dtype=torch.int64)

    return fake


def _guided(fake_of: Callable[[Backend], Function], backend: Backend) -> Function:
    fake = fake_of(backend)
    return lambda *flat: fake(*Guide.split(flat)[0])


FAKES: dict[str, Callable[[Backend], Function]] = {
    "forward": _fake_forward,
    "backward": _fake_backward,
    "guided_forward": partial(_guided, _fake_forward),
    "guided_backward": partial(_guided, _fake_backward),
    "softmax_total": _fake_softmax_total,
    "softmax_mean": _fake_softmax_mean,
    "softmax_mean_backward": _fake_softmax_mean_backward,
    "unit_rows": _fake_unit_rows,
    "unit_rows_backward": _fake_unit_rows_backward,
    "row_dot": _fake_row_dot,
    "row_dot_backward": _fake_row_dot_backward,
    "views": _fake_views,
    "select": _fake_select,
}


def _register(backend: Backend) -> None:
    for name, function in backend.operators.items():
        full_name = f"{backend.name}_{name}"
        if function is not None:
            _library.define(full_name + SCHEMAS[name])
            _library.impl(full_name, _kernel(name, function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{full_name}", FAKES[name](backend), lib=_library)


for _backend in BACKENDS.values():
    _register(_backend)


# Over a process group: the operators of a backend on one block after the other.


def _peers(of_group: GroupArguments) -> groups.Peers:
    return groups.Peers(of_group.group, tuple(of_group.sizes), of_group.workspace)


def _group_sweep(*flat: Any) -> tuple[Tensor, ...]:
    arguments, of_group = GroupArguments.split(flat)
    inputs, what, maximum, _ = ForwardArguments.of(arguments)
    return tuple(groups.sweep(inputs, what, maximum, _peers(of_group), operator(of_group.backend, "forward")))


def _group_sweep_backward(*flat: Any) -> tuple[Tensor, ...]:
    arguments, of_group = GroupArguments.split(flat)
    upstream, inputs, what, wanted, *_ = BackwardArguments.of(arguments)
    backward = operator(of_group.backend, "backward")
    return tuple(groups.sweep_backward(upstream, inputs, what, wanted, _peers(of_group), backward))


def _group_select(*flat: Any) -> tuple[Tensor, Tensor]:
    arguments, of_group = GroupArguments.split(flat)
    select: Function = groups.select
    found: tuple[Tensor, Tensor] = select(*arguments, _peers(of_group), operator(of_group.backend, "select"))
    return found


def _group_sum_at_home(parts: Tensor, factor: Tensor, group: str, sizes: Any, workspace: int) -> Tensor:
    return groups.sum_at_home(parts, factor, groups.Peers(group, tuple(sizes), workspace))


def _fake_group_sum_at_home(parts: Tensor, factor: Tensor, group: str, sizes: Any, workspace: int) -> Tensor:
    return parts.new_empty(sizes[groups.Peers(group, tuple(sizes), workspace).rank], parts.shape[2])


def _group_class_sums(
    values: Tensor, value_ids: Tensor, ids: Tensor, group: str, value_sizes: Any, sizes: Any, workspace: int
) -> Tensor:
    return groups.class_sums(values, value_ids, ids, groups.Peers(group, tuple(value_sizes), workspace))


def _fake_group_sweep(*flat: Any) -> tuple[Tensor, ...]:
    arguments, of_group = GroupArguments.split(flat)
    found: tuple[Tensor, ...] = _fake_forward(BACKENDS[of_group.backend])(*arguments)
    return found


def _fake_group_sweep_backward(*flat: Any) -> tuple[Tensor, ...]:
    arguments, of_group = GroupArguments.split(flat)
    found: tuple[Tensor, ...] = _fake_backward(BACKENDS[of_group.backend])(*arguments)
    _, inputs, _, wanted, *_ = BackwardArguments.of(arguments)
    if not wanted.total:
        return found
    x, sizes, new_empty = inputs.x, of_group.sizes, inputs.scale.new_empty
    of_columns = wanted.x if inputs.y is None else wanted.y
    parts = new_empty((len(sizes), max(sizes), x.shape[1]) if of_columns else (0,))
    return new_empty(x.shape if wanted.x else (0,)), parts, *found[2:]


_GROUP_OPERATORS: dict[str, tuple[Function, Function]] = {
    "sweep": (_group_sweep, _fake_group_sweep),
    "sweep_backward": (_group_sweep_backward, _fake_group_sweep_backward),
    "select": (_group_select, _fake_select(BACKENDS["torch"])),
    "same_rows": (groups.same_rows, lambda x, rows, group: torch.empty_like(x)),
    "sum": (groups.all_sum, lambda x, group: x.new_empty(x.shape)),
    "sum_at_home": (_group_sum_at_home, _fake_group_sum_at_home),
    "class_sums": (_group_class_sums, lambda values, _, ids, *__: values.new_empty(ids.shape[0], values.shape[1])),
}

for _name, (_function, _fake) in _GROUP_OPERATORS.items():
    _library.define(f"group_{_name}{GROUP_SCHEMAS[_name]}")
    _library.impl(f"group_{_name}", _kernel(f"group_{_name}", _function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::group_{_name}", _fake, lib=_library)

_operators = {name: tuple(backend.operators) for name, backend in BACKENDS.items()}
flops.register(_NAMESPACE, {**_operators, "group": tuple(_GROUP_OPERATORS)})
