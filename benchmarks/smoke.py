"""``python -m benchmarks.smoke``: every Triton kernel once against PyTorch in float64, on drawn rows.

A call is one kind of sweep, forward and backward, or the small operators; `benchmarks.gpu` runs each in a process of
its own, so that one that crashes or hangs takes no other with it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_kernels.engine.backends import triton
from contrastive_kernels.engine.backends.triton import comparison
from contrastive_kernels.engine.spec import Description, Inputs, Wanted

# Registers hold the gradient of the first, chunks of dL/dS that of the second.
DIMS = (64, 320)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROWS, SMALL = 48, "small"


@dataclass(frozen=True)
class Sweep:
    """A kind of sweep; its tensors hold nothing, because the comparison draws its own."""

    exponents: int = 0
    columns: bool = False
    itself: bool = False
    diagonals: int = 0
    maximum: bool = False
    ids: bool = False
    cutoff: bool = False
    bias: bool = False
    term: str = ""
    constants: tuple[float, ...] = ()
    total: bool = False
    saved: bool = False

    def inputs(self, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Inputs, Description]:
        """Return the arguments that forward and backward share."""

        def given(wanted: bool | str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return torch.zeros(shape, dtype=dtype, device=device) if wanted else None

        x, scale = given(True, ROWS, d, dtype=dtype), given(True)
        assert x is not None and scale is not None
        inputs = Inputs(
            x,
            given(not self.itself, ROWS, d, dtype=dtype),
            scale,
            given(self.bias, ROWS),
            given(self.ids, ROWS, dtype=torch.int64),
            given(self.ids and not self.itself, ROWS, dtype=torch.int64),
            given(self.cutoff, ROWS),
            given(self.term),
            given(self.term, ROWS),
        )
        exponents = (1.5, 0.5) if self.exponents == 2 else (1.0,) * self.exponents
        return inputs, Description(exponents, self.columns, self.term, self.constants, False, self.diagonals)

    def wanted(self) -> Wanted:
        """Return the gradients: all that there are."""
        term = self.term != ""
        return Wanted(True, not self.itself, self.exponents > 0, self.bias, term, term, self.total)


SWEEPS = {
    "columns": Sweep(1, columns=True),
    "rows": Sweep(1, maximum=True),
    "views": Sweep(1, itself=True, diagonals=2),
    "ids": Sweep(1, columns=True, ids=True),
    "exponents": Sweep(2, bias=True, cutoff=True),
    "term": Sweep(1, term="band", constants=(0.3, 0.6)),
    "total": Sweep(term="softplus", total=True),
    "saved": Sweep(1, columns=True, saved=True),
}
CALLS = (*SWEEPS, SMALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare what one call and dtype ask for; print the wrong ones and a summary, return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__)
    parser.add_argument("--call", choices=CALLS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--device", default="cuda", help="cpu to rehearse with PyTorch in the place of the kernels")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    wrong, compared = [], 0
    for operator, passed, named in calls(options.call, DTYPES[options.dtype], device):
        function = triton.operators[operator].__wrapped__ if _has_kernels(device) else comparison.PLAIN[operator]
        compared += 1
        if found := comparison.objection(operator, function, passed, named):
            wrong.append(f"{operator}, D = {_depth(passed)}: {found}")
            print(wrong[-1], flush=True)
    print(f"WRONG {'; '.join(wrong)}" if wrong else f"right ({compared})")
    return int(bool(wrong))


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _depth(arguments: tuple) -> int:
    x = next(x for x in (getattr(one, "x", one) for one in arguments) if isinstance(x, Tensor) and x.dim() > 1)
    return x.shape[-1]


def calls(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, tuple, dict]]:
    """Yield operator, arguments and options of everything that one call compares."""
    for d in DIMS:
        if name == SMALL:
            x = torch.zeros(ROWS, d, dtype=dtype, device=device)
            norm = torch.zeros(ROWS, 1, device=device)
            yield "unit_rows", (x,), {}
            yield "unit_rows_backward", (x, x, norm), {}
            yield "row_dot", (x, x), {}
            yield "row_dot_backward", (norm[:, 0], x, x, [True, True]), {}
            yield "views", (x.view(-1, 4, d),), {}
            continue
        sweep = SWEEPS[name]
        inputs, what = sweep.inputs(d, dtype, device)
        saved = sweep.saved and _has_kernels(device)
        if saved and triton.score_dtype(inputs.x, inputs.y) is None:
            continue  # gradients in registers read no scores
        yield "forward", (inputs, what), {"maximum": sweep.maximum, "save_scores": saved}
        # the comparison saves scores of its own
        scores = torch.zeros(0, device=device) if saved else None
        yield "backward", (None, inputs, what, sweep.wanted(), scores), {}


if __name__ == "__main__":
    raise SystemExit(main())
