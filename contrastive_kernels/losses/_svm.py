"""The support vector machines of MMCL: kernels, the quadratic programs of all anchors, and their solvers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from contrastive_kernels.primitives import checks, reading_is_free

KERNELS = ("rbf", "linear", "poly", "tanh", "min")
WITH_SIGMA = ("rbf", "tanh")
SOLVERS = ("inverse", "pgd")
# Elements of the (rows, M, D) minima that the "min" kernel holds at a time.
MINIMA_ELEMENTS = 1 << 22


class MMCLStats(NamedTuple):
    """The dual solutions in numbers, detached, in the dtype of the loss."""

    zero_fraction: Tensor
    """0-dim: fraction of the N (N - 1) coefficients that are 0, the sparsity."""
    bound_fraction: Tensor
    """0-dim: fraction of the positive coefficients that are at C; 0 without an upper bound."""
    objective: Tensor
    """(N,): the dual objective, lower is better; 0 is that of no support vector at all."""
    kkt_residual: Tensor
    """(N,): largest change of a coefficient in a projected gradient step of length 1; 0 at the solution."""
    iterations: Tensor
    """0-dim int64: iterations of ``solver="pgd"`` (the most of any block), 0 for ``"inverse"``."""


@dataclass(frozen=True)
class Solver:
    """How the N quadratic programs are solved; the fields are arguments of `mmcl_loss`."""

    kernel: str = "rbf"
    sigma: float | Tensor = 50.0
    C: float = 100.0
    reg: float = 0.1
    kxx: str = "one"
    solver: str = "inverse"
    use_norm: bool = True
    eta: float = 1e-3
    nesterov: bool = True
    a0: float = 1.0
    stop: str = "kkt"
    tolerance: float = 1e-4
    max_iterations: int = 1000

    def __post_init__(self) -> None:
        checks.choice("kernel", self.kernel, KERNELS)
        checks.choice("solver", self.solver, SOLVERS)
        checks.choice("kxx", self.kxx, ("one", "exact"))
        checks.choice("stop", self.stop, ("kkt", "change"))
        if not isinstance(self.sigma, Tensor) and not self.sigma > 0:
            raise ValueError(f"sigma {self.sigma} must be positive")
        if self.C != -1 and not self.C > 0:
            raise ValueError(f"C {self.C} must be positive, or -1 for no upper bound")
        if not self.reg >= 0:
            raise ValueError(f"reg {self.reg} must not be negative")
        if not self.eta > 0:
            raise ValueError(f"eta {self.eta} must be positive")
        if not 0 < self.a0 <= 1:
            raise ValueError(f"a0 {self.a0} must be above 0 and at most 1")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance {self.tolerance} must not be negative")
        if self.kernel not in WITH_SIGMA:
            self._check_unused("kernel", "sigma")
        if self.solver == "inverse":
            self._check_unused("solver", "use_norm", "eta", "nesterov", "a0", "stop", "tolerance", "max_iterations")
        if self.use_norm:
            self._check_unused("use_norm", "eta")
        if not self.nesterov:
            self._check_unused("nesterov", "a0")

    def _check_unused(self, choice: str, *names: str) -> None:
        """Raise if a field that a choice leaves without effect is not its default."""
        given = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        checks.no_effect(f"{choice}={getattr(self, choice)!r}", **{name: given[name] for name in names})


class Solution(NamedTuple):
    """The coefficients of one block and how they were found."""

    alpha: Tensor  # (N, N), row i those of anchor i, 0 on the diagonal
    measure: Tensor  # 0-dim: what the stop rule compares with the tolerance
    iterations: Tensor  # 0-dim int64


@dataclass(frozen=True)
class Problem:
    """The programs ``min 1/2 a' D_i a - 2 sum(a), 0 <= a <= C`` of all anchors, through one N x N matrix.

    ``D_i[a, b] = K_ab + kappa_i - K_ia - K_ib + reg [a = b]`` does not change when K is centred and kappa with it.
    Centred, nothing cancels: at a large sigma all entries of K itself are nearly 1.
    """

    kernel: Tensor  # (N, N), K centred in rows and columns
    excess: Tensor  # (N,), kappa_i - K_ii
    reg: float
    upper: float | None

    @classmethod
    def of(cls, x: Tensor, options: Solver) -> Problem:
        """Return the programs of the rows of x."""
        rbf = options.kernel == "rbf"
        kernel = kernel_matrix(x, x, options.kernel, options.sigma, less_one=rbf)
        diagonal = kernel.diagonal().clone()
        kappa = (0.0 if rbf else 1.0) if options.kxx == "one" else diagonal
        kernel -= kernel.mean(0)
        kernel -= kernel.mean(1, keepdim=True)
        return cls(kernel, kappa - diagonal, options.reg, None if options.C == -1 else options.C)

    def gradient(self, alpha: Tensor) -> Tensor:
        """Return the gradients: row i is ``D_i alpha_i - 2``; its entry i means nothing."""
        total, own = alpha.sum(1, keepdim=True), (alpha * self.kernel).sum(1, keepdim=True)
        gradient = torch.addcmul(alpha @ self.kernel, self.kernel, total, value=-1)
        gradient.add_(alpha, alpha=self.reg)
        return gradient.add_((self.excess + self.kernel.diagonal())[:, None] * total - own - 2)

    def box(self, alpha: Tensor) -> Tensor:
        """Return alpha, which is overwritten, with its entries in [0, C] and no anchor among its own negatives."""
        alpha.clamp_(0, self.upper).diagonal().zero_()
        return alpha

    def residual(self, alpha: Tensor, gradient: Tensor) -> Tensor:
        """Return (N,), how far a projected gradient step of length 1 moves any coefficient."""
        return (self.box(alpha - gradient) - alpha).abs_().amax(1)

    def objective(self, alpha: Tensor, gradient: Tensor) -> Tensor:
        """Return (N,), the value of each program."""
        return (alpha * (gradient / 2 - 1)).sum(1)

    def step(self) -> Tensor:
        """Return (N, 1), 1 / |D_i| in the Frobenius norm, from row sums of one matrix."""
        n = self.kernel.shape[0] - 1
        own, kappa = self.kernel.diagonal(), self.excess + self.kernel.diagonal()
        sums, squares = self.kernel.sum(1), self.kernel.square().sum(1)
        # Row i without i: its sum, its sum of squares and its product with the sums of the others' rows.
        v1, v2 = sums - own, squares - own**2
        product = self.kernel @ (sums + self.reg) - own * (sums + self.reg) - v2
        # The kernel without row and column i, plus reg on its diagonal.
        trace = own.sum() - own
        m1 = sums.sum() - 2 * sums + own + n * self.reg
        m2 = squares.sum() - 2 * squares + own**2 + 2 * self.reg * trace + n * self.reg**2
        square = m2 + (n * kappa) ** 2 + 2 * n * v2 + 2 * v1**2 + 2 * kappa * m1 - 4 * product - 4 * n * kappa * v1
        return square.clamp(min=torch.finfo(square.dtype).tiny).rsqrt()[:, None]

    def inverse(self) -> Tensor:
        """Return the unconstrained solutions of all programs from one inverse, clipped to the box; NaN if singular."""
        n = self.kernel.shape[0]
        matrix = self.kernel + (1 - self.reg) / n
        matrix.diagonal().add_(self.reg)
        inverse, failed = torch.linalg.inv_ex(matrix)
        inverse.sub_(1 / n).masked_fill_(failed > 0, torch.nan)
        scale = -2 / (1 + (self.excess - self.reg) * inverse.diagonal())
        return self.box(inverse.mT * scale[:, None])


def kernel_matrix(x: Tensor, y: Tensor, kernel: str, sigma: float | Tensor, *, less_one: bool = False) -> Tensor:
    """Return (N, M), the kernel of the rows of x and y; of "rbf" with less_one the kernel less 1.

    A constant cancels from the programs and from the loss. Near 1, at a large sigma, only K - 1 has digits, near 0,
    at a small one, only K.
    """
    if kernel == "min":
        return _least_common(x.relu(), y.relu())
    similarity = x @ y.mT
    if kernel == "rbf":
        exponent = (similarity - 1) * (2 / sigma)
        return torch.expm1(exponent) if less_one else torch.exp(exponent)
    if kernel == "poly":
        return (similarity + 0.5) ** 3
    return torch.tanh(sigma * similarity) if kernel == "tanh" else similarity


def _least_common(x: Tensor, y: Tensor) -> Tensor:
    """Return ``sum_k min(x_ik, y_jk)``, a few rows at a time, which the backward computes again."""

    def chunk(x: Tensor, y: Tensor) -> Tensor:
        return torch.minimum(x[:, None], y).sum(2)

    step = max(1, MINIMA_ELEMENTS // max(y.numel(), 1))
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, part, y, use_reentrant=False) for part in x.split(step)])
    return torch.cat([chunk(part, y) for part in x.split(step)])


def _descend(problem: Problem, alpha: Tensor, options: Solver) -> Solution:
    """Return the solution by accelerated projected gradient descent, one matrix product an iteration for all anchors.

    The gradient is linear: at the extrapolated point it is extrapolated too, and the one that is computed belongs to
    coefficients inside the box, as the stop rule wants it. Once the rule holds, a select keeps the coefficients; where
    reading is free, the loop ends.
    """
    step = problem.step() if options.use_norm else options.eta
    gradient = problem.gradient(alpha)
    ahead, gradient_ahead, a = alpha, gradient, options.a0
    iterations = torch.zeros((), dtype=torch.int64, device=alpha.device)
    pairs = max(alpha.shape[0] * (alpha.shape[0] - 1), 1)
    kkt = options.stop == "kkt"
    measure = problem.residual(alpha, gradient).amax() if kkt else alpha.new_full((), torch.inf)
    for _ in range(options.max_iterations):
        # NaN is done: nothing follows but NaN.
        done = ~(measure > options.tolerance)
        if reading_is_free(alpha) and bool(done):
            break
        iterations = iterations + ~done
        moved = torch.where(done, alpha, problem.box(ahead - step * gradient_ahead))
        moved_gradient = problem.gradient(moved)
        if kkt:
            measure = problem.residual(moved, moved_gradient).amax()
        else:
            change = ((moved - alpha) / (alpha + 1e-7)).abs_().sum() / pairs
            measure = torch.where(done, measure, change)
        following = ((a**4 + 4 * a**2) ** 0.5 - a**2) / 2
        beta = a * (1 - a) / (a**2 + following) if options.nesterov else 0.0
        ahead = torch.lerp(alpha, moved, 1 + beta)
        gradient_ahead = torch.lerp(gradient, moved_gradient, 1 + beta)
        alpha, gradient, a = moved, moved_gradient, following
    return Solution(alpha, measure, iterations)


@torch.no_grad()
def solve(problem: Problem, options: Solver, alpha0: Tensor | None = None) -> Solution:
    """Return the coefficients of all anchors, without gradient."""
    nothing = problem.kernel.new_zeros(())
    if options.solver == "inverse":
        return Solution(problem.inverse(), nothing, nothing.to(torch.int64))
    start = problem.inverse() if alpha0 is None else problem.box(alpha0.to(problem.kernel, copy=True))
    return _descend(problem, start, options)


@torch.no_grad()
def dual_stats(problem: Problem, solution: Solution) -> tuple[Tensor, ...]:
    """Return per anchor zero, positive and bounded coefficients, objective, residual; and the iterations."""
    alpha, gradient = solution.alpha, problem.gradient(solution.alpha)
    positive = (alpha > 0).sum(1)
    bounded = torch.zeros_like(positive) if problem.upper is None else (alpha == problem.upper).sum(1)
    zeros = (alpha == 0).sum(1) - 1
    objective, residual = problem.objective(alpha, gradient), problem.residual(alpha, gradient)
    return zeros, positive, bounded, objective, residual, solution.iterations[None]


def join_stats(blocks: list[tuple[Tensor, ...]]) -> MMCLStats:
    """Return the statistics of all blocks together."""
    zeros, positive, bounded, objective, residual, iterations = (torch.cat(part) for part in zip(*blocks, strict=True))
    sizes = [len(block[0]) for block in blocks]
    pairs = sum(n * (n - 1) for n in sizes)
    dtype = objective.dtype
    return MMCLStats(
        zeros.sum().to(dtype) / max(pairs, 1),
        bounded.sum().to(dtype) / positive.sum().clamp(min=1),
        objective,
        residual,
        iterations.amax(),
    )
