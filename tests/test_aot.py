"""Every row of the tile table, compiled for its GPU with the epilogues that the losses ask for: no GPU, no driver.

What the binaries are, not how fast and not that they are right: nothing spilled, the matrix unit in use, within limits.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

aot = pytest.importorskip("aot", reason="triton is not installed", exc_type=ImportError)
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
if os.environ.get("TRITON_INTERPRET") != "1":
    from contrastive_kernels.backends.triton import chunk, grad, launch, rows, sums, tile, tiles, views

PLAIN = dict(Q=1, COLUMNS=False, TERM="", BIASED=False, SHIFTED=False)
PLAIN |= dict(IDS=False, SAME=False, DIAGONAL=0, CUT=False, symmetric=False, SAVED=False)
# The epilogues that the losses ask for, those light and heavy on registers apart.
LIGHT = {
    "clip": dict(COLUMNS=True, DIAGONAL=1),
    "nt_xent": dict(DIAGONAL=2, symmetric=True),
    "ids": dict(IDS=True, symmetric=True),
    "siglip": dict(Q=0, TERM="softplus", SHIFTED=True),
}
HEAVY = {
    "hard_negative-band": dict(Q=2, IDS=True, symmetric=True, TERM="band"),
    "info_nce-columns-band": dict(COLUMNS=True, IDS=True, DIAGONAL=1, TERM="band"),
    "cutoff": dict(IDS=True, CUT=True),
    "bias": dict(IDS=True, symmetric=True, BIASED=True),
    "distance_hinge": dict(Q=0, TERM="distance_hinge", SHIFTED=True, DIAGONAL=1),
}
# Terms that are added up in the sweep of their gradients.
TOTALS = {
    "siglip": dict(Q=0, TERM="softplus", SHIFTED=True, DIAGONAL=1),
    "band": dict(Q=0, TERM="band", IDS=True, DIAGONAL=1, symmetric=True),
    "student": dict(Q=0, TERM="student", SHIFTED=True, DIAGONAL=1),
    "distance_hinge": dict(Q=0, TERM="distance_hinge", SHIFTED=True, DIAGONAL=1),
}
# The rest of the flags, on one architecture.
OTHERS = {
    "rows": {},
    "columns-alone": dict(Q=0, COLUMNS=True),
    "same": dict(IDS=True, SAME=True, DIAGONAL=1, symmetric=True),
    "clip-ids": dict(COLUMNS=True, IDS=True),
    "student": dict(Q=0, TERM="student", SHIFTED=True, DIAGONAL=1),
    # Not identity and count, whose weights do not depend on S: the one product left is serialized. Slow, not wrong.
    **{term: dict(Q=0, TERM=term, IDS=True) for term in ("square", "hinge", "gaussian")},
}
# What a specialized loop takes, and how many warps there are then.
SPECIALIZED = {
    "clip": LIGHT["clip"],
    "nt_xent": LIGHT["nt_xent"],
    "ids": LIGHT["ids"],
    "softplus": dict(Q=0, TERM="softplus"),
}
SPECIALIZED_WARPS = 12
ARCHITECTURES = (80, 90, 100, "gfx942")
EVERYTHING = "CONTRASTIVE_KERNELS_AOT_ALL"  # set: all epilogues on all architectures
RECORDING = "CONTRASTIVE_KERNELS_AOT_RECORD"  # set: write what was found as the new record
RECORD = Path(__file__).with_name("aot_record.json")
RECORDED, RECORDED_WITH = ("registers", "exponentials"), "3.6.0"


def triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def arguments(kernel, row, flags: dict, total: bool = False, twin: bool = False, **extra) -> dict:
    """The compile-time arguments of a kernel: block sizes, flags, None for the pointers that they switch off."""
    d = min(row.limit, 768)
    flags = PLAIN | flags
    precision = "ieee" if row.size == 2 or row.architecture == "gfx942" else "tf32x3"
    constants = row.blocks(d) | flags | extra | dict(D=d, PRECISION=precision, MAXIMUM=False, GROUP=8)
    constants |= dict(PAIR_SUM=row.pair_sum, TRIANGLE=flags["symmetric"], flag=None, d_bias=None)
    absent = {
        "IDS": ("x_ids", "y_ids"), "CUT": ("cutoff",), "BIASED": ("bias",), "SHIFTED": ("term_offset", "d_term_offset")
    }  # fmt: skip
    constants |= {name: None for flag, names in absent.items() if not flags[flag] for name in names}
    constants |= {} if flags["TERM"] in ("softplus", "student") else {"term_scale": None, "d_term_scale": None}
    constants |= {} if total else {"total": None}
    # two log-sum-exps of a pair take one exponential, or in another program two
    factored = row.kernel == "grad" and not flags["BIASED"] and (flags["COLUMNS"] or flags["symmetric"]) and flags["Q"]
    constants |= dict(FACTORED=bool(factored and not twin)) | ({} if factored else {"center": None})
    constants |= {} if row.takes_descriptors(d) else {"x_tiles": None, "y_tiles": None}
    constants |= {} if row.specialized or "dx" not in kernel.arg_names else {"x_tiles": None}
    if not flags["SAVED"] and row.kernel not in ("saved_sums", "saved_weights"):
        constants |= dict.fromkeys(("scores", "x_inverse", "y_inverse", "x_unit", "y_unit"))
    # a power of two for float16 only; the rows are compiled for bfloat16
    constants |= {"unit": None}
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


def variants(row, epilogues: dict) -> list:
    """(name, kernel, compile-time arguments) of the launches that use a row."""
    kernel = {
        "sums": sums._sums_fwd_kernel, "saved_sums": sums._sums_fwd_kernel, "safe_sums": sums._safe_sums_fwd_kernel,
        "grad": grad._grad_bwd_kernel, "total": grad._grad_bwd_kernel,
        "weights": chunk._weights_bwd_kernel, "saved_weights": chunk._weights_bwd_kernel,
    }[row.kernel]  # fmt: skip
    found = []
    for name, flags in epilogues.items():
        roles = dict(AS_ROWS=True, AS_COLUMNS=bool(flags.get("symmetric")))
        total = row.kernel == "total" or (row.kernel == "weights" and name in TOTALS and takes_heavy(row))
        constants = arguments(kernel, row, flags, total, **roles)
        found.append((name, kernel, constants))
        if constants.get("FACTORED") and row.architecture == 90:
            found.append((f"{name}-twin", kernel, arguments(kernel, row, flags, total, twin=True, **roles)))
    return found


def takes_heavy(row) -> bool:
    """Whether heavy epilogues get this row."""
    return tiles.find(row.kernel, row.architecture, row.size, row.limit, True) is row


def cases() -> list:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return []
    found = []
    for row in tiles.TABLE:
        if row.architecture not in ARCHITECTURES or (row.kernel.startswith("saved") and row.size == 4):
            continue
        epilogues = HEAVY if row.heavy else LIGHT
        if row.kernel == "sums":
            # ids are what is heavy here; without a heavy row the light one takes them
            demanding = ("ids",) if takes_heavy(row) and row.architecture != 90 else ("clip", "nt_xent")
            if row.architecture == 90:
                demanding += ("ids",)
            epilogues = {name: LIGHT[name] for name in demanding}
        elif row.kernel == "total":
            demanding = TOTALS if row.architecture == 90 else ("siglip", "distance_hinge")
            epilogues = {name: TOTALS[name] for name in demanding}
        elif (row.kernel, row.architecture) != ("grad", 90) and os.environ.get(EVERYTHING) is None:
            # The most demanding of them; all where tuning begins.
            demanding = "hard_negative-band" if row.heavy else "ids"
            epilogues = {demanding: epilogues[demanding]}
        if row.kernel not in ("sums", "saved_sums", "total") and takes_heavy(row):
            epilogues = epilogues | {"hard_negative-band": HEAVY["hard_negative-band"]}
        if row.kernel == "weights" and row.size == 2 and takes_heavy(row):
            epilogues = epilogues | {"siglip": TOTALS["siglip"]}
        if row.architecture == 90 and row.kernel == "grad" and row.size == 2 and row.limit == 128:
            epilogues = epilogues | OTHERS
        elif row.kernel == "saved_sums":
            epilogues = {"clip-ids": OTHERS["clip-ids"]}
        elif row.kernel == "saved_weights":
            epilogues = {"hard_negative-band": HEAVY["hard_negative-band"]}
        if row.kernel == "safe_sums" and row.size == 2 and row.architecture == 90:
            # similarities saved for the backward
            epilogues = epilogues | {f"{name}-saved": flags | dict(SAVED=True) for name, flags in epilogues.items()}
        found += [(row, *variant) for variant in variants(row, epilogues)]
    for architecture, d in ((90, 64), (90, 128), (100, 128)):
        row = replace(tiles.find("grad", architecture, 2, d, False), limit=d).specialize()
        demanding = SPECIALIZED if (architecture, d) == (90, 128) else ("nt_xent",)
        epilogues = {name: flags for name, flags in SPECIALIZED.items() if name in demanding}
        found += [
            (row, f"{name}-specialized", *rest)
            for name, *rest in variants(row, epilogues)
            if "twin" not in name  # takes the usual tile
        ]
    return found


def case_id(case) -> str:
    row, name, _, arguments = case
    return f"{row.kernel}-{row.architecture}-{'float32' if row.size == 4 else 'half'}-D{arguments['D']}-{name}"


def planned_exponentials(case) -> int:
    """How many a pair takes: one for each log-sum-exp and role, or for each exponent, and what the term has."""
    row, _, _, constants = case
    if row.kernel in ("sums", "saved_sums"):
        return 1
    term = dict(softplus=1, gaussian=1, student=2 if row.kernel == "total" else 1).get(constants["TERM"], 0)
    exponents = constants["Q"]
    if row.kernel == "safe_sums" or constants.get("FACTORED"):
        return exponents + term
    return exponents * (1 + constants["AS_COLUMNS"]) + constants["COLUMNS"] + term


def repeatable(name: str, key: str) -> bool:
    return key != "registers" or "-100-" not in name


def record() -> dict:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


@pytest.fixture(scope="module")
def binaries():
    """All of them compiled, two at a time: ptxas and LLVM release the interpreter."""
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
        numbers = {name: asdict(binary) for name, binary in found.items() if not isinstance(binary, Exception)}
        kept = {name: {key: of[key] for key in RECORDED if repeatable(name, key)} for name, of in numbers.items()}
        lines = [f" {json.dumps(name)}: {json.dumps(of)}" for name, of in kept.items()]
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return found


@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_binary(binaries, case):
    row, binary = case[0], binaries[case_id(case)]
    if isinstance(binary, Exception):
        raise binary
    assert binary.spilled == 0, binary
    assert binary.shared <= aot.SHARED[row.architecture], binary
    assert binary.tensor_memory <= 512, binary
    assert (binary.matrix_instructions > 0) == (row.kernel != "saved_weights"), binary
    assert not binary.warnings, binary
    assert binary.warps == (SPECIALIZED_WARPS if row.specialized else row.warps), binary

    threads = 64 * row.warps if row.architecture == "gfx942" else 32 * row.warps
    planned = planned_exponentials(case) * row.rows * row.columns // threads
    # A loop may appear twice, and a running maximum takes a few more; where tuning begins neither is expected.
    copies = (1,) if row.architecture == 90 else (1, 2)
    assert any(0 <= binary.exponentials - times * planned <= 8 for times in copies), (
        f"{binary.exponentials} exponentials a thread, {planned} are planned for its pairs: work is repeated"
    )


@pytest.mark.skipif(EVERYTHING in os.environ, reason="the record is of the usual cases")
@pytest.mark.skipif(triton_version() != RECORDED_WITH, reason=f"the record is of Triton {RECORDED_WITH}")
@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_binary_as_recorded(binaries, case):
    """Registers and exponentials as in `aot_record.json`, which `CONTRASTIVE_KERNELS_AOT_RECORD=1` writes anew.

    Not the registers of sm_100: the same source took 155 or 204, by what was compiled beside it. None may spill.
    """
    binary, recorded = binaries[case_id(case)], record().get(case_id(case))
    assert recorded, f"no record: run this file with {RECORDING}=1 and look at the difference"
    for name, before in recorded.items():
        now = getattr(binary, name)
        assert abs(now - before) <= 8 * (name == "registers"), (
            f"{name}: {now}, {before} are recorded; if that is wanted run this file with {RECORDING}=1"
        )


@pytest.mark.skipif(EVERYTHING in os.environ, reason="the record is of the usual cases")
def test_record_is_of_these_cases():
    assert set(record()) == set(map(case_id, cases()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_small_kernels(architecture):
    """Those without a row of the table."""
    for kernel, constants in (
        (tile._pack_bwd_kernel, dict(Q=2, BN=tiles.ALIGNMENT, unit=None)),
        (tile._center_bwd_kernel, dict(Q=2, COLUMNS=True, BN=launch.CENTER_ROWS)),
        (
            sums._fold_fwd_kernel,
            dict(BLOCK=128, TRIANGLE=True, ACCUMULATE=True, BN=sums.FOLD_ROWS, BS=sums.FOLD_SLOTS),
        ),
        (sums._merge_fwd_kernel, dict(Q=2, TERM="band", MAXIMUM=True, BN=sums.MERGE_ROWS)),
        (views._view_minimum_fwd_kernel, dict(D=128, BN=views.ROWS, BD=views.DEPTH)),
        (rows._unit_rows_fwd_kernel, dict(D=768, **rows.blocks(768))),
        (rows._unit_rows_bwd_kernel, dict(D=768, **rows.blocks(768))),
        (rows._row_dot_fwd_kernel, dict(D=768, **rows.blocks(768))),
        (rows._row_dot_bwd_kernel, dict(D=768, **rows.blocks(768))),
        (sums._largest_norm_fwd_kernel, dict(D=768, **rows.blocks(768))),
    ):
        assert aot.compile_kernel(kernel, architecture, torch.bfloat16, constants, {}).spilled == 0


@pytest.mark.parametrize("kernel", ["sums", "safe_sums", "weights"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "other", "interpreter"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("d", [1, 128, 256, 4096])
def test_table_complete(kernel, architecture, size, d):
    """A tile for every D of every kernel but grad, which chunk stands in for."""
    for heavy in (False, True):
        assert tiles.find(kernel, architecture, size, d, heavy)
    symmetric = tiles.find("sums", architecture, size, d, True)
    assert symmetric.rows == symmetric.columns, "the triangle needs square tiles"
    assert tiles.ALIGNMENT % max(symmetric.rows, tiles.find("weights", architecture, size, d, False).rows) == 0
