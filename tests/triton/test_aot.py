"""Every row of the tile table, compiled for its GPU with the epilogues of the losses, without a GPU or a driver.

The tests look at the binaries, not at their speed or results: nothing spills, the matrix unit is in use, limits hold.
"""

from __future__ import annotations

import csv
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from contrastive_kernels.engine.spec import PLACES

aot = pytest.importorskip("tests.support.aot", reason="triton is not installed", exc_type=ImportError)
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
if os.environ.get("TRITON_INTERPRET") != "1":
    import triton
    import triton.language as tl

    from contrastive_kernels.engine.backends.triton import (
        backward,
        bundles,
        chunks,
        epilogue,
        forward,
        launch,
        rows,
        safe_forward,
        tiles,
        views,
    )
    from tests.support import sass

    @triton.jit
    def _arithmetic_kernel(x, result, BN: tl.constexpr):
        o_n = tl.arange(0, BN)
        b_x = tl.load(x + o_n)
        b_y = tl.maximum(tl.minimum(b_x, 2.0), 1.0) - tl.max(b_x, 0) + tl.log2(b_x) * 0.5
        tl.store(result + o_n, b_y + tl.exp2(b_x) * tl.sqrt(b_x) * tl.rsqrt(b_x))


PLAIN = dict(Q=1, COLUMN_LSE=False, TERM="", BIASED=False, SHIFTED=False)
PLAIN |= dict(IDS=False, KEEP_EQUAL_IDS=False, DIAGONALS=0, CUT=False, symmetric=False, saved=False, split=False)
# The epilogues that the losses ask for, small and large ones.
SMALL = {
    "clip": dict(COLUMN_LSE=True, DIAGONALS=1),
    "nt_xent": dict(DIAGONALS=2, symmetric=True),
    "ids": dict(IDS=True, symmetric=True),
    "siglip": dict(Q=0, TERM="softplus", SHIFTED=True),
}
LARGE = {
    "hard_negative-band": dict(Q=2, IDS=True, symmetric=True, TERM="band"),
    "info_nce-columns-band": dict(COLUMN_LSE=True, IDS=True, DIAGONALS=1, TERM="band"),
    "cutoff": dict(IDS=True, CUT=True),
    "bias": dict(IDS=True, symmetric=True, BIASED=True),
    "distance_hinge": dict(Q=0, TERM="distance_hinge", SHIFTED=True, DIAGONALS=1),
}
# Terms that are added up in the sweep of their gradients.
TOTALS = {
    "siglip": dict(Q=0, TERM="softplus", SHIFTED=True, DIAGONALS=1),
    "band": dict(Q=0, TERM="band", IDS=True, DIAGONALS=1, symmetric=True),
    "student": dict(Q=0, TERM="student", SHIFTED=True, DIAGONALS=1),
    "distance_hinge": dict(Q=0, TERM="distance_hinge", SHIFTED=True, DIAGONALS=1),
}
# All other flags, on one architecture.
OTHERS = {
    "rows": {},
    "columns-alone": dict(Q=0, COLUMN_LSE=True),
    "same": dict(IDS=True, KEEP_EQUAL_IDS=True, DIAGONALS=1, symmetric=True),
    "clip-ids": dict(COLUMN_LSE=True, IDS=True),
    "student": dict(Q=0, TERM="student", SHIFTED=True, DIAGONALS=1),
    # Not identity and count, whose weights do not depend on S: the one product left is serialized. Slow, not wrong.
    **{term: dict(Q=0, TERM=term, IDS=True) for term in ("square", "hinge", "gaussian")},
}
# Epilogues of gradients that are compiled for shared walks, on one architecture.
SPLIT = ("nt_xent", "rows", "same", "student", "info_nce-columns-band", "band")
QUANTA = {"store.x_inverse", "store.y_inverse", "scores.x_quantum", "scores.y_quantum"}
ARCHITECTURES = (80, 90, 100, "gfx942")
EVERYTHING = "CONTRASTIVE_KERNELS_AOT_ALL"  # set: all epilogues on all architectures
RECORDING = "CONTRASTIVE_KERNELS_AOT_RECORD"  # set: write what was found as the new record of this Triton
# A column for each version of Triton and each of these.
RECORD, RECORDED = Path(aot.__file__).with_name("aot_record.csv"), ("registers", "exponentials")
VERSION = metadata.version("triton")


def arguments(kernel, row, flags: dict, total: bool = False, twin: bool = False, **extra) -> dict:
    """Return the compile-time arguments of a kernel: block sizes, flags, None for the pointers that they switch off."""
    d = min(row.limit, 768)
    options = PLAIN | flags
    symmetric, saved, split = (options.pop(name) for name in ("symmetric", "saved", "split"))
    precision = "ieee" if row.size == 2 or row.architecture == "gfx942" else "tf32x3"
    flags = bundles.Flags(**options, PRECISION=precision)
    # two log-sum-exps of a pair take one exponential, or in another program two
    both_roles = flags.COLUMN_LSE or (symmetric and not flags.BIASED)
    factored = row.kernel in ("grad", "weights") and row.size == 2 and both_roles and flags.Q > 0
    constants = row.blocks(d) | extra | dict(D=d, MAXIMUM=False, GROUP=8, FLAGS=flags)
    constants |= dict(PAIR_SUM=row.pair_sum, TRIANGLE=symmetric, FACTORED=factored and not twin, SPLIT=split)
    constants |= dict(PERSISTENT=row.persistent and not flags.CUT and not twin, NORMS=256)
    # grad_scale is for float16 only; the rows are compiled for bfloat16
    absent = {"shift_failed", "other_lse", "shares.bias", "grad_scale"}
    absent |= set() if flags.IDS else {"x_ids", "y_ids"}
    absent |= set() if flags.CUT else {"cutoff"}
    absent |= set() if flags.BIASED else {"bias"}
    absent |= set() if flags.SHIFTED else {"term_offset", "shares.term_offset"}
    absent |= set() if flags.TERM in ("softplus", "student") else {"term_scale", "shares.term_scale"}
    absent |= set() if total else {"shares.total"}
    absent |= set() if factored else {"center"}
    absent |= set() if row.takes_descriptors(d) else {"x_tiles", "y_tiles"}
    saved = saved or row.kernel in ("saved_sums", "saved_weights")
    absent |= set() if saved else {"store.matrix", "scores.matrix"}
    # saved similarities of float32 features have no quanta
    absent |= set() if saved and row.size == 2 else QUANTA
    constants |= dict.fromkeys(absent)
    return {name: value for name, value in constants.items() if name.split(".")[0] in kernel.arg_names}


def variants(row, epilogues: dict) -> list:
    """Return (name, kernel, compile-time arguments) of the launches that use a row."""
    kernel = {
        "sums": forward._sums_fwd_kernel,
        "saved_sums": forward._sums_fwd_kernel,
        "safe_sums": safe_forward._safe_sums_fwd_kernel,
        "grad": backward._grad_bwd_kernel,
        "total": backward._grad_bwd_kernel,
        "weights": chunks._weights_bwd_kernel,
        "saved_weights": chunks._weights_bwd_kernel,
    }[row.kernel]
    found = []
    for name, flags in epilogues.items():
        roles = dict(AS_ROWS=True, AS_COLUMNS=bool(flags.get("symmetric")))
        total = row.kernel == "total" or (row.kernel == "weights" and name in TOTALS and takes_large_epilogues(row))
        constants = arguments(kernel, row, flags, total, **roles)
        found.append((name, kernel, constants))
        # of "weights" those that take most registers
        with_twin = row.kernel == "grad" or name in ("clip", "hard_negative-band")
        if constants.get("FACTORED") and row.architecture == 90 and with_twin:
            found.append((f"{name}-twin", kernel, arguments(kernel, row, flags, total, twin=True, **roles)))
    return found


def takes_large_epilogues(row) -> bool:
    """Return whether large epilogues get this row."""
    return tiles.find(row.kernel, row.architecture, row.size, row.limit, True) is row


def cases() -> list:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return []
    found = []
    for row in tiles.TABLE:
        if row.architecture not in ARCHITECTURES or (row.kernel.startswith("saved") and row.size == 4):
            continue
        epilogues = LARGE if row.large_epilogue else SMALL
        if row.kernel == "sums":
            # ids make a large epilogue here; without a row for it the other one takes them
            demanding = ("ids",) if takes_large_epilogues(row) else ("clip", "nt_xent")
            epilogues = {name: SMALL[name] for name in demanding}
        elif row.kernel == "total":
            demanding = TOTALS if row.architecture == 90 else ("siglip", "distance_hinge")
            epilogues = {name: TOTALS[name] for name in demanding}
        elif (row.kernel, row.architecture) != ("grad", 90) and os.environ.get(EVERYTHING) is None:
            # The most demanding of them; all where tuning begins.
            demanding = ("hard_negative-band",) if row.large_epilogue else ("ids",)
            if row.persistent and not row.large_epilogue:
                demanding = ("clip", "nt_xent")
            epilogues = {name: epilogues[name] for name in demanding}
        if row.kernel not in ("sums", "saved_sums", "total") and takes_large_epilogues(row):
            epilogues = epilogues | {"hard_negative-band": LARGE["hard_negative-band"]}
        if row.kernel == "weights" and row.size == 2 and takes_large_epilogues(row):
            epilogues = epilogues | {"siglip": TOTALS["siglip"]}
        if row.architecture == 90 and row.kernel == "grad" and row.size == 2 and not row.large_epilogue:
            epilogues = epilogues | OTHERS
        elif row.kernel == "saved_sums":
            epilogues = {"clip-ids": OTHERS["clip-ids"]}
        elif row.kernel == "saved_weights":
            epilogues = {"hard_negative-band": LARGE["hard_negative-band"]}
        if row.kernel == "safe_sums" and row.size == 2 and row.architecture == 90 and row.large_epilogue:
            # similarities saved for the backward
            epilogues = epilogues | {f"{name}-saved": flags | dict(saved=True) for name, flags in epilogues.items()}
        if row.kernel in ("grad", "total") and row.architecture == 90:
            # walks that several programs share are other code
            epilogues = {
                **{name: flags for name, flags in epilogues.items() if name not in SPLIT},
                **{f"{name}-split": epilogues[name] | dict(split=True) for name in SPLIT if name in epilogues},
            }
        found += [(row, *variant) for variant in variants(row, epilogues)]
    return found


def case_id(case) -> str:
    row, name, _, arguments = case
    return f"{row.kernel}-{row.architecture}-{'float32' if row.size == 4 else 'half'}-D{arguments['D']}-{name}"


def planned_exponentials(case) -> int:
    """Return how many a pair takes: one for each log-sum-exp and role, or for each exponent, and the term's."""
    row, _, _, constants = case
    if row.kernel in ("sums", "saved_sums"):
        return 1
    flags = constants["FLAGS"]
    term = dict(softplus=1, gaussian=1, student=2 if row.kernel == "total" else 1).get(flags.TERM, 0)
    exponents = flags.Q
    if row.kernel == "safe_sums" or constants.get("FACTORED"):
        return exponents + term
    return exponents * (1 + constants["AS_COLUMNS"]) + flags.COLUMN_LSE + term


def repeatable(name: str, key: str) -> bool:
    return key != "registers" or "-100-" not in name


def record() -> dict[str, dict[str, str]]:
    """Return the rows of the record by their cases."""
    if not RECORD.exists():
        return {}
    with RECORD.open(newline="") as file:
        return {row.pop("case"): row for row in csv.DictReader(file)}


def write_record(found: dict) -> None:
    """Replace the columns of this Triton; rows of cases that no longer exist go."""
    before, rows = record(), []
    for name, binary in found.items():
        own = {f"{VERSION} {key}": getattr(binary, key, "") if repeatable(name, key) else "" for key in RECORDED}
        rows.append({"case": name} | before.get(name, {}) | own)
    columns = sorted({column for row in rows for column in row} - {"case"}, key=by_version)
    with RECORD.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", *columns], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def by_version(column: str) -> tuple[list[int], int]:
    version, _, key = column.partition(" ")
    return [int(number) for number in version.split(".")], RECORDED.index(key)


@pytest.fixture(scope="module")
def binaries():
    """Compile all cases, as many at a time as there are processors: ptxas and LLVM release the interpreter."""
    jobs = cases()

    def build(case):
        row, _, kernel, constants = case
        dtype = torch.float32 if row.size == 4 else torch.bfloat16
        try:
            return aot.compile_kernel(kernel, row.architecture, dtype, constants, row.options())
        except Exception as error:  # raised by the test that it belongs to
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(map(case_id, jobs), pool.map(build, jobs), strict=True))
    if os.environ.get(RECORDING):
        write_record(found)
    return found


@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_binary(binaries, case):
    """A binary spills nothing, fits its GPU, uses the matrix unit and takes no exponential twice."""
    row, binary = case[0], binaries[case_id(case)]
    if isinstance(binary, Exception):
        raise binary
    assert binary.spilled == 0, binary
    assert binary.shared <= aot.SHARED[row.architecture], binary
    assert binary.tensor_memory <= 512, binary
    assert (binary.matrix_instructions > 0) == (row.kernel != "saved_weights"), binary
    assert not binary.warnings, binary
    assert binary.warps == row.warps, binary
    if row.maxnreg is not None:
        assert binary.registers <= row.maxnreg, binary
        assert row.programs > 1
        # besides what it asks for, a program takes 1 KB of a multiprocessor's 228
        assert row.programs * (binary.shared + 1024) <= 228 << 10, binary

    threads = 64 * row.warps if row.architecture == "gfx942" else 32 * row.warps
    planned = planned_exponentials(case) * row.height * row.width // threads
    # A loop may appear twice, and a running maximum takes a few more; where tuning begins neither is expected.
    copies = (1,) if row.architecture == 90 else (1, 2)
    assert any(0 <= binary.exponentials - times * planned <= 8 for times in copies), (
        f"{binary.exponentials} exponentials a thread, {planned} are planned for its pairs: work is repeated"
    )


@pytest.mark.parametrize("case", [case for case in cases() if case[0].architecture == 90], ids=case_id)
def test_asynchronous_products(binaries, case):
    """No register of a product is touched, and no buffer filled again, before all of its readers have finished."""
    assembly = binaries[case_id(case)].assembly
    assert not sass.register_hazards(assembly)
    assert not sass.unguarded_refills(assembly)


def test_asynchronous_products_without_waits(binaries):
    """The checks see a wait that waits for too little, one that is missing, and a barrier that is missing."""
    assembly = binaries["grad-90-half-D128-clip"].assembly
    waits, barriers = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "BAR.SYNC"
    operands = {str(i.operands) for i in sass.parse(assembly) if i.matrix_operand()}
    for changed in (assembly.replace(waits, waits[:-1] + "1"), assembly.replace(waits, "NOP")):
        found = sass.register_hazards(changed)
        assert found
        assert any(of.partition("under way: ")[2].endswith(tuple(operands)) for of in found)
    assert sass.unguarded_refills(assembly.replace(barriers, "NOP"))


@pytest.mark.skipif(EVERYTHING in os.environ, reason="the record is of the usual cases")
@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_binary_as_recorded(binaries, case):
    """Registers and exponentials are those of `aot_record.csv` for the installed Triton.

    `CONTRASTIVE_KERNELS_AOT_RECORD=1` rewrites its columns. sm_100 has no registers there: the same source took 155 or
    204, by what was compiled beside it.
    """
    binary, name, recorded = binaries[case_id(case)], case_id(case), record()
    if not any(f"{VERSION} exponentials" in row for row in recorded.values()):
        pytest.skip(f"no record of Triton {VERSION}")
    row = recorded[name]
    for key in RECORDED:
        if not repeatable(name, key):
            continue
        now, before = getattr(binary, key), row[f"{VERSION} {key}"]
        assert before and abs(now - int(before)) <= 8 * (key == "registers"), (
            f"{key}: {now}, {before or 'nothing'} recorded; if that is wanted run this file with {RECORDING}=1"
        )


@pytest.mark.parametrize(("name", "same"), [("sums", False), ("safe_sums", True), ("grad", True)])
def test_places_fit(name, same):
    """Ids that are classes and places, which no row of the record has, leave a tile its registers."""
    row = tiles.find(name, 90, 2, 128, name != "grad")  # for sums they make a large epilogue
    ((_, kernel, constants),) = variants(row, {"places": dict(IDS=True, KEEP_EQUAL_IDS=same, DIAGONALS=PLACES)})
    binary = aot.compile_kernel(kernel, 90, torch.bfloat16, constants, row.options())
    assert binary.spilled == 0 and binary.shared <= aot.SHARED[90], binary
    assert not binary.warnings, binary


def test_rows_of_86_fit(binaries):
    """The rows that GPUs of 99 KB of shared memory share with sm_80 take no more; the one that is cut, up to its D."""
    same = ("height", "width", "depth", "warps", "stages")
    fitting = [case for case in cases() if case[0].architecture == 80]
    for row, name, kernel, constants in fitting:
        other = tiles.find(row.kernel, 86, row.size, constants["D"], row.large_epilogue)
        if all(getattr(row, field) == getattr(other, field) for field in same):
            assert binaries[case_id((row, name, kernel, constants))].shared <= aot.SHARED[86]
    row, kernel = tiles.find("sums", 86, 2, 128, False), forward._sums_fwd_kernel
    assert row.limit == 128
    binary = aot.compile_kernel(kernel, 80, torch.bfloat16, arguments(kernel, row, SMALL["ids"]), row.options())
    assert binary.spilled == 0 and binary.shared <= aot.SHARED[86]


@pytest.mark.skipif(EVERYTHING in os.environ, reason="the record is of the usual cases")
def test_record_is_of_these_cases():
    """The record has a row for every case and no other."""
    assert set(record()) == set(map(case_id, cases()))


@pytest.mark.parametrize("kernel", ["saved_sums", "saved_weights"])
def test_saved_scores_of_float32(kernel):
    """The kernels that save and read float32 similarities, which have no quanta, spill nothing."""
    row = tiles.find(kernel, 90, 4, 768, False)
    ((_, function, constants),) = variants(row, {"clip-ids": OTHERS["clip-ids"]})
    assert aot.compile_kernel(function, 90, torch.float32, constants, row.options()).spilled == 0


@pytest.mark.parametrize("architecture", [80, 90])
def test_behind_the_fast_path(architecture):
    """The launch for rows and columns together, which takes no descriptors, spills nothing."""
    row = tiles.find("safe_sums", architecture, 2, 128, False)
    ((_, function, constants),) = variants(row, {"clip": SMALL["clip"]})
    for name in ("shift_failed", "other_lse"):
        del constants[name]
    constants |= dict.fromkeys(("x_tiles", "y_tiles", "partial"))
    assert aot.compile_kernel(function, architecture, torch.bfloat16, constants, row.options()).spilled == 0


def test_arithmetic():
    """Maxima pass over NaN and functions flush denormals, as the interpreter is made to: see `compute_as_hardware`."""
    code = aot.compiled(_arithmetic_kernel, 90, torch.float32, dict(BN=128), {}).asm["ptx"]
    functions = [f"{name}.approx.ftz.f32" for name in ("ex2", "sqrt", "rsqrt")]
    for instruction in ("max.f32", "min.f32", "add.f32", "mul.f32", *functions):
        assert f"\t{instruction} " in code
    # not even in the logarithm
    assert not any(other in code for other in (".NaN", "add.ftz", "mul.ftz", "setp.lt.ftz"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_kernels(architecture):
    """Kernels without a row of the table spill nothing."""
    for kernel, constants in (
        (
            epilogue._pack_bwd_kernel,
            dict(
                Q=2,
                COLUMN_LSE=True,
                FIND_CENTER=True,
                BN=tiles.ALIGNMENT,
                BC=launch.CENTER_ROWS_TOGETHER,
                grad_scale=None,
            ),
        ),
        (epilogue._center_bwd_kernel, dict(Q=2, COLUMN_LSE=True, BN=launch.CENTER_ROWS)),
        (backward._fold_bwd_kernel, dict(BN=backward.FOLD_ELEMENTS, BS=backward.FOLD_SLOTS)),
        (
            forward._fold_fwd_kernel,
            dict(BLOCK=128, ACCUMULATE=True, LAST=True, NORMS=256, BN=forward.FOLD_ROWS, BS=forward.FOLD_SLOTS),
        ),
        (safe_forward._merge_fwd_kernel, dict(Q=2, TERM="band", MAXIMUM=True, BN=safe_forward.MERGE_ROWS)),
        (views._view_minimum_fwd_kernel, dict(D=128, BN=views.ROWS, BD=views.DEPTH)),
        (rows._unit_rows_fwd_kernel, dict(EPSILON=rows.NORM_EPSILON, D=768, **rows.block_sizes(768))),
        (rows._unit_rows_bwd_kernel, dict(EPSILON=rows.NORM_EPSILON, D=768, **rows.block_sizes(768))),
        (rows._row_dot_fwd_kernel, dict(D=768, **rows.block_sizes(768))),
        (rows._row_dot_bwd_kernel, dict(D=768, **rows.block_sizes(768))),
        (forward._largest_norm_fwd_kernel, dict(D=768, **rows.block_sizes(768))),
    ):
        assert aot.compile_kernel(kernel, architecture, torch.bfloat16, constants, {}).spilled == 0


@pytest.mark.parametrize("kernel", ["sums", "safe_sums", "weights"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, 86, "other", "interpreter"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("d", [1, 128, 256, 4096])
def test_table_complete(kernel, architecture, size, d):
    """Every kernel has a tile for every D, but `grad`, which `chunks` replaces."""
    for large_epilogue in (False, True):
        assert tiles.find(kernel, architecture, size, d, large_epilogue)
    symmetric = tiles.find("sums", architecture, size, d, True)
    assert symmetric.height == symmetric.width, "the triangle needs square tiles"
    assert tiles.ALIGNMENT % max(symmetric.height, tiles.find("weights", architecture, size, d, False).height) == 0


def test_rows_of_a_version():
    """Whatever the version of Triton, unknown or new, one row serves where one does for the oldest, and no two do."""

    def served(version: str) -> list:
        rows = [row for row in tiles.ROWS if row.serves(version)]
        return sorted(str((r.kernel, r.architecture, r.size, r.large_epilogue, r.limit)) for r in rows)

    oldest = served("3.6.0")
    assert len(set(oldest)) == len(oldest)
    for version in ("3.6.1", "3.7.0", "3.7.1+git1234", "3.9.0", "3.10.0", "4.0", ""):
        assert served(version) == oldest


@pytest.mark.parametrize(
    ("version", "served"),
    [("3.6.2", "old"), ("3.7", "middle"), ("3.8.1", "middle"), ("3.9.0+cu", "new"), ("3.10.0", "new"), ("", "new")],
)
def test_versions_of_a_row(version, served):
    """Versions compare as numbers; an unknown one is taken for the newest."""
    row = tiles.TABLE[0]
    rows = dict(
        old=replace(row, before="3.7"), middle=replace(row, since="3.7", before="3.9"), new=replace(row, since="3.9")
    )
    assert [name for name, row in rows.items() if row.serves(version)] == [served]
