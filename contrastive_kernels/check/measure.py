"""The errors of a case on a backend against float64, in units of what they may be."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_kernels.check.cases import Case
from contrastive_kernels.engine.backends import BACKENDS, ENVIRONMENT_VARIABLE
from contrastive_kernels.engine.backends.triton import first_use

# (N, M, D): hardly anything; ragged in every size; more than one tile, and wide rows.
SHAPES = ((2, 3, 1), (37, 70, 24), (130, 37, 128))
# Triton compiles more than a hundred kernels for a D and a dtype, about a second each, and none for N and M.
DIMENSION_OF_TRITON = {torch.float32: 24, torch.bfloat16: 128, torch.float16: 128}
# The contract is that of the CPU backends. Triton's float32 carries its log-sum-exps in float32: up to five times the
# bound in the interpreter. A wrong kernel is off by a hundred times and more.
LIMITS = {"triton": 16.0}
# The errors are pooled over the seeds.
SEEDS = 4
# In float64 the plain form is as inexact as ours; only a wrong formula makes a larger relative error.
FLOAT64_TOLERANCE = 1e-11
# Of a few numbers plain PyTorch may have the right ones by luck; those below NOTHING cancel to 0. Either way there is
# the rounding of terms of about 1 / T.
FEW, NOTHING, TERMS = 8 * SEEDS, 1e-12, 20.0
GRADIENT = "gradient of "

Sizes = tuple[int, int, int]
Outcome = dict[str, Tensor]


@dataclass(frozen=True)
class Column:
    """A backend on a device: a column of the table."""

    backend: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.backend} ({self.device})"

    @property
    def limit(self) -> float:
        """How many times the bound an error may be."""
        return LIMITS.get(self.backend, 1.0)

    def reasons(self, dtype: torch.dtype) -> list[str]:
        """Return why it does not run in that dtype; nothing if it does."""
        try:
            x = torch.zeros(2, 2, dtype=dtype, device=self.device)
        except (RuntimeError, AssertionError, TypeError) as error:
            return [_first_line(error)]
        return BACKENDS[self.backend].not_supported_reasons(x)

    def shapes(self, dtype: torch.dtype) -> Sequence[Sizes]:
        """Return the sizes that are compared."""
        if self.backend != "triton":
            return SHAPES
        return [(n, m, DIMENSION_OF_TRITON[dtype]) for n, m, _ in SHAPES]


@dataclass(frozen=True)
class Result:
    """One comparison: how many times its bound the largest error is; inf where there is no number."""

    case: Case
    column: Column
    dtype: torch.dtype
    shape: Sizes
    times: float
    what: str

    @property
    def right(self) -> bool:
        """Whether the error is within the limit of the backend."""
        return self.times <= self.column.limit

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} = {size}" for name, size in zip("NMD", self.shape, strict=True))
        found = self.what if math.isinf(self.times) else f"{self.what} {self.times:.3g} times the bound"
        return f"{self.case}; {self.column}, {dtype_name(self.dtype)}, {sizes}: {found}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def compare(case: Case, dtype: torch.dtype, shape: Sizes, columns: Sequence[Column]) -> Iterator[Result]:
    """Yield the largest error of a case on every backend. What a call raises is a result too."""
    inputs = [case.tensors(*shape, dtype, seed) for seed in range(SEEDS)]
    try:
        exact, allowed = _expected(case, dtype, inputs)
    except Exception as error:
        for column in columns:
            yield Result(case, column, dtype, shape, math.inf, f"plain PyTorch, {_described(error)}")
        return
    for column in columns:
        try:
            with _only(column.backend):
                ours = _pooled(_outcome(case, case.ours, _moved(tensors, column.device)) for tensors in inputs)
            times, what = max((_times(_errors(x, exact[name]), allowed[name]), name) for name, x in ours.items())
            what += " is not finite" * math.isinf(times)
        except Exception as error:
            times, what = math.inf, _described(error)
        yield Result(case, column, dtype, shape, times, what)


def _expected(case: Case, dtype: torch.dtype, inputs: Sequence[Mapping[str, Tensor]]) -> tuple[Outcome, ...]:
    """Return value and gradients in float64, and what RMS and maximum of their errors may be."""
    wide = [{name: x.double() if x.is_floating_point() else x for name, x in tensors.items()} for tensors in inputs]
    exact = _pooled(_outcome(case, case.dense, tensors) for tensors in wide)
    plain = _pooled(_outcome(case, case.dense, tensors) for tensors in inputs)
    return exact, {name: _bounds(case, name, x, plain[name], dtype) for name, x in exact.items()}


def _bounds(case: Case, name: str, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the contract: twice (gradients: three times) the error of plain PyTorch in that dtype, and a rounding."""
    factor, of_inputs = (2 if name == "value" else 3), name.removeprefix(GRADIENT) in case.inputs
    eps = torch.finfo(dtype if of_inputs else torch.promote_types(dtype, torch.float32)).eps
    size = _errors(exact, torch.zeros_like(exact))
    if dtype == torch.float64:
        return case.factor * (FLOAT64_TOLERANCE * size + 256 * eps * TERMS)
    bound = factor * _errors(plain, exact) + eps * size
    if exact.numel() <= FEW:
        bound = bound + eps * (16 * size + 4 * TERMS)
    if exact.abs().max() <= NOTHING:
        bound = bound + 32 * eps * TERMS
    return case.factor * bound


def _errors(x: Tensor, exact: Tensor) -> Tensor:
    """Return RMS and maximum of the difference."""
    if x.shape != exact.shape:
        raise ValueError(f"the shape is {tuple(x.shape[1:])}, not {tuple(exact.shape[1:])}")
    difference = (x - exact).abs()
    return torch.stack([difference.square().mean().sqrt(), difference.max()])


def _times(error: Tensor, bound: Tensor) -> float:
    """Return how many times its bound an error is, inf where it is NaN."""
    times = (error / bound).max().item()
    return math.inf if math.isnan(times) else times


def _outcome(case: Case, loss: Callable[[Mapping[str, Tensor]], Tensor], tensors: Mapping[str, Tensor]) -> Outcome:
    """Return the value and its gradients in float64 on the CPU; every anchor has its own upstream gradient."""
    leaves = {name: x.detach().requires_grad_(name in case.differentiable) for name, x in tensors.items()}
    value = loss(leaves)
    upstream = 1 + torch.cos(2.1 * torch.arange(value.numel(), dtype=torch.float64)).view(value.shape)
    wanted = [leaves[name] for name in case.differentiable]
    found = torch.autograd.grad(value, wanted, upstream.to(value), materialize_grads=True)
    outcome = {"value": value.detach()}
    outcome |= {f"{GRADIENT}{name}": x for name, x in zip(case.differentiable, found, strict=True)}
    return {name: x.cpu().double() for name, x in outcome.items()}


def _pooled(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcomes of all seeds together."""
    of_seeds = list(outcomes)
    return {name: torch.stack([outcome[name] for outcome in of_seeds]) for name in of_seeds[0]}


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in tensors.items()}


@contextmanager
def _only(backend: str) -> Iterator[None]:
    """Let every loss run on one backend, those that take no argument for it too, also on a wrong kernel."""
    changes = {ENVIRONMENT_VARIABLE: backend, first_use.ENVIRONMENT_VARIABLE: "0"}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"
