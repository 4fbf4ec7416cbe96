"""What the tests of the primitives share: random rows, and the comparison of a primitive with the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.engine.spec import PLACES, Description
from tests.support.testing import SHAPES as RAGGED
from tests.support.testing import assert_outcomes_match, device_of, differentiate, supports

SHAPES = [*RAGGED, (1000, 1000, 24)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCALE = 5.0


def compare(function, tensors, backend, dtype=torch.float64, scale=1.0, **options):
    """Compare a primitive on `backend` in `dtype` with the reference in float64 on the same rounded tensors."""
    if not supports(backend, dtype):
        pytest.skip(f"{backend} does not take {dtype}")
    device = device_of(backend)
    # features are in `dtype`; scalars and vectors keep the precision of the statistics
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rounded(x):
        return x.to(dtype if x.dim() > 1 else wide) if x.is_floating_point() else x

    tensors = {name: rounded(x) for name, x in tensors.items()}
    ours = differentiate(
        lambda **t: function(ck, backend=backend, **t, **options), {k: v.to(device) for k, v in tensors.items()}
    )
    reference = differentiate(
        lambda **t: function(python_ref, **t, **options),
        {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()},
    )
    assert ours.value.dtype == wide
    assert all(ours.gradients[k].dtype == tensors[k].dtype for k in ours.gradients)
    assert_outcomes_match(ours, reference, dtype, scale)


def kept_by_ids(what: Description, x_ids: torch.Tensor, y_ids: torch.Tensor) -> torch.Tensor:
    """Return the mask of the pairs that ids, or their classes and places, let through."""
    places = what.diagonals == PLACES
    x_class, y_class = (x_ids >> 32, y_ids >> 32) if places else (x_ids, y_ids)
    kept = (x_class[:, None] == y_class[None, :]) == what.keep_equal_ids
    return kept & (x_ids[:, None] % 2**32 != y_ids[None, :] % 2**32) if places else kept


def logsumexp(module, **arguments):
    """Return the log-sum-exps of the rows, and those of the columns after them."""
    out = module.similarity_logsumexp(**arguments)
    return torch.cat(out) if isinstance(out, tuple) else out


def term_sum(module, term, constants=(), backend=None, **arguments):
    """Return the sum of a term, built from its differentiable operands among the arguments."""
    operands = {k: arguments.pop(k) for k in ("scale", "bias", "margin") if k in arguments}
    options = {} if backend is None else {"backend": backend}
    return module.similarity_sum(term=term(*constants, **operands), **arguments, **options)


def pair(shape, columns_like_rows=False):
    n, m, d = shape
    return {
        "x": F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1),
        "y": F.normalize(torch.randn(n if columns_like_rows else m, d, dtype=torch.float64), dim=1),
    }
