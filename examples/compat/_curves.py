"""Train twice, with a library's loss and with ours, and show both curves side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["side_by_side"]

ROWS = 12  # of the table; a longer curve is thinned


def side_by_side(title: str, train: Callable[[Any], Sequence[float]], original: Any, ours: Any) -> float:
    """Train with both losses from one seed, print the two curves, and return their largest difference.

    Args:
        title: of the table.
        train: builds its model, trains it with the loss that it is given, and returns the loss of every step.
        original: the library's loss, its class, or whatever `train` takes.
        ours: the same of this package.
    """
    curves = []
    for loss in (original, ours):
        torch.manual_seed(0)
        curves.append([float(value) for value in train(loss)])
    differences = [abs(a - b) for a, b in zip(*curves, strict=True)]
    table = Table(title=title, box=box.SIMPLE_HEAD, caption=f"largest difference: {max(differences):.1e}")
    for header in ("step", "original", "ours", "difference"):
        table.add_column(header, justify="right")
    last = len(differences) - 1
    for step in sorted({round(i * last / (ROWS - 1)) for i in range(ROWS)}):
        values = f"{curves[0][step]:.6f}", f"{curves[1][step]:.6f}", f"{differences[step]:.1e}"
        table.add_row(str(step + 1), *values)
    Console().print(table)
    return max(differences)
