"""The Triton kernels against dense float64, in the interpreter if TRITON_INTERPRET=1, on the GPU if there is one.

`test_processes.py` runs the interpreter in a process of its own: the variable counts when the kernels are imported.
Longer than 500 lines because all kernels are compared on one table of sweeps, in one process.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels.engine.backends import triton as backend
from contrastive_kernels.engine.spec import Upstream, Wanted
from tests.support.kernels import (
    CASES,
    DEVICE,
    INTERPRETING,
    LAYOUTS,
    TERMS,
    WANTED_OF_TWO,
    Case,
    backward,
    check,
    description,
    forward,
    inputs,
)

pytestmark = [
    pytest.mark.interpret if INTERPRETING else pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETING and not torch.cuda.is_available(), reason="no TRITON_INTERPRET=1 and no GPU"),
    # numpy warns of infinities and one-element arrays in the interpreter
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"),
]


# (N, M, D, dtype). The interpreter's tiles are 32 x 32: two ragged ones each way; D = 300 takes `chunks`, in two steps.
GRIDS = [(37, 53, 24, torch.float32), (33, 45, 300, torch.float16)]
if not INTERPRETING:
    # D of one register tile with all of it used, of the largest one, and of the chunks
    GRIDS += [(260, 131, 128, torch.bfloat16), (130, 300, 256, torch.bfloat16), (129, 257, 520, torch.bfloat16)]


@pytest.fixture(autouse=True)
def poison():
    """Fill uninitialised floating memory with NaN; the library's GEMMs only warn."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"N{g[0]}-M{g[1]}-D{g[2]}-{str(g[3])[6:]}")
@pytest.mark.parametrize("name", CASES)
def test_sweep(name, grid):
    """Statistics and gradients agree with dense float64."""
    check(CASES[name], inputs(CASES[name], *grid))


@pytest.mark.parametrize("grid", GRIDS[1:], ids=lambda g: f"N{g[0]}-M{g[1]}-D{g[2]}-{str(g[3])[6:]}")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exponents or case.column_lse])
def test_sweep_with_saved_scores(name, grid):
    """A backward that reads saved similarities agrees with dense float64."""
    check(CASES[name], inputs(CASES[name], *grid), save_scores=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("self_similarity", [False, True])
def test_saved_scores(self_similarity, dtype):
    """Saved similarities are within 2^-16 of the product of the norms, whatever other rows' norms; float32 exact."""
    case = Case(self_similarity=self_similarity)
    tensors = inputs(case, 40, 70, 300, dtype)
    x, y = tensors.x, tensors.y
    x[3], x[7] = 0, 100 * x[7]
    scores = forward(case, tensors, save_scores=True).scores
    exact = x.double() @ (x if y is None else y).double().T
    norms = x.double().norm(dim=1)[:, None] * (x if y is None else y).double().norm(dim=1)
    if dtype == torch.float32:
        torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-3)
    else:
        assert scores.dtype == torch.int16
        assert ((scores.double() / 32700 * norms - exact).abs() <= 0.501 / 32700 * norms + 1e-12).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_saved_scores_of_a_row_that_is_not_finite(value):
    """A row that is not finite has NaN gradients through saved similarities too."""
    case = Case(column_lse=True)
    tensors = inputs(case, 20, 35, 300, torch.float16)
    tensors.x[3, 5] = value
    statistics = forward(case, tensors, save_scores=True)
    incoming = [torch.ones_like(t) for t in statistics[:3]]
    d_x, d_y, *_ = backward(case, incoming, statistics, tensors, WANTED_OF_TWO, statistics.scores)
    assert d_x[3].isnan().all()
    assert d_y.isnan().any(1).all()


# One of everything; below, at and above a tile edge; D below a dot's depth, odd, and of several depth steps.
RAGGED = [((1, 1, 1), torch.float32), ((31, 33, 3), torch.float32), ((64, 32, 17), torch.float32)]
# float32 keeps no gradient in registers on a GPU
RAGGED += [((2, 65, 520), torch.float32), ((1, 1, 64), torch.float16 if INTERPRETING else torch.bfloat16)]


@pytest.mark.parametrize(("shape", "dtype"), RAGGED, ids=str)
@pytest.mark.parametrize("name", ["columns", "self-ids", "exponents-bias"])
def test_sweep_ragged(name, shape, dtype):
    """Sizes beside a tile's edges agree with dense float64."""
    check(CASES[name], inputs(CASES[name], *shape, dtype))


@pytest.mark.parametrize(("d", "dtype"), [(8, torch.float32), (300, torch.float32), (8, torch.float16)], ids=str)
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_sweep_empty(n, m, d, dtype):
    """No rows or no columns give empty statistics and zero gradients."""
    case = Case(column_lse=True, maximum=True, term="square")
    tensors = inputs(case, n, m, d, dtype)
    statistics = forward(case, tensors)
    for statistic, value in zip(statistics, (-torch.inf, -torch.inf, 0.0, -torch.inf, -torch.inf), strict=False):
        assert (statistic == value).all()
    wanted = WANTED_OF_TWO._replace(scale=True)
    d_x, d_y, d_scale, *_ = backward(case, map(torch.ones_like, statistics[:3]), statistics, tensors, wanted)
    assert d_x.shape == tensors.x.shape
    assert d_y.shape == tensors.y.shape
    assert not d_x.any()
    assert not d_y.any()
    assert d_scale == 0


@pytest.mark.parametrize("d", [24, 300])
def test_sweep_wanted(d):
    """Any single gradient is that of the call for all of them."""
    for case in (CASES["exponents-bias"], CASES["self-softplus"]):
        tensors = inputs(case, 20, 35, d, torch.float32)
        statistics, incoming, gradients = check(case, tensors)
        for k, expected in enumerate(gradients):
            if expected.numel():
                wanted = Wanted(*(j == k for j in range(len(Wanted._fields))))
                alone = backward(case, incoming, statistics, tensors, wanted)
                assert tuple(g.numel() > 0 for g in alone) == wanted
                torch.testing.assert_close(alone[k], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["columns-ids", "self-ids", "exponents", "self-band-ids"])
@pytest.mark.parametrize("d", [24, 300])
def test_sweep_all_excluded(name, d):
    """Rows without a kept pair have log-sum-exp -inf and gradient 0."""
    case = CASES[name]
    tensors = inputs(case, 20, 35, d, torch.float32)._replace(
        x_ids=torch.zeros(20, dtype=torch.int64, device=DEVICE),
        y_ids=None if case.self_similarity else torch.zeros(35, dtype=torch.int64, device=DEVICE),
    )
    statistics, _, gradients = check(replace(case, ids=True), tensors)
    assert (statistics[0] == -torch.inf).all()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("term", ["", *TERMS])
@pytest.mark.parametrize("cutoff", [False, True])
def test_sweep_nan_row(term, cutoff):
    """A row with NaN has NaN statistics, whatever the term; other rows do not change, all columns do."""
    columns = not term and not cutoff
    case = Case(term=term, constants=TERMS.get(term, ()), cutoff=cutoff, column_lse=columns, maximum=not columns)
    tensors = inputs(case, 20, 35, 24, torch.float32)
    clean = forward(case, tensors)
    tensors.x[3, 5] = torch.nan
    statistics = forward(case, tensors)
    others = torch.arange(20, device=DEVICE) != 3
    for k in (0, 2, 3):
        if statistics[k].numel():
            assert statistics[k][..., 3].isnan().all() or (k == 2 and term == "count")
            torch.testing.assert_close(statistics[k][..., others], clean[k][..., others])
    assert statistics.col_lse.isnan().all()
    incoming = [torch.ones_like(t) for t in statistics[:3]]
    d_x, d_y, *_ = backward(case, incoming, statistics, tensors, WANTED_OF_TWO)
    assert d_y.isnan().any(1).all()
    assert d_x[3].isnan().any()


def test_sweep_nan_dropped():
    """A dropped pair contributes nothing, even if it is NaN."""
    case = Case(self_similarity=True, ids=True, term="square", maximum=True)
    tensors = inputs(case, 40, 40, 24, torch.float32)._replace(x_ids=torch.arange(40, device=DEVICE))
    tensors.x[7] = torch.nan
    tensors.x_ids[7] = tensors.x_ids[11]
    statistics = forward(case, tensors)
    assert not statistics.row_lse[0, 11].isnan()
    assert not statistics.row_sum[11].isnan()
    assert not statistics.row_max[11].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cosine", [-1.0, -0.5, 1.0])
@pytest.mark.parametrize("self_similarity", [False, True])
def test_sweep_cold(cosine, self_similarity, dtype):
    """Logits of -100 underflow the fixed shift: shift_failed is set, and the safe path takes over."""
    case = Case(column_lse=not self_similarity, self_similarity=self_similarity, scale=100.0)
    tensors = inputs(case, 37, 53, 24, torch.float32)
    axis = torch.eye(24, device=DEVICE)
    x, y, scale = F.normalize(axis[0] + 0.02 * tensors.x, dim=1).to(dtype), tensors.y, tensors.scale
    if self_similarity:
        scale = scale * cosine
    else:
        y = F.normalize(cosine * axis[0] + (1 - cosine**2) ** 0.5 * axis[1] + 0.02 * y, dim=1).to(dtype)
    check(case, tensors._replace(x=x, y=y, scale=scale))


@pytest.mark.parametrize(("n", "m"), [(37, 53), (53, 37)])
def test_sweep_cold_with_cutoff(n, m, monkeypatch):
    """One launch of the safe path serves rows and columns, whose ids and cutoffs lie on either side of its tiles."""
    from contrastive_kernels.engine.backends.triton import safe_forward

    flags, launch_kernel = [], safe_forward.launch_kernel

    def seen(kernel, grid, **arguments):
        flags.append(int(arguments["shift_failed"]))
        launch_kernel(kernel, grid, **arguments)

    monkeypatch.setattr(safe_forward, "launch_kernel", seen)
    case = Case(column_lse=True, ids=True, cutoff=True, scale=100.0)
    tensors = inputs(case, n, m, 24, torch.float32)
    axis = torch.eye(24, device=DEVICE)
    x, y = (F.normalize(sign * axis[0] + 0.1 * z, dim=1) for sign, z in ((1, tensors.x), (-1, tensors.y)))
    check(case, tensors._replace(x=x, y=y, cutoff=(x @ y.T).mean(1)))
    assert flags == [1]


@pytest.mark.parametrize("d", [24, 300])
def test_sweep_small_gradients(d):
    """float16 gradients of weights near 1e-8 keep their accuracy: the weights carry a power of two."""
    for name in ("columns", "self-exponents-band", "square-alone"):
        *_, gradients = check(CASES[name], inputs(CASES[name], 20, 53, d, torch.float16), 1e-3)
        assert all(g.isfinite().all() for g in gradients)


def test_sweep_tiny_gradients():
    """Factors of exponentials with a center keep gradients near 2^-60, those of a loss that is scaled down."""
    dtype = torch.float32 if INTERPRETING else torch.bfloat16
    *_, gradients = check(CASES["columns"], inputs(CASES["columns"], 20, 53, 24, dtype), 2.0**-60)
    assert gradients.x.any() and gradients.y.any()


@pytest.mark.parametrize("d", [24, 300])
@pytest.mark.parametrize("name", ["columns", "self-ids", "self-softplus"])
def test_sweep_bitwise(name, d):
    """A repeated call returns the same bits, also after another size."""
    tensors = inputs(CASES[name], 40, 45, d, torch.float32)
    case = CASES[name]
    statistics, incoming, gradients = check(case, tensors)
    forward(case, inputs(case, 5, 6, d, torch.float32))
    again = forward(case, tensors)
    gradients_again = backward(case, incoming, again, tensors, Wanted(*(g.numel() > 0 for g in gradients)))
    pairs = zip((*again, *gradients_again), (*statistics, *gradients), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["columns", "self-ids", "exponents-bias", "self-softplus", "everything"])
def test_sweep_shared_walks(name):
    """Gradients from programs that share a walk agree with dense float64; a repeated call returns the same bits."""
    from contrastive_kernels.engine.backends.triton import tiles

    case, shape = CASES[name], (37, 83, 24, torch.float32) if INTERPRETING else (300, 410, 128, torch.bfloat16)
    tensors = inputs(case, *shape)
    with tiles.split(3):
        statistics, incoming, gradients = check(case, tensors)
        again = backward(case, incoming, statistics, tensors, Wanted(*(g.numel() > 0 for g in gradients)))
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


@pytest.mark.parametrize("save_scores", [False, True])
@pytest.mark.parametrize("name", ["self-same", "self-student-ids", "self-bias"])
def test_sweep_small_workspace(name, save_scores, monkeypatch):
    """A small workspace, with partial sums and weights in ragged portions, changes no result."""
    from contrastive_kernels.engine.backends.triton import chunks, tiles
    from contrastive_kernels.engine.backends.triton import forward as forward_sweep

    n = 69 if INTERPRETING else 261
    monkeypatch.setattr(forward_sweep, "workspace_limit", lambda: 4 * n)
    monkeypatch.setattr(chunks, "workspace_limit", lambda: 1)
    monkeypatch.setattr(tiles, "ALIGNMENT", 32 if INTERPRETING else tiles.ALIGNMENT)
    check(CASES[name], inputs(CASES[name], n, 40, 257, torch.float32), save_scores=save_scores)


@pytest.mark.parametrize(
    ("name", "d"),
    [
        *((name, 24) for name in ("columns", "columns-ids-cutoff", "self-ids", "self-exponents-ids", "band-columns")),
        *((name, 300) for name in ("columns", "self-ids")),
    ],
)
@pytest.mark.parametrize("spread", [10, 130, 400], ids=lambda spread: f"spread{spread}")
def test_sweep_centered(name, d, spread):
    """Log-sum-exps up to `spread` binades apart share one exponential, or take two if they are too far apart."""
    from contrastive_kernels.engine.backends.triton import launch

    case, n = replace(CASES[name], scale=1.0), 45
    # on a GPU float32 has no gradient in registers, and chunks of float32 take two
    dtype = (torch.float32 if d == 24 else torch.float16) if INTERPRETING else torch.bfloat16
    tensors = inputs(case, n, n, d, dtype)
    x, y = tensors.x, tensors.y
    # all similarities of a row about equal, from -spread / 2 to spread / 2 in base 2; of x with itself from 0 on
    height = (
        spread
        / max(case.exponents)
        * math.log(2)
        * (torch.linspace(0, 1, n) if y is None else torch.linspace(-0.5, 0.5, n)).to(DEVICE)
    )
    x, y = (z if z is None else 0.1 * z for z in (x, y))
    x[:, 0], x[:, 1:3] = (height.sqrt(), 0) if y is None else (height, 0)
    if y is not None:
        y[:, 0] = 1
    tensors = tensors._replace(x=x, y=y)
    if case.cutoff:
        tensors = tensors._replace(cutoff=torch.full_like(tensors.cutoff, 1e3))
    statistics, *_ = check(case, tensors)
    operands = launch.Operands.of(tensors, description(case))
    assert bool(centers(operands, statistics.row_lse, statistics.col_lse)[2]) == (spread > 140)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sweep_center_of_what_is_no_number(value):
    """The center fails for a log-sum-exp that is NaN or +inf, not for that of no pair."""
    from contrastive_kernels.engine.backends.triton import launch

    operands = launch.Operands.of(inputs(CASES["columns"], 5, 7, 8, torch.float32), description(CASES["columns"]))
    row_lse, col_lse = torch.zeros(1, 5, device=DEVICE), torch.zeros(7, device=DEVICE)
    row_lse[0, 3] = -math.inf
    center = centers(operands, row_lse, col_lse)
    assert (center[0], center[2]) == (-60, 0)
    col_lse[6] = value
    assert centers(operands, row_lse, col_lse)[2] == 1


def centers(operands, row_lse, col_lse) -> list[float]:
    """Return the center as a kernel of its own finds it, and check that of the kernel that packs."""
    from contrastive_kernels.engine.backends.triton import launch

    upstream = Upstream(torch.ones_like(row_lse), torch.ones_like(col_lse), row_lse.new_empty(0), row_lse, col_lse)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for most in (launch.CENTER_TOGETHER, 0):
            patch.setattr(launch, "CENTER_TOGETHER", most)
            found.append(launch.PackedVectors.of(replace(operands, term=""), upstream, True))
    together, alone = found
    torch.testing.assert_close(together.center, alone.center, rtol=0, atol=0)
    for packed, other in ((together.rows, alone.rows), (together.columns, alone.columns)):
        torch.testing.assert_close(packed, other, rtol=0, atol=0, equal_nan=True)
    return alone.center.tolist()


# 512 and 128 MB of half precision: bytes are twice the pairs.
@pytest.mark.parametrize(
    ("n", "m", "pairs", "triangle", "shape"),
    [
        (1 << 20, 1 << 20, 1 << 28, False, (16384, 16384)),
        (1 << 20, 1 << 20, 1 << 28, True, (16384, 16384)),
        (65536, 65536, 1 << 26, False, (8192, 8192)),
        # whole rows move as little, and make fewer of a triangle's pairs twice
        (32768, 32768, 1 << 28, False, (8192, 32768)),
        (65536, 65536, 1 << 28, False, (16384, 16384)),
        (65536, 65536, 1 << 28, True, (4096, 65536)),
        # few rows leave their room to the columns, few columns theirs to the rows
        (256, 1 << 21, 1 << 28, False, (256, 1 << 20)),
        (1 << 21, 256, 1 << 28, False, (1 << 20, 256)),
        # parts of about equal size
        (20000, 100000, 1 << 28, False, (10240, 25088)),
        (300, 300, 1 << 28, False, (512, 512)),
        (1000, 1000, 1, True, (256, 256)),
        (1, 1, 1, False, (256, 256)),
    ],
)
def test_chunk_shape(n, m, pairs, triangle, shape):
    """Chunks are squares or whole rows, whichever moves less of dX and dY."""
    from contrastive_kernels.engine.backends.triton import chunks

    assert chunks.chunk_shape(n, m, pairs, triangle) == shape


@pytest.mark.parametrize("triangle", [False, True])
def test_chunk_shapes(triangle):
    """A chunk stays within the limit, and the traffic of the sums is that of squares or less, whatever the sizes."""
    from contrastive_kernels.engine.backends.triton import chunks, tiles

    sizes = [1, 7, 255, 257, 1000, 4096, 10000, 32768, 50001, 65536, 300000, 1 << 20]
    for n in sizes:
        for m in [n] if triangle else sizes:
            for pairs in (1 << 16, 1 << 20, 3 << 22, 1 << 26, 1 << 28):
                rows, columns = chunks.chunk_shape(n, m, pairs, triangle)
                assert rows % tiles.ALIGNMENT == columns % tiles.ALIGNMENT == 0
                assert min(rows, n) * tiles.round_up(min(columns, m), 8) <= pairs
                strips, parts = -(-n // rows), -(-m // columns)
                # no part is empty, nor are there more than it takes
                assert (strips - 1) * rows < n
                assert (parts - 1) * columns < m
                # dY is moved once per strip and dX once per part, for nothing if there is one; units are rounded
                moved = (m * strips if strips > 1 else 0) + (n * parts if parts > 1 else 0)
                side = max(tiles.ALIGNMENT, math.isqrt(pairs) // tiles.ALIGNMENT * tiles.ALIGNMENT)
                squares = m * -(-n // side) + n * -(-m // side)
                assert moved <= (2 if triangle else 1.25) * squares


@pytest.mark.parametrize(
    ("name", "limit", "expected", "save_scores"),
    [
        ("columns", 1, 9, False),  # squares
        ("columns", 1, 9, True),
        ("columns", 4 * 32 * 72, 3, False),  # whole rows
        ("columns", 4 * 72 * 72, 1, False),
        ("self-ids", 1, 6, False),  # those of a triangle
        ("self-ids", 4 * 32 * 72, 3, True),
        ("self-softplus", 1, 9, False),
    ],
)
def test_chunks(name, limit, expected, save_scores, monkeypatch):
    """Weights in so many chunks, each within the limit, make the same gradients."""
    from contrastive_kernels.engine.backends.triton import chunks, tiles
    from contrastive_kernels.engine.backends.triton import forward as forward_sweep

    side, weights_bwd, sizes = 32 if INTERPRETING else 256, chunks.weights_bwd, []
    limit = limit if limit == 1 else limit * (side // 32) ** 2

    def noted(operands, packed, scores, g, *rest):
        sizes.append(g.untyped_storage().nbytes())
        return weights_bwd(operands, packed, scores, g, *rest)

    monkeypatch.setattr(chunks, "weights_bwd", noted)
    monkeypatch.setattr(chunks, "workspace_limit", lambda: limit)
    monkeypatch.setattr(tiles, "ALIGNMENT", side)
    n = 2 * side + 3
    monkeypatch.setattr(forward_sweep, "workspace_limit", lambda: 4 * n)
    check(CASES[name], inputs(CASES[name], n, n, 257, torch.float32), save_scores=save_scores)
    assert len(sizes) == expected
    assert max(sizes) <= max(limit, 4 * side * side)


@pytest.mark.parametrize("name", ["columns", "self-ids", "softplus-alone", "band-columns"])
@pytest.mark.parametrize("d", [24, 300])
def test_autotune(name, d, monkeypatch, capsys):
    """The tile with the least time is used and printed as a row of the table, and computes the same."""
    from contrastive_kernels.engine.backends.triton import tiles, tune

    asked = []

    def milliseconds(tile, launch):
        asked.append(tile)
        launch(tile)
        return abs(tile.height - 16) + abs(tile.width - 64) + tile.stages

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "_fastest", {})
    # more of them test nothing more, and take long to compile on a GPU
    monkeypatch.setattr(tune, "TRIALS", 12)
    check(CASES[name], inputs(CASES[name], 37, 53, d, torch.float32))
    assert not asked
    monkeypatch.setenv(tune.ENVIRONMENT_VARIABLE, "1")
    check(CASES[name], inputs(CASES[name], 37, 53, d, torch.float32))
    lines = capsys.readouterr().err.splitlines()
    found = [eval(line.strip().rstrip(","), {"Tile": tiles.Tile}) for line in lines if "Tile(" in line]
    assert {row.kernel for row in found} == {tile.kernel for tile in asked}
    for row in found:
        own = {tile for tile in asked if (tile.kernel, tile.large_epilogue) == (row.kernel, row.large_epilogue)}
        assert milliseconds(row, lambda tile: None) == min(milliseconds(tile, lambda tile: None) for tile in own)
    seen = len(asked)
    check(CASES[name], inputs(CASES[name], 40, 53, d, torch.float32))
    assert len(asked) == seen, "every tile is timed once"


def test_autotune_survives_what_does_not_compile():
    """A tile that does not compile takes infinitely long."""
    from contrastive_kernels.engine.backends.triton import tiles, tune

    def launch(tile):
        raise RuntimeError("out of resource: shared memory")

    assert tune.milliseconds(tiles.TABLE[0], launch) == math.inf


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sweep_strided(layout):
    """Features of any strides agree with dense float64."""
    case = CASES["columns"]
    tensors = inputs(case, 37, 53, 24, torch.float32)
    check(case, tensors._replace(x=LAYOUTS[layout](tensors.x)))


@pytest.mark.parametrize("d", [24, 300])
def test_empty_scores(d):
    """A backward that is given the empty scores of a forward which saved none computes as without."""
    case = CASES["columns"]
    tensors = inputs(case, 20, 35, d, torch.float16)
    statistics, incoming, gradients = check(case, tensors)
    assert not statistics.scores.numel()
    wanted = Wanted(*(g.numel() > 0 for g in gradients))
    again = backward(case, incoming, statistics, tensors, wanted, statistics.scores)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


@pytest.mark.parametrize("d", [24, 300])
@pytest.mark.parametrize("name", ["columns", "self-ids"])
def test_float32_gradients(name, d):
    """They are what is otherwise rounded to half precision, from registers and from chunks."""
    case = CASES[name]
    tensors = inputs(case, 20, 35, d, torch.float16)
    statistics, incoming, gradients = check(case, tensors)
    upstream = Upstream(*incoming, statistics.row_lse, statistics.col_lse)
    wanted = Wanted(*(g.numel() > 0 for g in gradients))
    wide = backend.run_backward(upstream, tensors, description(case), wanted, None, float32_gradients=True)
    assert wide.x.dtype == torch.float32
    assert not torch.equal(wide.x, gradients.x.float())
    for before, after in zip(gradients, wide, strict=True):
        assert torch.equal(before, after.to(before.dtype))


def test_exponents_refused():
    """More than two exponents are refused."""
    case = Case(exponents=(3.0, 2.0, 1.0))
    with pytest.raises(NotImplementedError, match="at most two exponents"):
        forward(case, inputs(case, 4, 5, 8, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETING), ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1), (33, 4, 24), (40, 3, 100)], ids=str)
def test_view_minimum(shape, dtype):
    """The least similar pair is the first on a tie, and one with NaN if there is one."""
    n, v, d = shape
    views = torch.randint(-3, 4, (n + 1, d + 1, v)).mT[1:, :, 1:].to(dtype).to(DEVICE)  # integers: products are exact
    views[n // 2, 0] = views[n // 2, 1]  # ties
    if n > 2:
        views[2, -1, 0] = torch.nan
    pairs = torch.tensor([(j, k) for j in range(v) for k in range(j + 1, v)], device=DEVICE)
    s = (views.double() @ views.double().mT)[:, pairs[:, 0], pairs[:, 1]]
    assert torch.equal(backend.view_minimum(views), pairs[s.argmin(1)])
