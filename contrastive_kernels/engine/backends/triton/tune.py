"""``CONTRASTIVE_KERNELS_AUTOTUNE=1``: the first call of a kernel times the tiles around its row of the table.

The process then uses the fastest tile and prints the row to paste into `tiles`. Without the variable a tile is always
the table's. Candidates are timed, not checked: `tests/triton/test_interpret.py` does that, on a GPU as in the
interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from contrastive_kernels.engine import environment
from contrastive_kernels.engine.backends.triton.tiles import ALIGNMENT, Tile

ENVIRONMENT_VARIABLE = "CONTRASTIVE_KERNELS_AUTOTUNE"
# A move has to gain 2 %, so that noise moves nothing; at most so many tiles are tried.
GAIN, TRIALS = 0.98, 60

T = TypeVar("T")
_fastest: dict[tuple[object, ...], Tile] = {}


def is_on() -> bool:
    """Return whether the environment asks for tuning.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    return environment.choice(ENVIRONMENT_VARIABLE, environment.SWITCH) == "1"


def run(tile: Tile, x: Tensor, launch: Callable[[Tile], T], *, square: bool = False) -> T:
    """Return ``launch(tile)``, or with the variable set, the launch with the fastest tile.

    launch may be called any number of times before. `square` tiles stay square.
    """
    if is_on():
        key = (tile, square, x.dtype, x.shape[1], str(x.device))
        if key not in _fastest:
            _fastest[key] = _search(tile, x, launch, square)
        tile = _fastest[key]
    return launch(tile)


def neighbours(tile: Tile, square: bool) -> Iterator[Tile]:
    """Yield the tiles one step away from this one."""
    for stages in (tile.stages - 1, tile.stages + 1):
        if 1 <= stages <= 5:
            yield replace(tile, stages=stages)

    def steps(size: int, least: int, most: int) -> list[int]:
        return [other for other in (size // 2, size * 2) if least <= other <= most]

    if square:
        for size in steps(tile.height, 16, ALIGNMENT):
            yield replace(tile, height=size, width=size)
    else:
        for height in steps(tile.height, 16, ALIGNMENT):
            yield replace(tile, height=height)
        for width in steps(tile.width, 16, ALIGNMENT):
            yield replace(tile, width=width)
        if tile.width > 16 and tile.height < ALIGNMENT:
            yield replace(tile, height=2 * tile.height, width=tile.width // 2)
        if tile.height > 16 and tile.width < ALIGNMENT:
            yield replace(tile, height=tile.height // 2, width=2 * tile.width)
    if tile.depth is not None:
        for depth in steps(tile.depth, 16, 256):
            yield replace(tile, depth=depth)
    for warps in steps(tile.warps, 1, 16):
        yield replace(tile, warps=warps)


def _search(tile: Tile, x: Tensor, launch: Callable[[Tile], object], square: bool) -> Tile:
    """Return the fastest tile found downhill from the table's row, one step at a time."""
    times = {tile: milliseconds(tile, launch)}
    best, improved = tile, True
    while improved and len(times) < TRIALS:
        improved, center = False, best
        for other in neighbours(center, square):
            if other in times or len(times) >= TRIALS:
                continue
            times[other] = milliseconds(other, launch)
            if times[other] < GAIN * times[best]:
                best, improved = other, True
    where = torch.cuda.get_device_name(x.device) if x.is_cuda else str(x.device)
    found = f"{times[best]:.3g} ms, {times[tile]:.3g} before; {where}, N = {x.shape[0]}, D = {x.shape[1]}"
    row = replace(best, reason=f"measured: {found}", verified=())
    values = ", ".join(repr(getattr(row, name)) for name in row.__dataclass_fields__)
    print(f"    Tile({values}),", file=sys.stderr)
    return best


def milliseconds(tile: Tile, launch: Callable[[Tile], object]) -> float:
    """Return the median time of a launch; infinity for a tile that does not compile or fit."""
    import triton

    try:
        return float(triton.testing.do_bench(lambda: launch(tile), warmup=25, rep=100, return_mode="median"))
    except Exception as error:  # whatever the compiler or the driver raises for want of registers or memory
        if isinstance(error, torch.AcceleratorError):
            raise  # the device is lost
        return float("inf")
