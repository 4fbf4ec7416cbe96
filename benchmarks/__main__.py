"""``python -m benchmarks``: time, memory and efficiency of the losses on this device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import peers, report
from .cases import ALL_PROVIDERS, CORE, LOSSES, PROVIDERS
from .options import add_without_cpp, at_least, refuse_without_cpp
from .run import Grid, Row, Settings, measure

DTYPES = ["float64", "float32", "float16", "bfloat16"]
# One loss of each other kind.
MORE = ["moco", "arcl", "lmcl", "sup_con", "hard_negative", "siglip", "spectral_contrastive"]
LIBRARIES_OF = {
    loss: [name for name, library in peers.LIBRARIES.items() if loss in library.losses]
    for loss in LOSSES
    if any(loss in library.losses for library in peers.LIBRARIES.values())
}
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
    # Every loss that a library has, beside ours; those that are not installed are named.
    "peers": [
        Grid([loss], [256, 1024, 4096, 8192], providers=["ours", "eager", *libraries])
        for loss, libraries in LIBRARIES_OF.items()
    ],
    "large": [Grid(["clip"], [8192, 16384, 32768, 65536], providers=["ours"])],
}


# What a preset fixes, and the default of each option.
CASES = {
    "losses": list(CORE),
    "sizes": None,
    "dims": [128],
    "dtypes": ["float32"],
    "providers": list(PROVIDERS),
}


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except Exception as error:  # unknown, not compiled in, no such index
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from error
    return device


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print the tables and write the files; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="a fixed list of cases instead of the next five options")
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=[*LOSSES, "all"],
        metavar="LOSS",
        help=f"{', '.join(LOSSES)}, all (default: {', '.join(CORE)})",
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, metavar="N", help="rows N (default: 1024 to 8192, for mmcl 128 to 512)"
    )
    parser.add_argument("--dims", nargs="+", type=at_least(1, int), metavar="D", help="features D (default: 128)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: float32)"
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=ALL_PROVIDERS,
        metavar="PROVIDER",
        help=f"{', '.join(ALL_PROVIDERS)} (default: the first {len(PROVIDERS)})",
    )
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=at_least(1, int), help="CPU threads (default: torch's own choice)")
    parser.add_argument(
        "--seconds", type=at_least(0, float), default=1.5, help="timing budget of a case, shared by its providers"
    )
    parser.add_argument(
        "--min-rounds", type=at_least(1, int), default=3, help="least runs of each provider, whatever the budget"
    )
    parser.add_argument("--memory-limit", type=at_least(0, float), default=8.0, help="GiB that a provider may take")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the CSV, JSON and PNG files")
    add_without_cpp(parser)
    options = parser.parse_args(arguments)
    refuse_without_cpp(parser, options, options.device)
    console = Console(width=None if sys.stdout.isatty() else 100)
    given = [name for name in CASES if getattr(options, name) is not None]
    if options.preset and given:
        ignored = ", ".join(f"--{name}" for name in given)
        console.print(f"--preset {options.preset} ignores {ignored}", highlight=False)
    try:
        earlier = report.read(options.output)
        options.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, TypeError) as error:  # no folder, no JSON, or columns of another version
        parser.error(f"--output {options.output} cannot be read or written: {error}")

    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = {name: getattr(options, name) or default for name, default in CASES.items()}
    losses = list(LOSSES) if "all" in chosen["losses"] else chosen["losses"]
    dtypes = [getattr(torch, dtype) for dtype in chosen["dtypes"]]
    grids = [Grid(losses, chosen["sizes"], chosen["dims"], dtypes, chosen["providers"])]
    settings = Settings(options.device, options.seconds, options.min_rounds, options.memory_limit)
    cases = [case for grid in (PRESETS[options.preset] if options.preset else grids) for case in grid]

    rows: list[Row] = []
    interrupted = False
    try:
        for found in measure(cases, settings, console):
            rows += found
            report.write(report.merge(earlier, rows), options.output)
    except KeyboardInterrupt:
        interrupted = True
        console.print("Interrupted; the finished cases are written.", highlight=False)
    kept = len(report.merge(earlier, rows)) - len(rows)
    if earlier:
        console.print(
            f"Of {len(earlier)} earlier rows in {options.output}, {kept} are kept and {len(earlier) - kept} replaced.",
            highlight=False,
            soft_wrap=True,
        )
    if rows:
        publish(rows, report.merge(earlier, rows), options.output, options.memory_limit, console)
    if interrupted:
        return 130
    return 0 if report.timed(rows) else 1


def publish(
    rows: Sequence[Row], in_folder: Sequence[Row], folder: Path, memory_limit_gib: float, console: Console
) -> None:
    """Print the tables of a run, and draw the pictures of all rows that are written in ``folder``."""
    if report.timed(rows):
        console.print(report.main_table(rows))
    for line in report.not_timed(rows):
        console.print(line, highlight=False)
    if batches := report.batch_table(rows, memory_limit_gib):
        console.print(batches)
    written = [folder / "results.csv", folder / "results.json", *report.draw(in_folder, folder, console)]
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
