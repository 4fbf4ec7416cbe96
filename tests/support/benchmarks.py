"""What the tests of the benchmarks share: a measured row, and the rows of a report's tables."""

import torch

from benchmarks import run

CPU = torch.device("cpu")


def row(loss="clip", provider="ours", mode="both", n=32768, d=128, ms=2.0, mib=100.0, device="GPU A", note="", **more):
    timed = None if note else ms
    return run.Row(
        loss=loss, provider=provider, mode=mode, n=n, m=n, d=d, dtype="bfloat16", device=device, threads=1,
        ms_50=timed, ms_20=timed, ms_80=timed, peak_mib=None if note else mib, tflops=1.0, matmul_fraction=0.5,
        torch="2", triton="3", commit="c", date="2026-01-01", note=note, **more,
    )  # fmt: skip


def cells(text, *start):
    """Return the table rows of a report that begin with these cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [cells for cells in rows if cells[: len(start)] == list(start)]


def same(n):
    return n
