"""The first use of a Triton kernel on a device, with made-up kernels; `test_first_use_interpreted.py` has real ones."""

import importlib.util
import threading
import warnings
from dataclasses import replace

import pytest
import torch

from contrastive_kernels.__main__ import main, report
from contrastive_kernels.engine.backends import torch as plain
from contrastive_kernels.engine.backends import triton as backend
from contrastive_kernels.engine.backends.triton import comparison, first_use, tiles, tune
from contrastive_kernels.engine.operators import FAKES
from tests.support import kernels
from tests.support.first_use import Kernel, arguments_of, warned

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
pytestmark = pytest.mark.usefixtures("unseen_device")
no_warning = pytest.mark.filterwarnings("error::RuntimeWarning")


def scaled(result):
    """Return a result of any operator with a tenth too much, or with other pairs of views."""
    if isinstance(result, torch.Tensor):
        return result.flip(1) if result.dtype == torch.int64 else 1.1 * result
    first, *others = result
    return type(result)._make([1.1 * first, *others]) if hasattr(result, "_make") else (1.1 * first, *others)


every_operator = pytest.mark.parametrize("operator", backend.operators)


def assert_equal(found, expected):
    """Assert that two results are the same bits."""
    for one, other in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (found, expected)), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@every_operator
@no_warning
def test_a_right_kernel_is_compared_once(operator):
    """And its own results are returned, from the first call on; afterwards a call is a call."""
    kernel = Kernel(operator)
    run = first_use.checked(operator, kernel)
    arguments, options = arguments_of(operator)
    before = torch.get_rng_state()
    assert_equal(run(*arguments, **options), first_use._in_pytorch(operator, arguments, options))
    calls = kernel.calls
    assert calls > 1
    run(*arguments, **options)
    assert kernel.calls == calls + 1
    assert torch.equal(torch.get_rng_state(), before)
    (line,) = first_use.report()
    assert line.startswith(operator) and line.endswith("float32, D = 24, cpu: right at its first use")
    assert line in report()


@every_operator
def test_a_wrong_kernel_gives_no_number(operator):
    """PyTorch computes from the first call on; one warning names the kernel and says how to report it."""
    kernel = Kernel(operator, scaled)
    run = first_use.checked(operator, kernel)
    arguments, options = arguments_of(operator)
    expected = first_use._in_pytorch(operator, arguments, options)
    with pytest.warns(RuntimeWarning, match=f"kernel of {operator}, float32, D = 24.*differs.*kernels check") as caught:
        assert_equal(run(*arguments, **options), expected)
    assert len(caught) == 1
    calls = kernel.calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(run(*arguments, **options), expected)
    assert kernel.calls == calls
    assert "differs from PyTorch" in first_use.report()[0]


def wrong(name, place, value):
    """Return a change of one entry, or of the entries that a slice selects, of one result."""

    def change(result):
        tensor = getattr(result, name).clone()
        tensor[place] = value(tensor[place])
        return result._replace(**{name: tensor})

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("operator", "case", "change"),
    [
        ("forward", "columns", wrong("row_lse", (0, -1), lambda v: v + 0.01)),
        ("forward", "columns", wrong("col_lse", 0, lambda v: v * torch.nan)),
        ("forward", "rows-maximum", wrong("row_max", 3, lambda v: v - 0.1)),
        ("forward", "band-alone", wrong("row_sum", -1, lambda v: v * 1.1)),
        ("backward", "columns", wrong("x", -1, lambda v: 0.9 * v)),
        ("backward", "columns", wrong("y", (slice(None), 3), lambda v: 0.0 * v)),
        ("backward", "columns", wrong("scale", (), lambda v: 1.1 * v)),
        ("backward", "bias", wrong("bias", 0, lambda v: v * torch.inf)),
        ("backward", "softplus-alone", wrong("total", (), lambda v: 1.1 * v)),
        ("backward", "softplus-alone", wrong("term_offset", -1, lambda v: 0.9 * v)),
    ],
)
def test_one_wrong_number_in_a_tile_is_enough(operator, case, change, dtype):
    run = first_use.checked(operator, Kernel(operator, change))
    arguments, options = arguments_of(operator, dtype=dtype, name=case)
    with pytest.warns(RuntimeWarning, match="differs"):
        run(*arguments, **options)


@pytest.mark.parametrize("splits", comparison.SPLITS)
def test_walks_in_one_program_and_shared_ones_are_compared(splits):
    """Which of the two a call takes depends on its sizes, on which the verdict does not."""
    kernel = Kernel("backward", lambda result: scaled(result) if tiles.splits.get() == splits else result)
    arguments, options = arguments_of("backward")
    assert "differs" in comparison.objection("backward", kernel, arguments, options)
    assert tiles.splits.get() is None


@pytest.mark.parametrize("operator", ["forward", "backward"])
def test_tf32_is_right_where_it_is_allowed(operator):
    """Operands that lose 13 bits are a fault at the highest precision only."""

    def cut(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    def kernel(*arguments, **options):
        place = 0 if operator == "forward" else 1
        inputs = arguments[place]
        inputs = inputs._replace(x=cut(inputs.x), y=cut(inputs.y))
        return first_use._in_pytorch(operator, (*arguments[:place], inputs, *arguments[place + 1 :]), options)

    for name in ("columns", "exponents-bias"):
        arguments, options = arguments_of(operator, d=128, name=name)
        assert "differs" in comparison.objection(operator, kernel, arguments, options)
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            assert comparison.objection(operator, kernel, arguments, options) == ""
            assert "differs" in comparison.objection(operator, Kernel(operator, scaled), arguments, options)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def test_float16_holds_the_gradients_that_are_drawn():
    """Even if all rows send theirs to one column, in both roles; otherwise a right kernel would seem wrong."""
    inputs, what = arguments_of("forward", dtype=torch.float16)[0]
    upstream = comparison._Draw(inputs.x).upstream(inputs, what)
    largest = max(grad.max().item() for grad in upstream[:2])
    assert 2 * comparison.ROWS * max(comparison.SCALES) * largest < torch.finfo(torch.float16).max
    assert min(grad.min().item() for grad in upstream[:2]) > 0


@no_warning
def test_another_default_dtype():
    """What is drawn has the dtypes of the caller's tensors."""
    arguments, _ = arguments_of("backward", name="exponents-bias")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        drawn = comparison._drawn("backward", None, arguments, 8.0)
    finally:
        torch.set_default_dtype(before)
    for of_call, own in zip((*arguments[0], *arguments[1]), (*drawn[0], *drawn[1]), strict=True):
        assert of_call is own is None or own.dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_operator
def test_pytorch_returns_what_the_kernels_do(operator, dtype):
    """The same shapes and dtypes, so that a compiled program takes them."""
    for name in ("columns-maximum", "softplus-alone", "self"):
        for saves in (False, True):
            arguments, options = arguments_of(operator, d=320, dtype=dtype, name=name)
            options = {**options, "save_scores": saves} if operator == "forward" else options
            flat = [one for part in arguments for one in (part if hasattr(part, "_fields") else [part])]
            if operator == "backward":
                flat[-8:-1] = [[*arguments[3]]]
            fake = FAKES[operator](backend)(*flat, *options.values())
            found = first_use._in_pytorch(operator, arguments, options)
            for one, other in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (found, fake)), strict=True):
                assert (one.shape, one.dtype) == (other.shape, other.dtype)


@no_warning
def test_float32_gradients_are_compared_on_their_own():
    """Of the same call with half precision they are other code."""
    kernel = Kernel("backward")
    run = first_use.checked("backward", kernel)
    arguments, _ = arguments_of("backward", dtype=torch.float16)
    run(*arguments, float32_gradients=False)
    calls = kernel.calls
    run(*arguments, float32_gradients=True)
    assert kernel.calls > calls + 1


def test_pairs_that_are_none(monkeypatch):
    """A pair out of range is wrong, not an access out of range."""
    for pair in ((0, 4), (-1, 2), (2, 1), (1, 1)):
        monkeypatch.setattr(first_use, "_trusted", {})
        monkeypatch.setattr(first_use, "_verdicts", {})
        run = first_use.checked("views", Kernel("views", lambda r, p=pair: torch.tensor(p).expand_as(r)))
        with pytest.warns(RuntimeWarning, match="least similarity differs"):
            run(*arguments_of("views")[0])


def test_a_kernel_that_does_not_run():
    """PyTorch stands in; what the kernels refuse is refused, and with the switch off everything is raised."""

    def broken(*arguments, **options):
        raise RuntimeError("out of resource: shared memory\nand more")

    arguments, options = arguments_of("forward")
    run = first_use.checked("forward", broken)
    with pytest.warns(RuntimeWarning, match="RuntimeError: out of resource: shared memory. The PyTorch"):
        assert_equal(run(*arguments, **options), first_use._in_pytorch("forward", arguments, options))

    def refusing(*arguments, **options):
        raise NotImplementedError("at most two exponents")

    with pytest.raises(NotImplementedError):
        first_use.checked("unit_rows", refusing)(torch.ones(2, 2))


def test_no_memory_for_the_comparison(monkeypatch):
    """There may be some at the next use."""
    kernel = Kernel("unit_rows")
    run = first_use.checked("unit_rows", kernel)
    with monkeypatch.context() as patch:

        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(first_use, "objection", full)
        with pytest.warns(RuntimeWarning, match="out of memory"):
            run(torch.ones(3, 4))
        assert "out of memory" in first_use.report()[0]
    run(torch.ones(3, 4))
    assert "right" in first_use.report()[0]


def test_capture(monkeypatch):
    """Nothing is read back in a capture: the kernel runs, with a warning and the reason; it is compared later."""
    run = first_use.checked("unit_rows", Kernel("unit_rows", scaled))
    x = torch.randn(5, 8)
    monkeypatch.setattr(first_use, "objection", None)
    monkeypatch.setattr(first_use, "_capturing", lambda: True)
    found, caught = warned(lambda: [run(x) for _ in range(2)])
    assert_equal(found[0], scaled(plain.unit_rows(x)))
    assert len(caught) == 1 and "capture of a CUDA graph" in caught[0]
    assert "capture" in first_use.report()[0]


@no_warning
def test_capture_of_what_was_right_before(monkeypatch):
    run = first_use.checked("unit_rows", Kernel("unit_rows"))
    run(torch.ones(5, 8))
    monkeypatch.setattr(first_use, "_capturing", lambda: True)
    run(torch.ones(5, 8))
    assert "right at its first use" in first_use.report()[0]


def test_comparison_after_a_capture(monkeypatch):
    run = first_use.checked("unit_rows", Kernel("unit_rows", scaled))
    x = torch.randn(5, 8)
    with monkeypatch.context() as patch:
        patch.setattr(first_use, "_capturing", lambda: True)
        with pytest.warns(RuntimeWarning, match="capture"):
            run(x)
    assert_equal(run(x), plain.unit_rows(x))
    assert "differs" in first_use.report()[0]


@no_warning
def test_switched_off(monkeypatch, capsys):
    """Then a wrong kernel's numbers are returned, as the tests and the check of all losses need it."""
    monkeypatch.setenv(first_use.ENVIRONMENT_VARIABLE, "0")
    kernel = Kernel("unit_rows", scaled)
    x = torch.randn(5, 8)
    assert_equal(first_use.checked("unit_rows", kernel)(x), scaled(plain.unit_rows(x)))
    assert kernel.calls == 1
    assert first_use.report()[0].endswith(f"not compared, {first_use.ENVIRONMENT_VARIABLE}=0")
    monkeypatch.setenv(first_use.ENVIRONMENT_VARIABLE, "no")
    with pytest.raises(SystemExit):
        main([])
    assert first_use.ENVIRONMENT_VARIABLE in capsys.readouterr().err


@needs_triton
@pytest.mark.parametrize(
    ("version", "tuned", "believed"), [("installed", "", True), ("0.0", "", False), ("installed", "1", False)]
)
def test_verified_rows(version, tuned, believed, monkeypatch):
    """A row that was seen right with this Triton is not compared, nor is it if another tile may be taken."""
    version = tiles._triton_version() if version == "installed" else version
    seen = (tiles.Seen("a GPU", "2.11.0", version),)
    with monkeypatch.context() as patch:
        table = tuple(replace(row, verified=seen if row.kernel == "sums" else ()) for row in tiles.TABLE)
        patch.setattr(tiles, "TABLE", table)
        tiles.find.cache_clear()
        patch.setenv(tune.ENVIRONMENT_VARIABLE, tuned)
        kernel = Kernel("unit_rows")

        def picking(x, *, names=("sums",)):
            for name in names:
                tiles.pick(name, x, False)
            return kernel(x)

        first_use.checked("unit_rows", picking)(torch.ones(3, 4))
        assert (kernel.calls == 1) == believed
        assert ("seen right before" in first_use.report()[0]) == believed
        assert "unit_rows (sums 32x32 for interpreter)" in first_use.report()[0]
        # every row has to be
        kernel.calls = 0
        first_use.checked("unit_rows", lambda x: picking(x, names=("sums", "weights")))(torch.ones(3, 5))
        assert kernel.calls > 1
        verified, rows = tiles.verified_rows(torch.device("cpu"))
        assert rows > 0 and verified == (2 if version != "0.0" else 0)
        assert first_use.outlook(torch.device("cpu")).startswith(f"{verified} of {rows} rows")
    tiles.find.cache_clear()


def test_no_row_is_verified_unseen():
    """A row says where it was seen; a change of it is no row of the table any more."""
    for row in tiles.TABLE:
        assert all(seen.device and seen.torch and seen.triton for seen in row.verified)
    row = replace(tiles.TABLE[0], verified=(tiles.Seen("a GPU", "2.11.0", "3.6.0"),))
    assert not row.is_verified()


def test_threads(monkeypatch):
    """Threads that meet a wrong kernel at once compare it once, get one warning and right results all."""
    kernel, start, objections = Kernel("unit_rows", scaled), threading.Barrier(8), []
    compare = first_use.objection
    monkeypatch.setattr(first_use, "objection", lambda *a: objections.append(a) or compare(*a))
    run = first_use.checked("unit_rows", kernel)
    x, results = torch.randn(5, 8), []

    def use():
        start.wait()
        results.append(run(x))

    def use_in_threads():
        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    _, caught = warned(use_in_threads)
    assert len(results) == 8 and len(objections) == len(caught) == 1
    for result in results:
        assert_equal(result, plain.unit_rows(x))


def count_verdicts(*calls):
    run = first_use.checked("forward", Kernel("forward"))
    for arguments, options in calls:
        run(*arguments, **options)
    return len(first_use._verdicts)


def test_what_a_verdict_belongs_to():
    """To compiled code: other sizes, scales and exponents are the same code, other options and layouts are not."""

    def call(**changes):
        return arguments_of("forward", **changes)

    (inputs, what), options = call(name="exponents")
    same = [(inputs, what._replace(exponents=(3.0, 0.1))), (inputs._replace(scale=torch.tensor(0.0)), what)]
    assert (
        count_verdicts(call(name="exponents"), call(n=96, m=16, name="exponents"), *((a, options) for a in same)) == 1
    )
    first_use._trusted.clear()
    first_use._verdicts.clear()
    (inputs, what), options = call()
    wide = torch.zeros(48, 29)[:, :24]
    shifted = torch.zeros(48 * 24 + 1)[1:].view(48, 24)
    changed = [
        call(n=47), call(m=1), call(d=25), call(dtype=torch.float16), call(name="columns-ids"), call(name="bias"),
        call(name="columns-diagonal"), call(name="columns-maximum"), ((inputs._replace(x=wide), what), options),
        ((inputs._replace(x=shifted), what), options), ((inputs, what), {"maximum": False, "save_scores": True}),
    ]  # fmt: skip
    assert count_verdicts(call(), *changed) == 1 + len(changed)


def layouts(x):
    """Yield the tensor in other memory: of wider rows, and not aligned."""
    yield x
    wide = x.new_zeros(x.shape[0], x.shape[1] + 5)[:, 2 : x.shape[1] + 2]
    yield wide.copy_(x)
    yield x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("name", kernels.CASES)
def test_what_is_drawn_is_the_same_code(name):
    """The rows of the comparison run the compiled variant that the caller's run."""
    case = kernels.CASES[name]
    for n, m, d in ((1, 1, 24), (48, 1, 24), (33, 48, 24), (48, 33, 1), (50, 50, 96)):
        inputs, what = kernels.inputs(case, max(n, case.diagonals), m, d, torch.float16), kernels.description(case)
        for x in layouts(inputs.x):
            inputs = inputs._replace(x=x)
            options = {"maximum": case.maximum, "save_scores": False}
            drawn = comparison._drawn("forward", None, (inputs, what), 8.0)
            keys = [first_use._key("forward", x, one, options) for x, one in ((x, (inputs, what)), (drawn[0].x, drawn))]
            assert keys[0] == keys[1]
            assert all(value is None or not value.isnan().any() for value in drawn[0])
            assert case.diagonals < 2 or len(drawn[0].x) % case.diagonals == 0


def test_saved_scores_of_a_wrong_forward_are_not_read():
    """PyTorch saves none: the backward of the kernels, which would read them, is PyTorch's too."""
    forward = first_use.checked("forward", Kernel("forward", lambda s: s._replace(row_lse=1.1 * s.row_lse)))
    backward = first_use.checked("backward", Kernel("backward", scaled))
    (inputs, what), _ = arguments_of("forward", n=33, m=20)
    with pytest.warns(RuntimeWarning, match="row_lse differs"):
        statistics = forward(inputs, what, maximum=False, save_scores=True)
    assert statistics.scores.shape == (33, 20)
    (upstream, _, _, wanted, _), _ = arguments_of("backward", n=33, m=20)
    expected = first_use._in_pytorch("backward", (upstream, inputs, what, wanted, None), {})
    assert_equal(backward(upstream, inputs, what, wanted, statistics.scores), expected)
