"""What the interpreted kernels compute and which addresses they use, over random sweeps.

Where the interpreter's arithmetic stands in for the hardware's is tested here too.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import replace

import pytest
import torch

from contrastive_kernels.engine.spec import PLACES
from tests.support.kernels import INTERPRETING, LAYOUTS, TERMS, Case, check, inputs

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETING, reason="no TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"),
]
if INTERPRETING:
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    from contrastive_kernels.engine.backends.triton import backward, chunks, forward, launch, tiles
    from tests.support.interpreter import MemoryCheck

    @triton.jit
    def _unary_kernel(x, result, OPERATION: tl.constexpr):
        b_x = tl.load(x)
        if OPERATION == "exp2":
            b_y = tl.exp2(b_x)
        elif OPERATION == "log2":
            b_y = tl.log2(b_x)
        elif OPERATION == "sqrt":
            b_y = tl.sqrt(b_x)
        elif OPERATION == "rsqrt":
            b_y = tl.rsqrt(b_x)
        elif OPERATION == "maximum":
            b_y = tl.maximum(b_x, 1.0)
        elif OPERATION == "minimum":
            b_y = tl.minimum(b_x, 1.0)
        else:
            b_y = b_x * 0.5
        tl.store(result, b_y)

    @triton.jit
    def _copy_kernel(x, result, N, STEP: tl.constexpr, BN: tl.constexpr, BACK: tl.constexpr):
        o_n = tl.program_id(0) * STEP + tl.arange(0, BN)
        tl.store(result + o_n, tl.load(x + o_n - BACK, mask=o_n < N), mask=o_n < N)


@pytest.mark.parametrize(
    ("operation", "argument", "expected"),
    [
        ("maximum", math.nan, 1.0),
        ("minimum", math.nan, 1.0),
        ("exp2", -127.0, 0.0),
        ("exp2", -126.0, 2.0**-126),
        ("sqrt", 2.0**-128, 0.0),
        ("rsqrt", 2.0**-128, math.inf),
        # these keep denormals
        ("log2", 2.0**-127, -127.0),
        ("half", 2.0**-126, 2.0**-127),
    ],
)
def test_interpreter_computes_as_hardware(operation, argument, expected):
    """Maxima and minima pass over NaN; what flushes denormals on a GPU does so in the interpreter."""
    result = torch.full((), math.nan)
    _unary_kernel[(1,)](torch.tensor(argument), result, operation)
    assert result == expected


@pytest.mark.parametrize(
    ("problem", "source", "target", "sizes"),
    [
        ("", slice(64), slice(64, 128), {}),
        ("addresses read lie outside", slice(32), slice(64, 128), {}),
        ("addresses written lie outside", slice(64), slice(96, 128), {}),
        ("addresses read lie outside", slice(1, 64), slice(64, 128), dict(BACK=1)),
        ("two programs of _copy_kernel write one address", slice(64), slice(64, 128), dict(STEP=16)),
        ("writes an address that is read by another one", slice(64), slice(32, 96), {}),
    ],
)
def test_memory_check(problem, source, target, sizes, monkeypatch):
    """The check sees addresses beyond the end and before the beginning, and programs that meet."""
    memory, both = MemoryCheck(monkeypatch), torch.zeros(128)
    sizes = dict(N=64, STEP=32, BN=32, BACK=0) | sizes
    if problem:
        with pytest.raises((AssertionError, InterpreterError), match=problem):
            _copy_kernel[(2,)](both[source], both[target], **sizes)
    else:
        _copy_kernel[(2,)](both[source], both[target], **sizes)
        assert (memory.launches, memory.accesses) == (1, 128)


# Random sweeps: so many, from a first seed. CONTRASTIVE_KERNELS_SEEDS="1000:500" draws others.
FIRST, COUNT = map(int, os.environ.get("CONTRASTIVE_KERNELS_SEEDS", "0:220").split(":"))


def drawn(seed: int):
    """Return a random sweep: the case, its tensors, whether scores are saved, and among how many to share walks."""
    choice = random.Random(seed).choice
    dtype = choice([torch.float32, torch.float16])
    itself, exponents = choice([False, True]), choice([(), (1.0,), (1.0,), (1.0,), (2.0, 1.0), (1.5, 0.5)])
    columns = exponents in ((), (1.0,)) and choice([False, True])
    term = choice(["", "", *TERMS]) if exponents or columns else choice([*TERMS])
    distance = term == "distance_hinge"
    ids = choice([False, False, True])
    case = Case(
        self_similarity=itself,
        exponents=exponents,
        column_lse=columns,
        maximum=choice([False, False, True]),
        ids=ids,
        keep_equal_ids=ids and choice([False, True]),
        # the distance of a row to itself has no derivative
        diagonals=choice([1, 2, 3] if itself and distance else [0, 0, 1, 2, 3] if itself else [0, 0, 1]),
        bias=not columns and choice([False, False, True]),
        cutoff=choice([False, False, True]),
        term=term,
        constants=TERMS.get(term, ()),
        term_scale=choice([None, 0.3, -1.5]) if term else None,
        term_offset=term != "" and choice([False, True]),
        scale=choice([-7.0, 1.0, 7.0, 30.0]),
    )
    if ids and seed % 3 == 0:
        case = replace(case, diagonals=PLACES)
    n, m = choice(SIZES), choice(SIZES)
    # rows of one or two entries are equal or opposite
    d = choice([8, 17, 24] if distance else [1, 2, 3, 16, 17, 24, 40, 260])
    tensors = inputs(case, max(n, case.diagonals), m, d, dtype)
    # the distance of equal rows loses all digits
    layouts = [lambda x: x, *(LAYOUTS[name] for name in LAYOUTS if not (distance and name == "expanded"))]
    tensors = tensors._replace(x=choice(layouts)(tensors.x))
    return case, tensors, choice([False, True]), choice([1, 2, 3])


SIZES = [1, 1, 2, 5, 15, 16, 17, 31, 33, 40]


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_random_sweep(seed, monkeypatch, poison):
    """A random sweep agrees with dense float64, stays inside its tensors, and its programs do not meet."""
    memory = MemoryCheck(monkeypatch)
    case, tensors, save_scores, splits = drawn(seed)
    if seed % 4 == 0:
        # partial sums in ragged portions; weights in chunks of one tile, of whole rows, or in one that holds all tiles
        limit = (1, 32 * 40 * 4, 1 << 20)[seed // 4 % 3]
        monkeypatch.setattr(forward, "workspace_limit", lambda: 4 * len(tensors.x))
        monkeypatch.setattr(chunks, "workspace_limit", lambda: limit)
        monkeypatch.setattr(tiles, "ALIGNMENT", 32)
        monkeypatch.setattr(backward, "fits_in_registers", lambda operands, wanted: False)
        monkeypatch.setattr(launch, "CENTER_TOGETHER", 0)
    with tiles.split(splits):
        check(case, tensors, save_scores=save_scores and (bool(case.exponents) or case.column_lse))
    assert memory.launches > 1
    least = min(len(x) for x in tensors[:2] if x is not None)
    if splits > 1 and least > 32 and memory.kernels["_grad_bwd_kernel"]:
        assert memory.kernels["_fold_bwd_kernel"]
