"""A cost model of the Triton kernels on an H100 in bfloat16. Everything here is predicted, nothing was measured.

A step is its sweeps, the library's products of chunks, the traffic of their sums, and small kernels; outside a CUDA
graph it takes at least as long as the host needs to launch it. A sweep is tiles: each multiplies on the matrix unit,
then works on its pairs, and loads its rows from L2. `BEFORE` and `AFTER` are two designs of the kernels. Each constant
says where it comes from; none was chosen for the times that come out. Errors of 15 % are likely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

# An H100 SXM: multiprocessors, and the clock that matrix products leave it (919 of 989 TFLOP/s), not the highest.
PROCESSORS, CLOCK = 132, 1.7e9
# Of a multiprocessor in a cycle, by the data sheet: FLOP of the matrix unit, special functions such as exponentials,
# instructions of one thread (4 warps), bytes of shared memory.
FLOP, SPECIAL, ISSUE, SHARED = 4096, 16, 128, 128
# Bytes that L2 gives each multiprocessor in a cycle while all ask: a published GEMM in FP8 with tiles of 128 x 128,
# which multiplies 128 FLOP for a byte, reaches 1,278 TFLOP/s.
L2 = 43
# Bytes a second of device memory: 90 % of the data sheet, and what elementwise code reaches of that.
MEMORY = 3.0e12
ELEMENTWISE = 0.85 * MEMORY
# FLOP a second of cuBLAS on chunks, two thirds of the peak: about what the published 48.8 ms of siglip-kernel at 65,536
# rows leave for its products. It is assumed to fill the device whatever the chunk, which flatters strips of few rows.
CUBLAS = 620e12
# FLOP a second of Inf-CL's kernels, TF32 in tiles of 32 rows: 15 % of the peak, a guess from reading them.
INF_CL = 74e12
# Two programs on a multiprocessor hide all but this part of the shorter of products and work on pairs: with it the
# model gives Triton's attention with alternating warps its published 526 TFLOP/s at D = 128.
EXPOSED = 0.45
# Cycles of a tile that a lone program waits: twice 100 until a product fills its pipe, and what the loads of the next
# tile, begun after the first product, take longer than the second one.
STALL = 350
# The same of a program that computes one tile: start and first loads 900, statistics and stores 600, its end 400.
TURNOVER = 1900
# Seconds of a small kernel with the gap before it; passes over the rows in bfloat16 (norms, row dots, gradients).
SMALL_KERNEL, PASSES = 3e-6, 16
MIB = 2**20
ANY = 1 << 31


@dataclass(frozen=True)
class Work:
    """What a thread does for 64 pairs beside products: special functions and instructions.

    Counted in the assembly of sm_90 (Triton 3.6.0): in a loop on its shortest way around, which leaves out the masks of
    ragged and diagonal tiles.
    """

    special: int
    instructions: int


@dataclass(frozen=True)
class Kernel:
    """A tile, how many programs share a multiprocessor, and what it takes.

    `products` of 2·D FLOP a pair; `resident`: one side stays on the chip, else both are loaded for each tile; `walks`:
    a program visits many tiles, else one; `overlaps`: the loads of the next tile run under the work on this one.
    """

    height: int
    width: int
    programs: int
    work: Work
    products: int = 1
    resident: bool = False
    walks: bool = True
    overlaps: bool = False

    def cycles(self, d: int, alone: bool = False) -> float:
        """Return the cycles of a multiprocessor for a tile while it runs all its programs, or one that is alone."""
        pairs = self.height * self.width
        product = 2 * pairs * d / FLOP
        loaded = 2 * d * (self.width if self.resident else self.height + self.width)
        # Both operands of S are read from shared memory, the second at 64 bytes a cycle, the first at 32 for 128
        # columns and twice that for half as many; what is loaded is written there as well.
        read = (64 + 32 * 128 / self.width) * product
        products = max(product, (read + loaded) / SHARED) + (self.products - 1) * product
        work = pairs / 64 * max(self.work.special / SPECIAL, self.work.instructions / ISSUE)
        if self.programs > 1 and not alone:
            busy = max(products, work) + EXPOSED * min(products, work)
        else:
            busy = products + work + (0 if self.overlaps else STALL if self.walks else TURNOVER)
        return max(busy, loaded / L2)

    def seconds(self, n: int, m: int, d: int, split: bool = True) -> float:
        """Return the time for N x M pairs; without `split` one program walks along all of M, however few there are."""
        blocks, steps = math.ceil(n / self.height), math.ceil(m / self.width)
        if not self.walks:
            blocks, steps = blocks * steps, 1
        splits = min(steps, math.ceil(2 * PROCESSORS / blocks)) if split else 1
        full, rest = divmod(math.ceil(blocks * splits / PROCESSORS), self.programs)
        cycles = full * self.programs * self.cycles(d)
        if rest:
            cycles += max(rest * self.cycles(d), self.cycles(d, alone=True))
        return math.ceil(steps / splits) * cycles / CLOCK


@dataclass(frozen=True)
class Sweeps:
    """What a loss asks for: kernels by name, as `Design` has them, and products of chunks in units of 2·N·M·D FLOP.

    `triangle`: the sums and the weights take half of the pairs.
    """

    sums: str | None
    gradients: tuple[str, ...]
    weights: str
    products: int
    triangle: bool = False


LOSSES = {
    "clip": Sweeps("sums", ("gradient", "gradient"), "weights", 2),
    "nt_xent": Sweeps("symmetric sums", ("gradient",), "weights", 1, triangle=True),
    "info_nce": Sweeps("row sums", ("row gradient", "row gradient"), "row weights", 2),
    "moco": Sweeps("row sums", ("row gradient",), "row weights", 1),
    # Value and gradients in one sweep.
    "siglip": Sweeps(None, ("sigmoid total", "sigmoid gradient"), "sigmoid weights", 2),
}


@dataclass(frozen=True)
class Design:
    """Kernels by name and by the largest D that each serves, and what else decides the time of a step.

    `splits`: gradient kernels share a walk where there are few rows. `squares`: chunks are square, and the gradients of
    both sides are added to, else they are strips of rows, and that of the columns is. `launches` of small kernels;
    `host`, the seconds in which a step is launched.
    """

    kernels: Mapping[str, Mapping[int, Kernel]]
    splits: bool
    squares: bool
    launches: int
    host: float

    def kernel(self, name: str, d: int) -> Kernel | None:
        """Return the kernel for D, None where the gradient is made by chunks."""
        return next((kernel for limit, kernel in self.kernels[name].items() if d <= limit), None)


@dataclass(frozen=True)
class Step:
    """The seconds of forward and backward: what the device does one after the other, and the host beside it."""

    sums: float
    gradients: float
    products: float
    traffic: float
    small: float
    host: float

    @property
    def device(self) -> float:
        """What a CUDA graph takes."""
        return self.sums + self.gradients + self.products + self.traffic + self.small

    @property
    def total(self) -> float:
        """What a call takes."""
        return max(self.device, self.host)


def step(loss: str, n: int, m: int, d: int, design: Design, limit: int = 512 * MIB) -> Step:
    """Return the prediction for N rows of D features against M, with so many bytes of scratch memory."""
    asked, pairs = LOSSES[loss], n * m
    share = 0.5 if asked.triangle else 1.0
    sums = products = traffic = 0.0
    if asked.sums is not None:
        kernel = design.kernel(asked.sums, d)
        # The sums of each row over the columns of a tile are written and read again.
        partial = 0 if asked.sums == "row sums" else 8 * pairs / kernel.height / MEMORY
        sums = share * (kernel.seconds(n, m, d) + partial)
    if design.kernel(asked.gradients[0], d):
        gradients = sum(_gradient(design, name, n, m, d) for name in asked.gradients)
    else:
        gradients = share * design.kernel(asked.weights, d).seconds(n, m, d)
        # Each product reads all of G.
        products = asked.products * max(2 * pairs * d / CUBLAS, 2 * pairs / MEMORY)
        # Float32 sums of D numbers, read and written for each row or column of each chunk of bfloat16.
        side = math.isqrt(limit // 2) if design.squares else limit // 2 / m
        both = 2 if design.squares and asked.products == 2 else 1
        traffic = share * both * 8 * d * pairs / min(side, n) / MEMORY
    small = design.launches * SMALL_KERNEL + PASSES * 2 * n * d / MEMORY
    return Step(sums, gradients, products, traffic, small, design.host)


def _gradient(design: Design, name: str, n: int, m: int, d: int) -> float:
    """Return the time of a gradient kernel, and of adding up its parts where programs share a walk."""
    kernel = design.kernel(name, d)
    blocks = math.ceil(n / kernel.height)
    split = design.splits and blocks < PROCESSORS * kernel.programs
    parts = math.ceil(2 * PROCESSORS / blocks) if split else 0
    return kernel.seconds(n, m, d, split=split) + parts * n * d * 8 / MEMORY


_SUMS, _ONLINE, _ONE, _ROWS, _SIGMOID = Work(64, 348), Work(68, 596), Work(64, 605), Work(64, 311), Work(128, 956)
_TOTAL = Work(128, 1810)
_RESIDENT = Kernel(128, 128, 2, _SUMS, resident=True)
_STEPS = Kernel(128, 128, 2, _SUMS)
_GRADIENT = Kernel(128, 128, 1, _ONE, products=2, resident=True)
_CHUNKED = Kernel(128, 128, 1, Work(128, 925), walks=False)
# At D = 256 rows are loaded without descriptors: addresses are instructions.
_WIDE = Work(64, 954)

BEFORE = Design(
    kernels={
        "sums": {128: _RESIDENT, ANY: _STEPS},
        # 143 registers
        "symmetric sums": {128: replace(_RESIDENT, programs=1), ANY: _STEPS},
        "row sums": {
            128: Kernel(128, 64, 3, _ONLINE, resident=True),
            256: Kernel(128, 64, 1, _ONLINE, resident=True),
            ANY: Kernel(128, 64, 3, _ONLINE),
        },
        "gradient": {128: _GRADIENT, 256: Kernel(128, 64, 1, _WIDE, products=2, resident=True)},
        "row gradient": {
            128: replace(_GRADIENT, work=_ROWS),
            256: Kernel(128, 64, 1, _WIDE, products=2, resident=True),
        },
        "sigmoid gradient": {
            128: replace(_GRADIENT, work=_SIGMOID),
            256: Kernel(128, 64, 1, _SIGMOID, products=2, resident=True),
        },
        "sigmoid total": {
            128: Kernel(128, 64, 1, _TOTAL, products=2, resident=True),
            256: Kernel(128, 32, 1, _TOTAL, products=2, resident=True),
        },
        "weights": {ANY: _CHUNKED},
        "row weights": {ANY: replace(_CHUNKED, work=Work(64, 541))},
        "sigmoid weights": {ANY: Kernel(128, 64, 1, Work(128, 2254), walks=False)},
    },
    splits=False,
    squares=False,
    launches=40,
    # 20 launches of Triton at 9 to 28 µs and descriptors, timed on a CPU; 20 of torch and the operators, estimated.
    host=0.6e-3,
)

_PAIRED = Kernel(64, 128, 2, _ONE, products=2, resident=True)
_FLOWING = Kernel(128, 128, 1, Work(64, 733), walks=False, overlaps=True)

AFTER = replace(
    BEFORE,
    kernels={
        **BEFORE.kernels,
        "symmetric sums": {128: _RESIDENT, ANY: _STEPS},
        "row sums": {128: replace(_RESIDENT, work=_ONLINE), ANY: replace(_STEPS, work=_ONLINE)},
        "gradient": {128: _PAIRED},
        "row gradient": {128: replace(_PAIRED, work=_ROWS)},
        "sigmoid gradient": {128: replace(_PAIRED, work=_SIGMOID)},
        "sigmoid total": {128: BEFORE.kernels["sigmoid total"][128]},
        "weights": {ANY: _FLOWING},
        "row weights": {ANY: replace(_FLOWING, work=Work(64, 541))},
        # the instructions of a program for one tile: one that goes on has no more
        "sigmoid weights": {ANY: replace(BEFORE.kernels["sigmoid weights"][ANY], overlaps=True)},
    },
    splits=True,
    squares=True,
    launches=35,
    # The same with launches of Triton at 8 µs, of which the arguments are no longer bound.
    host=0.3e-3,
)


# Bytes that the eager and the compiled form of a loss read and write for each pair beside its three products: counted
# from the tensors of each operation.
_DENSE_BYTES = {
    ("clip", "eager"): 34,
    ("clip", "autocast"): 86,
    ("clip", "compile"): 12,
    ("nt_xent", "eager"): 28,
    ("nt_xent", "autocast"): 52,
    ("nt_xent", "compile"): 6,
}
LIMITS = {"ours": 512 * MIB, "ours-512MB": 512 * 10**6, "ours-128MB": 128 * 10**6, "graph": 512 * MIB}


def seconds(loss: str, provider: str, n: int, m: int, d: int) -> float | None:
    """Return the prediction for forward and backward by a provider of the benchmark; None outside the model."""
    pairs = n * m
    if provider in LIMITS and loss in LOSSES:
        found = step(loss, n, m, d, AFTER, LIMITS[provider])
        return found.device if provider == "graph" else found.total
    if (loss, provider) == ("clip", "inf-cl"):
        return 10 * 2 * pairs * d / INF_CL
    if (loss, provider) in _DENSE_BYTES:
        product = max(2 * pairs * d / CUBLAS, 2 * pairs / MEMORY)
        return _DENSE_BYTES[loss, provider] * pairs / ELEMENTWISE + 3 * product
    return None
