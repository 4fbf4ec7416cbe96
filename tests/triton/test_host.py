"""The launch code on the host: what Triton specialises kernels for, and what versions and settings of torch change.

No kernel runs. Launches go through Triton's front end as on a GPU: an argument that is 1 becomes a constant there, and
one that is a multiple of 16 another kernel, which the interpreter does not show.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

from contrastive_kernels.engine.backends import triton as backend
from contrastive_kernels.engine.spec import DIFFERENTIABLE, Statistics, Wanted
from tests.support import kernels
from tests.support.kernels import CASES, LAYOUTS

pytest.importorskip("triton", exc_type=ImportError)
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no front end")
if os.environ.get("TRITON_INTERPRET") != "1":
    import triton
    import triton.language as tl

    from contrastive_kernels.engine.backends.triton import backward, chunks, launch, tiles
    from tests.support.front_end import FrontEnd, Host, replace_launches

    @triton.jit
    def _widening_kernel(result, N):
        tl.store(result, N.to(tl.int64))


@pytest.fixture
def front_end(monkeypatch):
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    return lambda architecture: FrontEnd(monkeypatch, architecture)


# (N, M, D), dtype, GPU, whether scores are saved. One of everything, one row, one column; sizes that 16 divides, and
# others; gradients in registers and by chunks.
GRID = [
    ((1, 1, 1), torch.bfloat16, 90, False),
    ((1, 40, 24), torch.float16, 90, False),
    ((48, 1, 64), torch.bfloat16, 90, False),
    ((1, 31, 300), torch.float16, 90, True),
    ((1, 1, 1), torch.float32, 90, False),
    ((33, 1, 300), torch.bfloat16, 90, False),
    ((17, 1, 40), torch.bfloat16, "gfx942", False),
]


def grid_id(value) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


def step(case, tensors, save_scores: bool) -> None:
    """Launch a forward and a backward; what is in the statistics means nothing."""
    statistics = kernels.forward(case, tensors, save_scores)
    incoming = [torch.ones_like(t) for t in statistics[:3]]
    wanted = Wanted(*(tensors[k] is not None for k in DIFFERENTIABLE), total=kernels.alone(case))
    kernels.backward(case, incoming, statistics, tensors, wanted, statistics.scores if save_scores else None)


@pytest.mark.parametrize(("shape", "dtype", "architecture", "save_scores"), GRID, ids=grid_id)
@pytest.mark.parametrize("name", ["columns", "self-views", "everything", "distance_hinge"])
def test_sweep(name, shape, dtype, architecture, save_scores, front_end):
    """Every kernel of a sweep compiles, whatever Triton makes of its arguments."""
    case, (n, m, d) = CASES[name], shape
    front = front_end(architecture)
    step(case, kernels.inputs(case, max(n, case.diagonals), m, d, dtype), save_scores)
    assert front.launches >= len(front.compiled) > 2


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 0), 80), ((8, 9), 86), ((9, 0), 90), ((10, 3), 100), ((12, 0), 86), ((7, 5), "other")],
)
def test_architecture(capability, architecture, monkeypatch):
    """A GPU without rows of its own takes those of one with the same matrix instructions and no more memory."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles._architecture.__wrapped__(torch.device("cuda")) == architecture


def launch_gradients(name: str, n: int, m: int, wanted: tuple[str, ...]) -> None:
    """Launch the backward of a case with n rows of 128 bfloat16 against m."""
    case = CASES[name]
    tensors = kernels.inputs(case, 1, 1, 128, torch.bfloat16)
    x, y = (torch.zeros(count, 128, dtype=torch.bfloat16) for count in (n, m))
    tensors = tensors._replace(x=x, y=y, bias=torch.zeros(m) if case.bias else None)
    statistics = Statistics(torch.zeros(1, n), torch.zeros(m if case.column_lse else 0), *torch.zeros(4, 0))
    incoming = [torch.ones_like(statistic) for statistic in statistics[:3]]
    kernels.backward(case, incoming, statistics, tensors, Wanted(*(field in wanted for field in Wanted._fields)))


@pytest.mark.parametrize(
    ("name", "n", "m", "wanted", "shared"),
    [
        ("rows", 256, 65536, ("x",), 1),  # queries against a queue
        ("columns", 4096, 4096, ("x", "y", "scale"), 2),
        ("bias", 65536, 256, ("bias",), 1),
        ("columns", 256, 256, ("x", "y", "scale"), 0),
        ("columns", 32768, 32768, ("x", "y", "scale"), 0),
    ],
)
def test_gradients_fill_the_device(name, n, m, wanted, shared, front_end):
    """Several programs share a walk where there are fewer blocks than 132 multiprocessors, unless it is short."""
    front = front_end(90)
    launch_gradients(name, n, m, wanted)
    grids = set(front.grids["_grad_bwd_kernel"])
    assert len(front.grids["_fold_bwd_kernel"]) == shared
    assert all((splits > 1) == (shared > 0) for _, splits in grids)
    if shared:
        assert all(0.9 * 132 <= blocks * splits <= 2 * 132 for blocks, splits in grids)


@pytest.mark.parametrize("limit", [1, 1 << 20, 1 << 40])
def test_partial_gradients_stay_within_the_limit(limit, front_end, monkeypatch):
    """With less memory fewer programs share a walk, and one takes all of it where there is none."""
    monkeypatch.setattr(backward, "workspace_limit", lambda: limit)
    front = front_end(90)
    launch_gradients("rows", 256, 65536, ("x", "scale"))
    ((_, splits),) = front.grids["_grad_bwd_kernel"]
    assert splits == 1 or splits * 256 * (128 + 1) * 4 <= limit
    assert (splits > 1) == (limit > 1)
    assert (splits < 32) == (limit < 1 << 40)


def test_splits():
    """The last program ends soonest: no wave that is nearly empty, no programs for nothing."""
    shared = partial(backward.shares_of_walk, width=128, most=1000)
    assert shared(64, 32, places=264) == 4
    assert shared(512, 256, places=264) == shared(264, 1000, places=264) == 1
    assert shared(265, 1000, places=264) > 1
    assert shared(1, 1, places=264) == shared(0, 0, places=264) == 1
    assert shared(1, 10**6, places=264) >= 264
    assert backward.shares_of_walk(64, 32, 128, 264, most=2) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=grid_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype, front_end):
    """Rows of odd, no or long strides compile, by pointers where descriptors do not take them."""
    case, front = CASES["columns"], front_end(90)
    tensors = kernels.inputs(case, 17, 31, 24, dtype)
    step(case, tensors._replace(x=LAYOUTS[layout](tensors.x), y=LAYOUTS[layout](tensors.y)), False)
    assert front.compiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 24), (17, 1)], ids=grid_id)
def test_rows(shape, dtype, front_end):
    """The kernels of rows and views compile for one row and one entry."""
    front, x = front_end(90), torch.ones(shape, dtype=dtype)
    _, norm = backend.unit_rows(x)
    backend.unit_rows_backward(x, x, norm)
    backend.row_dot_backward(backend.row_dot(x, x), x, x, [True, True])
    backend.view_minimum(x[:, None].expand(-1, 2, -1))
    assert front.launches == len(front.compiled) == 5


def test_front_end_sees_constants(front_end):
    """An argument of 1 is a constant to the front end, without the methods of a value."""
    front, result = front_end(90), torch.empty(1, dtype=torch.int64)
    _widening_kernel[(1,)](result, 2)
    with pytest.raises(triton.CompilationError):
        _widening_kernel[(1,)](result, 1)
    assert (front.launches, len(front.compiled)) == (2, 1)


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    return Host(monkeypatch)


def shifted(x):
    """Return the same rows one entry further in memory."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)


@pytest.mark.parametrize("name", ["columns", "self-views", "everything"])
def test_repeated_launches(name, host, monkeypatch):
    """A launch that is repeated starts the kernel that Triton would, on the same grid, with the same arguments."""

    def both(kernel, grid, **arguments):
        launch.launch_kernel(kernel, grid, **arguments)
        kernel[grid](**arguments)
        repeated, expected = host.started[-2:]
        assert repeated.kernel is expected.kernel
        assert repeated.grid == expected.grid
        for argument, other in zip(tree_leaves(repeated.arguments), tree_leaves(expected.arguments), strict=True):
            assert argument is other or argument == other

    once, case = launch.launch_kernel, CASES[name]
    replace_launches(monkeypatch, both)
    monkeypatch.setattr(launch, "launch_kernel", once)
    # sizes of 1, of a multiple of 16 and of neither, in float16 and float32, in registers and by chunks, twice
    for n, m, d in [(1, 48, 24), (32, 1, 24), (32, 48, 64), (33, 40, 64), (33, 40, 300)] * 2:
        for dtype in (torch.float16, torch.float32):
            tensors = kernels.inputs(case, max(n, case.diagonals), m, d, dtype)
            step(case, tensors, False)
            # rows that begin beside 16 bytes
            step(
                case,
                tensors._replace(x=torch.cat([tensors.x.flatten()[:1], tensors.x.flatten()])[1:].view_as(tensors.x)),
                False,
            )
    assert host.compiled > 20


def test_repeated_launches_are_not_bound(host):
    """A step like the one before binds no argument; another type, alignment, size or device does, and once only."""
    case = CASES["columns"]
    tensors = kernels.inputs(case, 32, 48, 64, torch.float16)
    others = [
        kernels.inputs(case, 32, 48, 64, torch.bfloat16),
        kernels.inputs(case, 33, 48, 64, torch.float16),
        tensors._replace(x=shifted(tensors.x)),
    ]
    for inputs in (tensors, *others):
        for again in (False, True):
            bound, started = host.bound, len(host.started)
            step(case, inputs, False)
            assert len(host.started) > started + 5
            assert (host.bound > bound) != again
    compiled, host.device = host.compiled, object()
    step(case, tensors, False)
    assert host.compiled > compiled


def test_hooks_of_launches(host, monkeypatch):
    """Hooks of Triton see repeated launches too, and switches that change the code are looked at in every launch."""
    result, names = torch.empty(16, dtype=torch.int64), []
    hooks = triton.knobs.runtime

    def start(grid=(1,)) -> int:
        bound = host.bound
        launch.launch_kernel(_widening_kernel, grid, result=result, N=16)
        assert host.started[-1].grid == (*grid, 1, 1)[:3]
        return host.bound - bound

    assert [start(), start(), start((2, 3)), start((2, 3))] == [1, 0, 1, 0]
    with monkeypatch.context() as patch:
        patch.setattr(hooks, "launch_enter_hook", lambda metadata: names.append(metadata.get()["name"]))
        assert start() == 0
        assert names == ["_widening_kernel"]
    with monkeypatch.context() as patch:
        patch.setattr(_widening_kernel, "pre_run_hooks", [lambda *arguments, **named: names.append(named["N"])])
        assert [start(), start()] == [1, 1]
        assert names[1:] == [16, 16]
    with monkeypatch.context() as patch:
        patch.setattr(hooks, "debug", True)
        assert [start(), start()] == [1, 0]
    monkeypatch.setattr(launch, "REPEATS", False)
    assert [start(), start()] == [1, 1]


def test_host_time(monkeypatch, capsys):
    """The benchmark of the host's time has a row for each of its losses, with launches in all of them."""
    from benchmarks import host_time

    monkeypatch.setattr(host_time, "STEPS", 1)
    host_time.main()
    _, _, _, *rows = (line.split("|") for line in capsys.readouterr().out.splitlines())
    assert [name.strip() for _, name, *_ in rows] == ["clip", "nt_xent", "info_nce", "siglip"]
    assert all(int(launches) > 5 for _, _, launches, *_ in rows)


def test_remembered_launches_are_bounded(host, monkeypatch):
    """Numbers that change in every step do not fill the memory."""
    monkeypatch.setattr(launch, "REMEMBERED", 8)
    result = torch.empty(16, dtype=torch.int64)
    for size in range(2, 30):
        launch.launch_kernel(_widening_kernel, (1,), result=result, N=size)
        assert len(launch._remembered) <= 8


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("legacy", "highest", "tf32x3"),
        ("legacy", "high", "tf32"),
        ("legacy", "medium", "tf32"),
        ("matmul", "none", "tf32x3"),
        ("matmul", "ieee", "tf32x3"),
        ("matmul", "tf32", "tf32"),
        ("everything", "ieee", "tf32x3"),
        ("everything", "tf32", "tf32"),
    ],
)
def test_float32_precision(setting, value, expected):
    """Both of torch's interfaces for TF32 decide how float32 is multiplied."""
    places = {"matmul": torch.backends.cuda.matmul, "everything": torch.backends}
    try:
        if setting == "legacy":
            torch.set_float32_matmul_precision(value)
        else:
            places[setting].fp32_precision = value
        assert launch.float32_precision() == expected
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=grid_id)
@pytest.mark.parametrize("library", ["adds to float32", "multiplies into float32", "neither"])
def test_products_of_half_precision(library, dtype, monkeypatch):
    """Products are added up in float32 whatever the library takes, which is tried once; bfloat16 is never widened."""
    tried, multiply, widen = [], torch.mm, torch.Tensor.float

    def mm(a, b, *, out_dtype=None):
        tried.append("mm" if out_dtype is None else "widened mm")
        if out_dtype is None:
            return multiply(a, b)
        if library == "neither":
            raise RuntimeError("out_dtype is not supported for ROCm")
        return multiply(a.to(out_dtype), b.to(out_dtype))

    def addmm(total, a, b, *, beta, out_dtype, out):
        tried.append("widened addmm")
        if library != "adds to float32":
            raise RuntimeError("self and mat2 must have the same dtype")
        product = multiply(a.to(out_dtype), b.to(out_dtype))
        return out.copy_(product if beta == 0 else total + product)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch.Tensor, "float", lambda a: (tried.append("float"), widen(a))[1])
    a, b, total = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype), torch.randn(5, 3)
    product = a.double() @ b.double()
    expected = total.double() + product
    add = chunks._addition_of.__wrapped__(dtype, a.device)
    tried.clear()
    add(total, a, b, False)
    once = {"adds to float32": ["widened addmm"], "multiplies into float32": ["widened mm"], "neither": ["mm"]}[library]
    if library == "neither" and dtype == torch.float16:
        once = ["float", "float"]
    assert tried == once
    tolerance = 2.0**-8 * product.abs().max() if once == ["mm"] else 1e-5
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=float(tolerance))
    # what was there before does not matter to a fresh product
    fresh = torch.full((5, 3), torch.nan)
    add(fresh, a, b, True)
    torch.testing.assert_close(fresh.double(), product, rtol=0, atol=float(tolerance))


def test_products_of_a_library_that_fails(monkeypatch):
    """A failure that is not for want of a dtype is raised, and the library asked again."""

    def fails(*arguments, **named):
        raise RuntimeError("no workspace")

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no workspace"):
            chunks._addition_of(torch.bfloat16, torch.device("cpu"))
