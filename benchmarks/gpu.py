"""``python -m benchmarks.gpu``: the GPU tests, then the GPU benchmark; everything is left in one folder.

It runs in parts (``--parts d128 d256``), each of which adds to what the folder holds already.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import report
from .__main__ import publish
from .run import Grid, Row, Settings, environment, measure

LOSSES = ("clip", "nt_xent")
BASELINES = ("eager", "autocast")
AIM_N = 32768
DIMS = (128, 256, 512, 1024)
PARTS = {
    f"d{d}": [
        Grid(LOSSES, [8192, 16384, 65536], [d], [torch.bfloat16], ["ours", *BASELINES]),
        Grid(LOSSES, [AIM_N], [d], [torch.bfloat16], ["ours", *BASELINES, "compile"]),
    ]
    for d in DIMS
}
# What an H100 should reach at N = 32,768 in bfloat16: milliseconds at most, times eager at least.
AIMS = {
    "clip": dict(zip(DIMS, [(3.0, 5.0), (4.5, 3.5), (8.0, 2.4), (15.5, 1.6)], strict=True)),
    "nt_xent": dict(zip(DIMS, [(1.8, 8.0), (2.5, 5.0), (4.5, 3.8), (8.5, 2.6)], strict=True)),
}


def main() -> int:
    """Run the chosen parts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=["tests", *PARTS], default=["tests", *PARTS])
    parser.add_argument("--output", type=Path, default=Path("results/gpu"), help="folder of all results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"benchmarks.gpu: torch {torch.__version__} sees no CUDA device on this machine", file=sys.stderr)
        return 2

    options.output.mkdir(parents=True, exist_ok=True)
    status = run_tests(options.output) if "tests" in options.parts else 0
    device, console = torch.device("cuda"), Console(width=None if sys.stdout.isatty() else 100)
    memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    settings = Settings(device, seconds=1.0, min_rounds=3, memory_limit_gib=memory_gib)
    for part in (part for part in PARTS if part in options.parts):
        rows = report.merge(report.read(options.output), measure(PARTS[part], settings, console))
        publish(rows, options.output, memory_gib, console)
    write_summary(report.read(options.output), options.output)
    return status


def run_tests(folder: Path) -> int:
    """Run the GPU-marked tests, their output on the screen and in ``tests.txt``; returns pytest's status."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pytest,
        (folder / "tests.txt").open("w") as file,
    ):
        for line in pytest.stdout:
            print(line, end="")
            file.write(line)
    return pytest.returncode


def write_summary(rows: Sequence[Row], folder: Path) -> None:
    """Write ``report.md``: where this ran, how the tests ended, and every figure beside its aim."""
    where = ", ".join(f"{name} {value}" for name, value in environment(torch.device("cuda")).items())
    tests = folder / "tests.txt"
    lines = [f"# GPU results\n\n{where}\n"]
    lines += [f"Tests: {tests.read_text().strip().splitlines()[-1]}\n"] if tests.exists() else []
    lines += [
        f"Forward + backward, N = {AIM_N:,}, bfloat16, medians; the aims are those of an H100.\n",
        "| loss | D | ms | aim | × eager | aim | × compile | peak MiB | of matmul |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for loss, aims in AIMS.items():
        for d, (aim_ms, aim_gain) in aims.items():
            case = [row for row in rows if row.case == (loss, AIM_N, d, "bfloat16")]
            both = {row.provider: row for row in report.timed(case)}
            if ours := both.get("ours"):
                gains = [
                    f"{both[name].ms_50 / ours.ms_50:.1f}" if name in both else "" for name in ("eager", "compile")
                ]
                lines.append(
                    f"| {loss} | {d} | {ours.ms_50:.2f} | ≤ {aim_ms} | {gains[0]} | ≥ {aim_gain} | {gains[1]} "
                    f"| {ours.peak_mib:,.0f} | {ours.matmul_fraction:.0%} |"
                )
    lines += ["", *(f"- {line}" for line in report.not_timed(rows))]
    (folder / "report.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
