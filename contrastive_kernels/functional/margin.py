"""MMCL: every anchor against its negatives is a kernel SVM. The one loss that stores N x N matrices."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from contrastive_kernels import checks
from contrastive_kernels.backends import BACKENDS
from contrastive_kernels.functional.common import check_options, reduce, rows
from contrastive_kernels.sweep import compute_dtype

__all__ = ["MMCLStats", "mmcl_loss"]

KERNELS = ("rbf", "linear", "poly", "tanh", "min")
# Square matrices that live at a time, measured; below this many bytes of them nobody asks for the free memory.
MATRICES = {"inverse": 14, "pgd": 19}
UNCHECKED_BYTES = 256 << 20
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
        checks.choice("solver", self.solver, tuple(MATRICES))
        checks.choice("kxx", self.kxx, ("one", "exact"))
        checks.choice("stop", self.stop, ("kkt", "change"))
        for name in ("C", "reg", "eta", "a0", "tolerance", "max_iterations"):
            checks.number(name, getattr(self, name))
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
        if isinstance(self.max_iterations, float) or self.max_iterations < 1:
            raise ValueError(f"max_iterations {self.max_iterations} must be a positive integer")


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
        """The programs of the rows of x."""
        rbf = options.kernel == "rbf"
        kernel = kernel_matrix(x, x, options.kernel, options.sigma, less_one=rbf)
        diagonal = kernel.diagonal().clone()
        kappa = (0.0 if rbf else 1.0) if options.kxx == "one" else diagonal
        kernel -= kernel.mean(0)
        kernel -= kernel.mean(1, keepdim=True)
        return cls(kernel, kappa - diagonal, options.reg, None if options.C == -1 else options.C)

    def gradient(self, alpha: Tensor) -> Tensor:
        """Row i is ``D_i alpha_i - 2``; its entry i means nothing."""
        total, own = alpha.sum(1, keepdim=True), (alpha * self.kernel).sum(1, keepdim=True)
        gradient = torch.addcmul(alpha @ self.kernel, self.kernel, total, value=-1)
        gradient.add_(alpha, alpha=self.reg)
        return gradient.add_((self.excess + self.kernel.diagonal())[:, None] * total - own - 2)

    def box(self, alpha: Tensor) -> Tensor:
        """alpha, which is overwritten, with its entries in [0, C] and no anchor among its own negatives."""
        return alpha.clamp_(0, self.upper).fill_diagonal_(0)

    def residual(self, alpha: Tensor, gradient: Tensor) -> Tensor:
        """(N,): how far a projected gradient step of length 1 moves any coefficient."""
        return (self.box(alpha - gradient) - alpha).abs_().amax(1)

    def objective(self, alpha: Tensor, gradient: Tensor) -> Tensor:
        """(N,): the value of each program."""
        return (alpha * (gradient / 2 - 1)).sum(1)

    def step(self) -> Tensor:
        """(N, 1): 1 / |D_i| in the Frobenius norm, from row sums of one matrix."""
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
        """The unconstrained solutions of all programs from one inverse, clipped to the box. NaN if it is singular."""
        n = self.kernel.shape[0]
        matrix = self.kernel + (1 - self.reg) / n
        matrix.diagonal().add_(self.reg)
        inverse, failed = torch.linalg.inv_ex(matrix)
        inverse.sub_(1 / n).masked_fill_(failed > 0, torch.nan)
        scale = -2 / (1 + (self.excess - self.reg) * inverse.diagonal())
        return self.box(inverse.mT * scale[:, None])


def kernel_matrix(x: Tensor, y: Tensor, kernel: str, sigma: float | Tensor, *, less_one: bool = False) -> Tensor:
    """(N, M): the kernel of the rows of x and y; of "rbf" with less_one the kernel less 1.

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
    """``sum_k min(x_ik, y_jk)``, a few rows at a time, which the backward computes again."""

    def chunk(x: Tensor, y: Tensor) -> Tensor:
        return torch.minimum(x[:, None], y).sum(2)

    step = max(1, MINIMA_ELEMENTS // max(y.numel(), 1))
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, part, y, use_reentrant=False) for part in x.split(step)])
    return torch.cat([chunk(part, y) for part in x.split(step)])


def _descend(problem: Problem, alpha: Tensor, options: Solver) -> Solution:
    """Accelerated projected gradient, one matrix product an iteration for all anchors together.

    The gradient is linear: at the extrapolated point it is extrapolated too, and the one that is computed belongs to
    coefficients inside the box, as the stop rule wants it. Done, the coefficients are kept by a select. A CPU stops.
    """
    on_host = alpha.device.type == "cpu" and not torch.compiler.is_compiling()
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
        if on_host and bool(done):
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
    """The coefficients of all anchors, without gradient."""
    nothing = problem.kernel.new_zeros(())
    if options.solver == "inverse":
        return Solution(problem.inverse(), nothing, nothing.to(torch.int64))
    start = problem.inverse() if alpha0 is None else problem.box(alpha0.to(problem.kernel, copy=True))
    return _descend(problem, start, options)


@torch.no_grad()
def dual_stats(problem: Problem, solution: Solution) -> tuple[Tensor, ...]:
    """Per anchor: zero, positive and bounded coefficients, objective, residual; and the iterations."""
    alpha, gradient = solution.alpha, problem.gradient(solution.alpha)
    positive = (alpha > 0).sum(1)
    bounded = torch.zeros_like(positive) if problem.upper is None else (alpha == problem.upper).sum(1)
    zeros = (alpha == 0).sum(1) - 1
    objective, residual = problem.objective(alpha, gradient), problem.residual(alpha, gradient)
    return zeros, positive, bounded, objective, residual, solution.iterations[None]


def merged_stats(blocks: list[tuple[Tensor, ...]]) -> MMCLStats:
    """The statistics of all blocks together."""
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


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    found = []
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():
        found += [1024 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line]
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        found.append(int(text))
    return min(found, default=None)


def _check_memory(n: int, block: int, solver: str, x: Tensor) -> None:
    """Refuses what would exhaust the machine. The solutions of the blocks stay until the backward."""
    needed = (MATRICES[solver] * block**2 + 2 * n * block) * compute_dtype(x).itemsize
    if needed < UNCHECKED_BYTES or torch.compiler.is_compiling():
        return
    available = available_bytes(x.device)
    if available is not None and needed > available:
        raise ValueError(
            f"mmcl_loss stores N x N matrices: N = {n} in blocks of {block} needs about {needed} bytes and {available} "
            f"are available on {x.device}; pass a smaller batch or a smaller block_size"
        )


def _check_converged(measures: list[Tensor], options: Solver) -> None:
    """One warning for all blocks. Reading the result back is the only wait for the device, after the solve."""
    if options.solver != "pgd" or torch.compiler.is_compiling():
        return
    if measures[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return
    worst = float(torch.stack(measures).amax())
    if worst > options.tolerance:
        # To one digit: Python shows a repeated text once.
        what = "KKT residual" if options.stop == "kkt" else "relative change"
        warnings.warn(
            f"mmcl_loss: solver='pgd' did not converge in {options.max_iterations} iterations: the {what} is "
            f"{worst:.0e}, tolerance {options.tolerance:.0e}; the loss is that of the last iterate",
            RuntimeWarning,
            stacklevel=3,
        )


def mmcl_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    kernel: Literal["rbf", "linear", "poly", "tanh", "min"] = "rbf",
    sigma: float | Tensor = 50.0,
    gamma: Literal["auto"] | None = None,
    C: float = 100.0,
    reg: float = 0.1,
    kxx: Literal["one", "exact"] = "one",
    solver: Literal["inverse", "pgd"] = "inverse",
    use_norm: bool = True,
    eta: float = 1e-3,
    nesterov: bool = True,
    alpha0: Tensor | None = None,
    a0: float = 1.0,
    stop: Literal["kkt", "change"] = "kkt",
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    block_size: int | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    weight: Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, MMCLStats]:
    r"""MMCL, max-margin contrastive learning: the decision value of an SVM of each anchor against its negatives.

    .. math:: L = \frac1N \sum_i \sum_{a \ne i} \alpha_{ia} \bigl[ K(x_a, z_i) - K(x_i, z_i) \bigr], \qquad
        \alpha_i \approx \arg\min_{0 \le \alpha \le C} \tfrac12 \alpha^T \Delta_i \alpha - 2 \cdot 1^T \alpha,

    .. math:: \Delta_i[a, b] = K(x_a, x_b) + \kappa_i - K(x_i, x_a) - K(x_i, x_b) + \mathrm{reg}\,[a = b],
        \qquad a, b \ne i

    x and z are the rows of both views. The SVM is that of view 1, its decision is taken at view 2; not symmetric. The
    coefficients alpha are constants of the gradient.

    **This loss stores N x N matrices**, up to 14 of them at a time (19 for ``"pgd"``), 4 MiB each at N = 1024 in
    float32: it is meant for N up to a few thousand. It refuses to start what the memory cannot hold; ``block_size`` is
    for larger N.

    The default solver, the official one, clips the *unconstrained* solution to the box. It is not the optimum of the
    SVM and may be worse than no support vector at all: a positive ``objective`` in the statistics, the more likely the
    larger the batch. ``"pgd"`` finds the optimum.

    Args:
        z0: ``(N, D)``, the first view, on which the SVMs are trained.
        z1: ``(N, D)``, the second view.
        kernel: of unit rows with similarity s: ``"rbf"`` :math:`e^{-(2 - 2s) / \sigma}`, ``"linear"`` s, ``"poly"``
            :math:`(s + \frac12)^3`, ``"tanh"`` :math:`\tanh(\sigma s)`, ``"min"``
            :math:`\sum_k \min(x_k^+, y_k^+)`, N x N x D operations that no matrix product does.
        sigma: of ``"rbf"`` and ``"tanh"``; float or 0-dim tensor (differentiable).
        gamma: ``"auto"``: sigma = 1 / D instead.
        C: upper bound of the coefficients, -1 for none: not with a ``kxx`` that is less than the kernel has, where the
            program has no minimum.
        reg: added to the diagonal; keep it positive, the inverse needs it where the kernel matrix is singular.
        kxx: :math:`\kappa_i`, the kernel of an anchor with itself: ``"one"`` as in the official code, exact for rbf and
            linear on unit rows; or ``"exact"``.
        solver: ``"inverse"``, one N x N inverse for all anchors, clipped; or ``"pgd"``, projected gradient descent, one
            N x N product an iteration for all anchors.
        use_norm: pgd with a step of one over the Frobenius norm of each :math:`\Delta_i`, else ``eta``.
        eta: the step without ``use_norm``.
        nesterov: accelerate pgd.
        alpha0: ``(N, N)``, where pgd starts, row i the coefficients of anchor i, its diagonal ignored, clipped to the
            box; None: the solution of ``"inverse"``. The official code draws ``torch.randn(N, N).relu()``.
        a0: in (0, 1], the start of the acceleration; the official code draws it.
        stop: ``"kkt"``: no coefficient of any anchor moves by more than ``tolerance`` in a projected gradient step of
            length 1; ``"change"``: the mean relative change of a coefficient is at most that (official: 0.01; not with
            a start of zeros, which stops near 100 iterations whatever the accuracy).
        tolerance: see ``stop``. The residual of float32 coefficients near C = 100 cannot fall much below 1e-4.
        max_iterations: of pgd. On a GPU all of them run, the coefficients stay as they are once it stops: nothing is
            read back before. Then the outcome is, for the warning; not under `torch.compile` or in a CUDA graph.
        block_size: the batch in blocks of so many samples, one after another, each a loss of its own whose negatives
            are those of the block: memory O(N * block_size). None: one block.
        normalize: rows to unit norm first.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: ``(N,)`` per anchor; the mean is then sum(w l) / sum(w).
        return_stats: also return `MMCLStats`.
        backend: ``"triton"``, ``"cpp"``, ``"torch"`` or None, as everywhere; all of them do the same dense algebra.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats). 0 for an anchor without negatives.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown option, one out of its range, or N x N matrices
            larger than the memory that is available.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Warns:
        RuntimeWarning: pgd did not converge; with the residual.

    Source: Shah, Sra, Chellappa, Cherian, AAAI 2022 (MMCL).

    Example:
        >>> mmcl_loss(torch.randn(16, 8), torch.randn(16, 8), sigma=5.0, solver="pgd").shape
        torch.Size([])
    """
    checks.features("z0", z0)
    checks.features("z1", z1)
    checks.alike("z0", z0, "z1", z1)
    checks.not_empty("z0", z0)
    check_options(z0, reduction=reduction, weight=weight)
    if backend is not None:
        checks.choice("backend", backend, tuple(BACKENDS))
    options = solver_from(
        z0, sigma, gamma, kernel=kernel, C=C, reg=reg, kxx=kxx, solver=solver, use_norm=use_norm, eta=eta,
        nesterov=nesterov, a0=a0, stop=stop, tolerance=tolerance, max_iterations=max_iterations,
    )  # fmt: skip
    block = check_blocks(z0, options, alpha0, block_size)
    x, z = (rows(view, normalize) for view in (z0, z1))
    x, z = x.to(compute_dtype(x)), z.to(compute_dtype(z))
    # The kernel of unit rows is then above exp(-1). The value of a tensor is not read.
    less_one = not isinstance(options.sigma, Tensor) and options.sigma >= 4
    losses, measures, stats = [], [], []
    # The features have the dtype that autocast wants; the algebra keeps float32.
    with torch.autocast(z0.device.type, enabled=False):
        for first, second in zip(x.split(block), z.split(block), strict=True):
            with torch.no_grad():
                problem = Problem.of(first.detach(), options)
            solution = solve(problem, options, alpha0)
            measures.append(solution.measure)
            if return_stats:
                stats.append(dual_stats(problem, solution))
            del problem
            # The anchor itself, on the diagonal, has the weight that makes those of a row add up to 0.
            weights = solution.alpha
            weights.diagonal().copy_(-weights.sum(1))
            values = kernel_matrix(second, first, options.kernel, options.sigma, less_one=less_one)
            losses.append((weights * values).sum(1))
    _check_converged(measures, options)
    loss = reduce(torch.cat(losses), weight, reduction)
    return (loss, merged_stats(stats)) if return_stats else loss


def solver_from(x: Tensor, sigma: float | Tensor, gamma: str | None, **options) -> Solver:
    """The checked options of the solver."""
    if gamma is not None:
        checks.choice("gamma", gamma, ("auto",))
        sigma = 1.0 / max(x.shape[-1], 1)
    return Solver(sigma=checks.scalar("sigma", sigma, x), **options)


def check_blocks(x: Tensor, options: Solver, alpha0: Tensor | None, block_size: int | None) -> int:
    """The size of a block; raises for a start of another shape and for what does not fit into memory."""
    n = x.shape[0]
    if block_size is not None and (isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1):
        raise ValueError(f"block_size {block_size!r} must be a positive integer or None")
    if alpha0 is not None:
        checks.tensor("alpha0", alpha0)
        if options.solver != "pgd":
            raise ValueError("alpha0 is where solver='pgd' starts; solver='inverse' takes none")
        if block_size is not None and block_size < n:
            raise ValueError("alpha0 and block_size are both given; a start of the blocks is not supported")
        if not alpha0.dtype.is_floating_point:
            raise TypeError(f"alpha0 has dtype {alpha0.dtype}; expected a floating dtype")
        if tuple(alpha0.shape) != (n, n):
            raise ValueError(f"alpha0 {checks.shape(alpha0)} must have shape ({n}, {n}), one row per anchor")
        checks.same_device("alpha0", alpha0, x)
    block = n if block_size is None else min(block_size, n)
    _check_memory(n, block, options.solver, x)
    return block
