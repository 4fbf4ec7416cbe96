"""``python -m benchmarks``: time, memory and efficiency of the losses on this device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import plot, report
from .cases import ALL_PROVIDERS, CORE, LOSSES, PROVIDERS
from .run import Grid, Row, Settings, measure

DTYPES = ["float64", "float32", "float16", "bfloat16"]
# One loss of each other kind.
MORE = ["moco", "arcl", "lmcl", "sup_con", "hard_negative", "siglip", "spectral_contrastive"]
# Only large cases are compiled: the compilation of a small one would take most of its time.
PRESETS = {
    "quick": [Grid(LOSSES, [256], [64], providers=["ours", "ours-torch", "eager", "linear_cross_entropy"])],
    "demo": [
        Grid(CORE, [1024, 2048], providers=["ours", "eager", "linear_cross_entropy"]),
        Grid(CORE, [4096, 8192], providers=["ours", "eager", "compile", "linear_cross_entropy"]),
        Grid(CORE, [16384], providers=["ours"]),
        Grid(CORE, [4096], [512], providers=["ours", "eager", "linear_cross_entropy"]),
        Grid(["clip"], [4096], [512], [torch.bfloat16], providers=["ours", "eager", "autocast"]),
        Grid(MORE, [1024], providers=["ours", "eager"]),
    ],
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print the tables and write the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="a fixed list of cases instead of the next five options")
    parser.add_argument(
        "--losses", nargs="+", default=CORE, choices=[*LOSSES, "all"], metavar="LOSS", help=", ".join(LOSSES)
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, metavar="N", help="rows N (default: 1024 to 8192, for mmcl 128 to 512)"
    )
    parser.add_argument("--dims", nargs="+", type=int, default=[128], metavar="D", help="features D")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], choices=DTYPES, metavar="DTYPE", help=", ".join(DTYPES)
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        default=PROVIDERS,
        choices=ALL_PROVIDERS,
        metavar="PROVIDER",
        help=f"{', '.join(ALL_PROVIDERS)} (default: the first {len(PROVIDERS)})",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=1.5, help="timing budget of a case, shared by its providers")
    parser.add_argument("--min-rounds", type=int, default=3, help="least runs of each provider, whatever the budget")
    parser.add_argument("--memory-limit", type=float, default=8.0, help="GiB that a provider may take")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the CSV, JSON and PNG files")
    options = parser.parse_args(arguments)

    if options.threads:
        torch.set_num_threads(options.threads)
    losses = list(LOSSES) if "all" in options.losses else options.losses
    dtypes = [getattr(torch, dtype) for dtype in options.dtypes]
    grids = [Grid(losses, options.sizes, options.dims, dtypes, options.providers)]
    settings = Settings(torch.device(options.device), options.seconds, options.min_rounds, options.memory_limit)
    console = Console(width=None if sys.stdout.isatty() else 100)
    cases = [case for grid in (PRESETS[options.preset] if options.preset else grids) for case in grid]
    rows = [row for found in measure(cases, settings, console) for row in found]
    publish(rows, options.output, options.memory_limit, console)


def publish(rows: Sequence[Row], folder: Path, memory_limit_gib: float, console: Console) -> None:
    """Print the tables and write the CSV, the JSON and the pictures into ``folder``."""
    report.write(rows, folder)
    pictures = plot.draw(rows, folder)
    console.print(report.main_table(rows))
    for line in report.not_timed(rows):
        console.print(line, highlight=False)
    if batches := report.batch_table(rows, memory_limit_gib):
        console.print(batches)
    written = [folder / "results.csv", folder / "results.json", *pictures]
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
