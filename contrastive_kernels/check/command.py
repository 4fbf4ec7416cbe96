"""``python -m contrastive_kernels check``: every loss on every backend of this machine against float64."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from contrastive_kernels.check.cases import CASES
from contrastive_kernels.check.measure import Column, Result, compare, dtype_name
from contrastive_kernels.engine.backends import BACKENDS

LOSSES = tuple(dict.fromkeys(case.loss for case in CASES))
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
DESCRIPTION = (
    "Compare values and gradients of every loss, on every backend that runs here, with dense PyTorch in float64 on the "
    "CPU. The table has the largest error in units of its bound, which is twice (gradients: three times) the error of "
    "plain PyTorch in the same dtype. The exit status is 1 if anything is wrong, else 0."
)
RED, GREEN, PLAIN = "\033[31m", "\033[32m", "\033[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    for name, choices in (("backend", BACKENDS), ("loss", LOSSES), ("dtype", DTYPES)):
        text = f"some of {', '.join(choices)} (default: all)"
        parser.add_argument(f"--{name}", nargs="+", choices=choices, metavar=name.upper(), help=text)
    parser.add_argument("--device", nargs="+", type=_device, help="default: cpu, and cuda if there is one")
    parser.add_argument("--verbose", action="store_true", help="print every comparison")


def _device(text: str) -> torch.device:
    try:
        x = torch.zeros(1, device=text)
        x.cpu()  # there is nothing to copy from a meta tensor
        return x.device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from None


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the table; return 1 if a result is wrong, else 0."""
    dtypes = [DTYPES[name] for name in options.dtype or DTYPES]
    devices = options.device or [torch.device("cpu"), *[torch.device("cuda")] * torch.cuda.is_available()]
    taken: dict[Column, list[torch.dtype]] = {}
    for backend in options.backend or BACKENDS:
        columns = [Column(backend, device) for device in devices]
        found = {column: [dtype for dtype in dtypes if not column.reasons(dtype)] for column in columns}
        taken |= {column: found[column] for column in columns if found[column]}
        if not any(found.values()):
            reasons = dict.fromkeys(reason for column in columns for reason in column.reasons(dtypes[0]))
            message = f"{backend} does not run here: {'; '.join(reasons)}"
            if options.backend:
                parser.error(f"argument --backend: {message}")
            print(message)
    for column, those in taken.items():
        print(f"{column}: {', '.join(map(dtype_name, those))}")

    print("\nLargest error in units of its bound\n")
    print(f"{'':<24}" + "".join(f"{column!s:>16}" for column in taken))
    print(f"{'right up to':<24}" + "".join(f"{column.limit:16.2f}" for column in taken))
    began, results = time.monotonic(), list[Result]()
    losses = [loss for loss in LOSSES if loss in (options.loss or LOSSES)]
    for loss in losses:
        cells = dict.fromkeys(taken, 0.0)
        for result in _results(loss, taken):
            results.append(result)
            cells[result.column] = max(cells[result.column], result.times)
            if options.verbose:
                print(f"  {result}", flush=True)
        print(f"{loss:<24}" + "".join(_cell(times, column.limit) for column, times in cells.items()), flush=True)
    wrong = [result for result in results if not result.right]
    summary = _coloured(f"{len(wrong)} wrong", RED) if wrong else _coloured("all right", GREEN)
    print(*(f"  {result}" for result in wrong), sep="\n")
    print(f"{len(losses)} losses, {len(results)} comparisons in {time.monotonic() - began:.0f} s: {summary}")
    return int(bool(wrong))


def _results(loss: str, taken: Mapping[Column, Sequence[torch.dtype]]) -> Iterator[Result]:
    """Yield the results of all cases of a loss; plain PyTorch runs once for all backends."""
    for case in (case for case in CASES if case.loss == loss):
        for dtype in DTYPES.values():
            columns = [column for column, dtypes in taken.items() if dtype in dtypes]
            for shape in dict.fromkeys(shape for column in columns for shape in column.shapes(dtype)):
                yield from compare(case, dtype, shape, [c for c in columns if shape in c.shapes(dtype)])


def _cell(times: float, limit: float) -> str:
    if times <= limit:
        return _coloured(f"{times:16.2f}", GREEN)
    return _coloured(f"{'error' if math.isinf(times) else f'{times:.3g} wrong':>16}", RED)


def _coloured(text: str, colour: str) -> str:
    """Return the text in a colour on a terminal, elsewhere as it is."""
    return f"{colour}{text}{PLAIN}" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
