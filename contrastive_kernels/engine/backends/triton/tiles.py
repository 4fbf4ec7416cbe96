"""The tile table: how large the tiles of each kernel are on each architecture, and what limits them.

Registers and shared memory were read from binaries compiled ahead of time (`tests/triton/test_aot.py`). Nothing here
was timed: every row is `untuned` among those that its reason admits.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# Vectors are padded to, and chunks cut at, multiples of the largest tile side.
ALIGNMENT = 256

ANY = 1 << 31

# Of a multiprocessor of any NVIDIA GPU, 32 bits each.
REGISTERS = 1 << 16


def round_up(size: int, multiple: int) -> int:
    """Return the least multiple that is not less than size."""
    return -(-size // multiple) * multiple


@functools.cache
def _triton_version() -> str:
    """Return the installed version of Triton, under whichever name; empty without one."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


class Seen(NamedTuple):
    """Where the kernels of a row agreed with float64 in all the GPU tests."""

    device: str
    torch: str
    triton: str


@dataclass(frozen=True)
class Tile:
    """One row: for `kernel` on `architecture`, elements of `size` bytes, D up to `limit`.

    `height` is the side of the tile along N and `width` that along M, whatever the two are of. `depth` is how much of D
    is taken at a time, None for all of it. A row for a `large_epilogue` serves those that hold more than one pair of
    vectors per side: two exponents, a bias, a cutoff, a term beside a log-sum-exp; in "sums" ids, in "safe_sums" a
    maximum or scores to save. "total" is "grad" with a term's values added up beside its slopes; "weights" takes its
    rows for a large epilogue for that. A row is `verified` where its kernels were seen right; a change of the row takes
    that away. `maxnreg`: the registers of a thread are held down to so many, for as many programs at a time as that
    allows.

    A row that some version of Triton compiles to something slow or wrong serves the versions from `since` on, as far as
    `before`, and another one serves the others; each says in its reason what happened.
    """

    kernel: str
    architecture: int | str
    size: int
    large_epilogue: bool
    limit: int
    height: int
    width: int
    depth: int | None
    warps: int
    stages: int
    reason: str
    since: str = ""
    before: str = ""
    verified: tuple[Seen, ...] = ()
    maxnreg: int | None = None

    def is_verified(self) -> bool:
        """Return whether this row of the table was seen right on its architecture with the installed Triton."""
        return self in TABLE and any(seen.triton == _triton_version() for seen in self.verified)

    def serves(self, version: str) -> bool:
        """Return whether the row is for a version of Triton; a version that is not known counts as the newest."""

        def minor(version: str, otherwise: int) -> list[int]:
            return [int(number) for number in re.findall(r"\d+", version)[:2]] or [otherwise]

        return minor(self.since, 0) <= minor(version, ANY) < minor(self.before, ANY + 1)

    def blocks(self, d: int) -> dict[str, int]:
        """Return the block sizes as compile-time arguments."""
        return dict(BN=self.height, BM=self.width, BD=self.depth or max(16, 1 << (d - 1).bit_length()))

    def options(self) -> dict[str, int]:
        """Return the launch options."""
        options = dict(num_warps=self.warps, num_stages=self.stages)
        return options if self.maxnreg is None else options | dict(maxnreg=self.maxnreg)

    @property
    def programs(self) -> int:
        """How many programs a multiprocessor runs at a time, as far as that is known: those that `maxnreg` is for."""
        held = 0 if self.maxnreg is None else 32 * self.warps * round_up(self.maxnreg, 8)
        return max(1, REGISTERS // held) if held else 1

    def takes_descriptors(self, d: int) -> bool:
        """Return whether tiles are loaded by descriptors, which need no registers for addresses and masks.

        Most kernels load all that way: 128 registers instead of 191 for the forward of CLIP at D = 128 on sm_90, so
        that two programs share a multiprocessor. "grad" loads y that way, which spills at D = 256; "saved_weights"
        loads none. The interpreter emulates descriptors.
        """
        if self.kernel == "saved_weights" or (self.kernel in ("grad", "total") and d > 128):
            return False
        return self.architecture in (90, 100, "interpreter")

    @property
    def persistent(self) -> bool:
        """Whether a program of "weights" takes tile after tile, loading the next one under the epilogue.

        Where one program fills a multiprocessor and the loop spills nothing: on sm_100 and gfx942 it holds the epilogue
        twice, on sm_80 it is at the limit of registers.
        """
        where = self.architecture == "interpreter" or (self.architecture, self.size, self.warps) == (90, 2, 8)
        return self.kernel == "weights" and where

    @property
    def pair_sum(self) -> bool:
        """Whether a thread holds rows r and r + 8 of a tile: not where an accumulator row is a lane, nor on AMD."""
        return self.architecture in (80, 86, 90)


_CLAMPED = "registers: the next larger tile spills"
_SPLIT = "D does not stay in shared memory"
_ONE_PROGRAM = "held down to 128 registers, for two programs, it spills"
_PAIRS = "64-bit ids beside the column accumulator spill at 128 x 128"

ROWS = (
    Tile("sums", 80, 2, False, 256, 128, 128, None, 8, 2, "130 KB at D = 256"),
    Tile("sums", 80, 2, False, ANY, 128, 128, 64, 8, 3, _SPLIT),
    Tile("sums", 90, 2, True, 128, 128, 128, None, 8, 2, "ids: 205 registers; 0.9 KB spilled with 128"),
    Tile("sums", 90, 2, True, ANY, 128, 128, 64, 8, 3, "ids: 209 registers; 0.9 KB spilled with 128"),
    Tile("sums", 90, 2, False, 128, 128, 128, None, 8, 2, "97 KB", before="3.9", maxnreg=128),
    Tile("sums", 90, 2, False, 128, 128, 128, None, 8, 2, _ONE_PROGRAM, since="3.9"),
    Tile("sums", 90, 2, False, ANY, 128, 128, 64, 8, 3, "96 KB", before="3.9", maxnreg=128),
    Tile("sums", 90, 2, False, ANY, 128, 128, 64, 8, 3, _ONE_PROGRAM, since="3.9"),
    Tile("sums", 100, 2, True, 128, 64, 64, None, 4, 2, _PAIRS),
    Tile("sums", 100, 2, True, ANY, 64, 64, 64, 4, 3, _PAIRS),
    Tile("sums", 100, 2, False, 128, 128, 128, None, 8, 2, "97 KB"),
    Tile("sums", 100, 2, False, ANY, 128, 128, 64, 8, 3, "96 KB"),
    Tile("sums", "gfx942", 2, False, 128, 128, 128, None, 8, 2, "34 of 64 KB"),
    Tile("sums", "gfx942", 2, False, ANY, 128, 128, 64, 8, 2, _SPLIT),
    Tile("safe_sums", 80, 2, True, ANY, 64, 64, 64, 8, 3, _CLAMPED),
    Tile("safe_sums", 80, 2, False, 256, 128, 64, None, 8, 2, "97 KB at D = 256"),
    Tile("safe_sums", 80, 2, False, ANY, 64, 128, 64, 8, 3, _SPLIT),
    Tile("safe_sums", 90, 2, True, ANY, 128, 64, 64, 8, 3, _CLAMPED),
    Tile("safe_sums", 90, 2, False, 128, 128, 128, None, 8, 2, "96 KB", before="3.9", maxnreg=128),
    Tile("safe_sums", 90, 2, False, 128, 128, 128, None, 8, 2, _ONE_PROGRAM, since="3.9"),
    Tile("safe_sums", 90, 2, False, ANY, 128, 128, 64, 8, 3, "96 KB", before="3.9", maxnreg=128),
    Tile("safe_sums", 90, 2, False, ANY, 128, 128, 64, 8, 3, _ONE_PROGRAM, since="3.9"),
    Tile("safe_sums", 100, 2, True, ANY, 128, 64, 64, 8, 3, _CLAMPED),
    Tile("safe_sums", 100, 2, False, 256, 128, 64, None, 8, 2, "129 KB at D = 256"),
    Tile("safe_sums", 100, 2, False, ANY, 128, 128, 64, 8, 3, "96 KB"),
    Tile("safe_sums", "gfx942", 2, True, ANY, 128, 64, 64, 8, 2, "24 of 64 KB"),
    Tile("safe_sums", "gfx942", 2, False, 256, 64, 64, None, 4, 1, "32 of 64 KB at D = 256"),
    Tile("grad", 80, 2, True, 256, 64, 32, None, 8, 2, _CLAMPED),
    Tile("grad", 80, 2, False, 256, 64, 64, None, 8, 2, _CLAMPED),
    Tile("grad", 90, 2, True, 128, 64, 32, None, 4, 2, "64 x 64 spills with 4 warps, serializes wgmma (C7515) with 8"),
    Tile("grad", 90, 2, False, 128, 64, 128, None, 4, 2,
         "82 KB: one multiplies, one exponentiates; at D = 256 one program of 128 x 64 fits, and chunks are faster",
         before="3.9", maxnreg=255),
    Tile("grad", 90, 2, False, 128, 64, 64, None, 4, 2, "50 KB; the twin of 64 x 128 spills 30 bytes", since="3.9"),
    Tile("grad", 100, 2, True, 256, 64, 32, None, 8, 2, _CLAMPED),
    Tile("grad", 100, 2, False, 256, 128, 64, None, 8, 2, "all 512 columns of tensor memory at D = 256"),
    Tile("grad", "gfx942", 2, False, 128, 64, 64, None, 4, 1, "dX takes half of the registers"),
    Tile("total", 80, 2, True, 256, 64, 64, None, 8, 2, "74 KB at D = 256, 255 registers"),
    Tile("total", 90, 2, True, 128, 128, 64, None, 8, 2, "243 to 255 registers; 128 x 128 spills"),
    Tile("total", 100, 2, True, 128, 128, 64, None, 8, 2, "238 registers"),
    Tile("total", 100, 2, True, 256, 128, 32, None, 8, 2, "all 512 columns of tensor memory"),
    Tile("total", "gfx942", 2, True, 128, 64, 64, None, 4, 1, "272 of 512 registers"),
    Tile("weights", 80, 2, True, ANY, 64, 64, 64, 8, 3, _CLAMPED),
    Tile("weights", 80, 2, False, ANY, 128, 128, 64, 8, 3, "64 KB, 255 registers"),
    Tile("weights", 90, 2, True, ANY, 128, 64, 64, 8, 3, _CLAMPED),
    Tile("weights", 90, 2, False, ANY, 128, 128, 64, 8, 3, "96 KB, 255 registers"),
    Tile("weights", 100, 2, True, ANY, 128, 64, 64, 8, 3, _CLAMPED),
    Tile("weights", 100, 2, False, ANY, 64, 64, 64, 8, 3, "80 registers; at 128 x 64 ptxas stops at 128 and spills"),
    Tile("weights", "gfx942", 2, True, ANY, 128, 64, 64, 8, 2, _CLAMPED),
    Tile("weights", "gfx942", 2, False, ANY, 128, 128, 64, 8, 2, "32 of 64 KB"),
    # Scores to be saved, in registers beside the column accumulator and 64-bit ids. Read again there is no product:
    # small tiles, so that many loads are under way.
    Tile("saved_sums", 80, 2, False, ANY, 64, 64, 64, 8, 3, _CLAMPED),
    Tile("saved_sums", 80, 4, False, ANY, 64, 32, 32, 8, 2, _CLAMPED),
    *(Tile("saved_sums", name, 2, False, ANY, 128, 64, 64, 8, 3, _CLAMPED) for name in (90, 100)),
    Tile("saved_sums", "gfx942", 2, False, ANY, 128, 64, 64, 8, 2, "24 of 64 KB"),
    *(Tile("saved_sums", name, 4, False, ANY, 64, 64, 32, 4, 2, _CLAMPED) for name in (90, 100, "gfx942")),
    *(Tile("saved_sums", "other", size, False, ANY, 64, 32, 32, 4, 2, "untuned: what fits anywhere")
      for size in (2, 4)),
    *(Tile("saved_weights", name, size, False, ANY, 64, 64, 64, 8, 2, "untuned: 16 pairs a thread")
      for name in (80, 90, 100, "gfx942", "other") for size in (2, 4)),
    *(Tile(kernel, "interpreter", size, False, ANY, 32, 32, 256, 1, 1, "tests")
      for kernel in ("saved_sums", "saved_weights") for size in (2, 4)),
    # float32: three TF32 products hold three times the operands; with dX beside them every epilogue but the lightest
    # spills, so there is no "grad".
    Tile("sums", 80, 4, False, ANY, 64, 64, 32, 8, 2, _CLAMPED),
    *(Tile("sums", name, 4, False, ANY, 64, 64, 32, 4, 2, _CLAMPED) for name in (90, 100, "gfx942")),
    *(Tile("safe_sums", name, 4, False, ANY, 64, 64, 32, 4, 2, _CLAMPED) for name in (80, 90, 100, "gfx942")),
    *(Tile("weights", name, 4, False, ANY, 64, 64, 32, 4, 2, _CLAMPED) for name in (80, 90, "gfx942")),
    Tile("weights", 100, 4, False, ANY, 64, 64, 32, 8, 2, _CLAMPED),
    # Other GPUs, of at least 64 KB of shared memory.
    *(Tile(kernel, "other", size, False, ANY, 64, 64, 32, 4, 2, "untuned: what fits anywhere")
      for kernel in ("sums", "safe_sums", "weights") for size in (2, 4)),
    *(Tile(kernel, "other", 2, False, 128, 64, 32, None, 8, 2, "untuned: what fits anywhere")
      for kernel in ("grad", "total")),
    # The interpreter: small, so that small tests have several tiles, ragged ones, and more than one step of depth.
    *(Tile(kernel, "interpreter", size, False, ANY, 32, 32, 256, 1, 1, "tests")
      for kernel in ("sums", "safe_sums", "weights") for size in (2, 4)),
    *(Tile(kernel, "interpreter", size, False, 256, 32, 32, None, 1, 1, "tests")
      for kernel in ("grad", "total") for size in (2, 4)),
)  # fmt: skip

# GPUs with the matrix instructions of sm_80 and 99 KB of shared memory take those of its rows that fit.
ROWS += tuple(
    replace(row, architecture=86, limit=128 if (row.kernel, row.limit) == ("sums", 256) else row.limit)
    for row in ROWS
    if row.architecture == 80
)
# Those for the installed Triton.
TABLE = tuple(row for row in ROWS if row.serves(_triton_version()))
# What takes the rows of another architecture.
ALIKE = {103: 100, 87: 80, 89: 86, 120: 86, 121: 86}


@functools.cache
def _architecture(device: torch.device) -> int | str:
    if device.type != "cuda":
        return "interpreter"
    name: int | str
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        name = ALIKE.get(10 * major + minor, 10 * major + minor)
    return name if any(row.architecture == name for row in TABLE) else "other"


@functools.cache
def find(kernel: str, architecture: int | str, size: int, d: int, large_epilogue: bool) -> Tile | None:
    """Return the row that applies, of the other kind of epilogue if it has none of its own; None: not this kernel."""
    rows = [r for r in TABLE if (r.kernel, r.architecture, r.size) == (kernel, architecture, size) and d <= r.limit]
    return min(rows, key=lambda row: row.large_epilogue != large_epilogue, default=None)


def find_for(kernel: str, x: Tensor, large_epilogue: bool) -> Tile | None:
    """Return the tile for rows like those of x on its device; None: not this kernel."""
    return find(kernel, _architecture(x.device), x.element_size(), x.shape[1], large_epilogue)


def pick(kernel: str, x: Tensor, large_epilogue: bool) -> Tile:
    """Return the tile of a kernel that takes rows like those of x."""
    tile = find_for(kernel, x, large_epilogue)
    assert tile is not None, f"no tile of {kernel} for {x.dtype} rows of {x.shape[1]} on {x.device}"
    picked = _picked.get()
    if picked is not None:
        picked.add(tile)
    return tile


# Pairs of a sweep below which the PyTorch backend is faster, by architecture. Measured on none yet: the part "small" of
# `python -m benchmarks.gpu` prints the number.
CROSSOVER: dict[int | str, int] = {}


def is_small(x: Tensor, pairs: int) -> bool:
    """Return whether PyTorch is faster for so many pairs on the device of x.

    Never within a compiled program, which serves other sizes too.
    """
    if not CROSSOVER or torch.compiler.is_compiling():
        return False
    return pairs < CROSSOVER.get(_architecture(x.device), 0)


def verified_rows(device: torch.device) -> tuple[int, int]:
    """Return how many rows of a device's architecture are verified, and how many there are."""
    rows = [row for row in TABLE if row.architecture == _architecture(device)]
    return sum(row.is_verified() for row in rows), len(rows)


# Among how many programs a gradient kernel shares each walk, if a comparison decides that and not the sizes.
splits: ContextVar[int | None] = ContextVar("splits", default=None)


@contextmanager
def split(into: int | None) -> Iterator[None]:
    """Let so many programs share each walk of a gradient kernel within the context; None: as many as fit."""
    token = splits.set(into)
    try:
        yield
    finally:
        splits.reset(token)


_picked: ContextVar[set[Tile] | None] = ContextVar("picked", default=None)


@contextmanager
def noted() -> Iterator[set[Tile]]:
    """Collect the rows that are picked within the context."""
    picked: set[Tile] = set()
    token = _picked.set(picked)
    try:
        yield picked
    finally:
        _picked.reset(token)
