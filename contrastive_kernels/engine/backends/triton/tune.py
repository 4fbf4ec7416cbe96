"""``CONTRASTIVE_KERNELS_AUTOTUNE=1``: the first call of a kernel times the tiles around its row of the table.

It then uses the fastest for the rest of the process and prints the row to paste into `tiles`. Without the variable a
tile is always the table's. A specialized loop (see `tiles.Tile`) is tried where one is possible; what is tried is
timed, not checked: the tests do that (`test_interpret.py`, on a GPU as in the interpreter).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from contrastive_kernels.engine.backends.triton.tiles import ALIGNMENT, Tile

ENVIRONMENT_VARIABLE = "CONTRASTIVE_KERNELS_AUTOTUNE"
# What has to be gained for a move, so that noise moves nothing, and how many tiles are tried at most.
GAIN, TRIALS = 0.98, 60

T = TypeVar("T")
_fastest: dict[tuple, Tile] = {}


def run(tile: Tile, x: Tensor, launch: Callable[[Tile], T], *, square: bool = False, specializable: bool = False) -> T:
    """``launch(tile)``, or with the variable set, launch with the fastest tile, after many others.

    So it may be called any number of times. `square` tiles stay square; `specializable` ones may become specialized.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "1":
        key = (tile, square, specializable, x.dtype, x.shape[1], str(x.device))
        if key not in _fastest:
            _fastest[key] = _search(tile, x, launch, square, specializable)
        tile = _fastest[key]
    return launch(tile)


def neighbours(tile: Tile, square: bool, specializable: bool) -> Iterator[Tile]:
    """Tiles one step away from this one."""
    for stages in (tile.stages - 1, tile.stages + 1):
        if 1 <= stages <= 5:
            yield replace(tile, stages=stages)
    if tile.specialized:
        return  # in all else it is as it must be
    if specializable:
        yield tile.specialize()

    def steps(size: int, least: int, most: int) -> list[int]:
        return [other for other in (size // 2, size * 2) if least <= other <= most]

    if square:
        for size in steps(tile.rows, 16, ALIGNMENT):
            yield replace(tile, rows=size, columns=size)
    else:
        for rows in steps(tile.rows, 16, ALIGNMENT):
            yield replace(tile, rows=rows)
        for columns in steps(tile.columns, 16, ALIGNMENT):
            yield replace(tile, columns=columns)
        if tile.columns > 16 and tile.rows < ALIGNMENT:
            yield replace(tile, rows=2 * tile.rows, columns=tile.columns // 2)
        if tile.rows > 16 and tile.columns < ALIGNMENT:
            yield replace(tile, rows=tile.rows // 2, columns=2 * tile.columns)
    if tile.depth is not None:
        for depth in steps(tile.depth, 16, 256):
            yield replace(tile, depth=depth)
    for warps in steps(tile.warps, 1, 16):
        yield replace(tile, warps=warps)


def _search(tile: Tile, x: Tensor, launch: Callable[[Tile], object], square: bool, specializable: bool) -> Tile:
    """Downhill from the table's row, one step at a time."""
    times = {tile: milliseconds(tile, launch)}
    best, improved = tile, True
    while improved and len(times) < TRIALS:
        improved, center = False, best
        for other in neighbours(center, square, specializable):
            if other in times or len(times) >= TRIALS:
                continue
            times[other] = milliseconds(other, launch)
            if times[other] < GAIN * times[best]:
                best, improved = other, True
    where = torch.cuda.get_device_name(x.device) if x.is_cuda else str(x.device)
    found = f"{times[best]:.3g} ms, {times[tile]:.3g} before; {where}, N = {x.shape[0]}, D = {x.shape[1]}"
    row = replace(best, reason=f"measured: {found}")
    values = ", ".join(repr(getattr(row, name)) for name in row.__dataclass_fields__)
    print(f"    Tile({values}),", file=sys.stderr)
    return best


def milliseconds(tile: Tile, launch: Callable[[Tile], object]) -> float:
    """The median of a launch; infinite for a tile that does not compile or fit."""
    import triton

    try:
        return triton.testing.do_bench(lambda: launch(tile), warmup=25, rep=100, return_mode="median")
    except Exception as error:  # whatever the compiler or the driver raises for want of registers or memory
        if isinstance(error, torch.AcceleratorError):
            raise  # the device is lost
        return float("inf")
