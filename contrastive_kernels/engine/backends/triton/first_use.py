"""The first use of a kernel on a GPU on which nobody has seen it right: compared with the PyTorch backend, once.

Every operator of this backend passes through `checked`; `comparison` compares. A verdict belongs to compiled code: to
an operator with its dtype, D, options, and the variants that Triton compiles for sizes and layouts. A kernel that
disagrees, or does not run, is replaced by the PyTorch backend until the process ends, with one warning. Rows of the
tile table that carry `tiles.Seen` for the installed Triton are not compared. A compiled program is checked when it
first runs, not when it is traced.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.engine import environment
from contrastive_kernels.engine.backends.triton import tiles, tune
from contrastive_kernels.engine.backends.triton.comparison import PLAIN, features, objection, row_count
from contrastive_kernels.engine.spec import Description, Gradients, Inputs, Statistics
from contrastive_kernels.engine.warn import warn

__all__ = ["ENVIRONMENT_VARIABLE", "checked", "outlook", "report", "switched_off"]

ENVIRONMENT_VARIABLE = "CONTRASTIVE_KERNELS_FIRST_USE"

Function = Callable[..., Any]
Key = tuple[object, ...]


@dataclass(frozen=True)
class Verdict:
    """What is known of a kernel; not `settled` if the next use may find out more."""

    trusted: bool
    finding: str
    settled: bool = True
    doubtful: bool = False


_trusted: dict[Key, bool] = {}
_verdicts: dict[Key, tuple[str, Verdict]] = {}
_lock = threading.Lock()
# Whether some forward ran in PyTorch that should have saved scores: no backward reads any from then on.
_scores_missing = False


def checked(operator: str, function: Function) -> Function:
    """Return the operator, compared with the PyTorch backend where a device uses it for the first time."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        x = features(operator, arguments)
        if not _concerns(x):
            return function(*arguments, **options)
        if _scores_missing and operator == "backward" and arguments[4] is not None:
            return _in_pytorch(operator, arguments, options)
        key = _key(operator, x, arguments, options)
        trusted = _trusted.get(key)
        if trusted is None:
            with _lock:
                if key not in _trusted:  # no other thread was first
                    return _first_use(key, operator, function, arguments, options)
            trusted = _trusted[key]
        return function(*arguments, **options) if trusted else _in_pytorch(operator, arguments, options)

    return run


def switched_off() -> bool:
    """Return whether the environment switches the comparison off.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    return environment.choice(ENVIRONMENT_VARIABLE, environment.SWITCH) == "0"


def report() -> list[str]:
    """Return a line for every kernel that this process has used on a GPU: its name and what is known of it."""
    return list(dict.fromkeys(f"{kernel}: {verdict.finding}" for kernel, verdict in list(_verdicts.values())))


def outlook(device: torch.device) -> str:
    """Return how many rows of the tile table were seen right on this kind of device, and what becomes of the others."""
    verified, rows = tiles.verified_rows(device)
    others = "not compared" if switched_off() else "compared with the PyTorch backend at their first use"
    return f"{verified} of {rows} rows of the tile table were seen right on such a device; other kernels are {others}"


def _concerns(x: Tensor) -> bool:
    return x.is_cuda and x.numel() > 0


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


# What a verdict belongs to


def _key(operator: str, x: Tensor, arguments: tuple[Any, ...], options: dict[str, Any]) -> Key:
    """Return what chooses the compiled code: no value of a tensor, no exponent or constant, which are no part of it."""
    own: Key = (operator, x.get_device(), x.dtype, x.shape[-1], _variant(x))
    if x.dtype == torch.float32:
        own += (torch.backends.cuda.matmul.fp32_precision,)
    if operator == "forward":
        inputs, what = arguments
        return *own, _of_sweep(inputs, what), *options.values()
    if operator == "backward":
        _, inputs, what, wanted, scores = arguments
        return *own, _of_sweep(inputs, what), wanted, scores is None, *options.values()
    return own if operator != "row_dot_backward" else (*own, *arguments[3])


def _of_sweep(inputs: Inputs, what: Description) -> Key:
    given = tuple(tensor is None for tensor in inputs)
    y = None if inputs.y is None else _variant(inputs.y)
    return given, y, len(what.exponents), what.column_lse, what.term, what.keep_equal_ids, what.diagonals


def _variant(x: Tensor) -> Key:
    """Return what Triton compiles code for beside D: a size of 1 or a multiple of 16, strides, and alignment."""
    n = row_count(x)
    return n == 1, n % 16 == 0, x.stride(-2) % 16, x.data_ptr() % 16


# The verdict


def _first_use(key: Key, operator: str, function: Function, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return the result of the call, by the kernel if it may be trusted, and keep the verdict."""
    result, error = None, None
    with tiles.noted() as rows:
        try:
            result = function(*arguments, **options)
        except (NotImplementedError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as raised:  # whatever the compiler or the driver raises
            if switched_off():
                raise
            error = raised
    verdict = _failed(error) if error else _verdict(rows, operator, function, arguments, options)
    kernel = _described(operator, features(operator, arguments), rows)
    known = {kernel for kernel, before in _verdicts.values() if before.doubtful}
    _verdicts[key] = kernel, verdict
    if verdict.settled:
        _trusted[key] = verdict.trusted
    if verdict.doubtful and kernel not in known:
        _warn(kernel, verdict)
    return result if verdict.trusted else _in_pytorch(operator, arguments, options)


def _verdict(
    rows: set[tiles.Tile], operator: str, function: Function, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Verdict:
    if rows and not tune.is_on() and all(row.is_verified() for row in rows):
        return Verdict(True, "seen right before, see the tile table")
    if switched_off():
        return Verdict(True, f"not compared, {ENVIRONMENT_VARIABLE}=0")
    if _capturing():
        # A comparison reads a number back, which a capture does not allow.
        finding = "not compared, because its first use is in the capture of a CUDA graph: call it once before"
        return Verdict(True, finding, settled=False, doubtful=True)
    try:
        with torch.no_grad():
            wrong = objection(operator, function, arguments, options)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        return _failed(error)
    return Verdict(False, wrong, doubtful=True) if wrong else Verdict(True, "right at its first use")


def _failed(error: Exception) -> Verdict:
    """Return the verdict on a kernel that does not run; memory may be there at the next use."""
    first = (str(error).strip().splitlines() or [""])[0]
    settled = not isinstance(error, torch.OutOfMemoryError)
    return Verdict(False, f"{type(error).__name__}: {first}", settled=settled, doubtful=True)


def _described(operator: str, x: Tensor, rows: set[tiles.Tile]) -> str:
    """Return the name of what has a verdict, with its rows of the table."""
    tables = sorted(f"{row.kernel} {row.height}x{row.width} for {row.architecture}" for row in rows)
    kernel = f"{operator} ({', '.join(tables)})" if tables else operator
    return f"{kernel}, {str(x.dtype).removeprefix('torch.')}, D = {x.shape[-1]}, {x.device}"


def _warn(kernel: str, verdict: Verdict) -> None:
    then = "" if verdict.trusted else " The PyTorch backend computes this instead in this process, right and slower."
    warn(
        f"the Triton kernel of {kernel}: {verdict.finding}.{then} Please report it to contrastive_kernels with what "
        "`python -m contrastive_kernels` and `python -m contrastive_kernels check --backend triton` print; "
        f"{ENVIRONMENT_VARIABLE}=0 switches the comparison off",
        RuntimeWarning,
    )


# The PyTorch backend in the place of a kernel


def _in_pytorch(operator: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return what the operator returns, in the dtypes and shapes of this backend."""
    global _scores_missing
    result = PLAIN[operator](*arguments, **options)
    if isinstance(result, Gradients):
        return result._replace(total=result.total.float())
    if not isinstance(result, Statistics):
        return result
    from contrastive_kernels.engine.backends import triton as backend

    x, y = arguments[0].x, arguments[0].y
    dtype = backend.score_dtype(x, y)
    saved = options["save_scores"] and dtype is not None
    _scores_missing = _scores_missing or saved
    shape = (x.shape[0], (x if y is None else y).shape[0]) if saved else (0,)
    scores = x.new_zeros(shape, dtype=dtype or torch.float32)
    return Statistics(*(statistic.float() for statistic in result))._replace(scores=scores)
