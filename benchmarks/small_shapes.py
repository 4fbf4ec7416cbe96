"""``python -m benchmarks.small_shapes``: every kind of kernel once, at ragged sizes, for compute-sanitizer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from .cases import Case, gradients, objections, provider_function

ROWS = 300
# All kinds of epilogues; then wide and odd rows, which have other kernels and other loads.
EPILOGUES = ("clip", "nt_xent", "lmcl", "hard_negative", "siglip", "easy_negative")
SWEEPS = ("clip", "nt_xent")
SHAPES = [
    (128, torch.bfloat16, EPILOGUES),
    (100, torch.bfloat16, SWEEPS),
    (520, torch.bfloat16, SWEEPS),
    (72, torch.float32, SWEEPS),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run forward and backward of every case; return 1 if ``--check`` finds one that differs from float64, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_shapes", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--check", action="store_true", help="compare value and gradients with float64")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cases = [Case(loss, ROWS, d, dtype) for d, dtype, losses in SHAPES for loss in losses]
    wrong = 0
    for case in cases:
        if options.check:
            found = objections("ours", case, device)
            wrong += bool(found)
            print(f"{case}: {found or 'as float64'}")
        else:
            inputs = case.inputs(device)
            gradients(provider_function("ours", case, device)(**inputs), inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(cases)} cases ran" + (f", {wrong} differ from float64" if options.check else ""))
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
