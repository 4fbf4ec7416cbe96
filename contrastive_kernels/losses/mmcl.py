"""MMCL, max-margin contrastive learning: the function and its module. The one loss that stores N x N matrices."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from contrastive_kernels.losses._arguments import GroupArguments, Loss, ReductionArguments
from contrastive_kernels.losses._module import LossModule
from contrastive_kernels.losses._options import check_reduction, reduce
from contrastive_kernels.losses._svm import (
    WITH_SIGMA,
    MMCLStats,
    Problem,
    Solver,
    dual_stats,
    join_stats,
    kernel_matrix,
    solve,
)
from contrastive_kernels.primitives import (
    Group,
    available_bytes,
    checks,
    compute_dtype,
    one_process_only,
    over_ranks,
    reading_is_possible,
    unit_rows,
    warn,
)

__all__ = ["MMCLLoss", "MMCLStats", "mmcl_loss"]

# Square matrices that live at a time, measured; the free memory is not looked up for less than this many bytes of them.
MATRICES = {"inverse": 14, "pgd": 19}
UNCHECKED_BYTES = 256 << 20


class MMCLArguments(ReductionArguments, GroupArguments, total=False):
    """Keyword arguments of `mmcl_loss`."""

    gamma: Literal["auto"] | None
    reg: float
    kxx: Literal["one", "exact"]
    solver: Literal["inverse", "pgd"]
    use_norm: bool
    eta: float
    nesterov: bool
    alpha0: Tensor | None
    a0: float
    stop: Literal["kkt", "change"]
    tolerance: float
    max_iterations: int
    block_size: int | None
    normalize: bool


@overload
def mmcl_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    kernel: Literal["rbf", "linear", "poly", "tanh", "min"] = "rbf",
    sigma: float | Tensor = 50.0,
    C: float = 100.0,
    return_stats: Literal[False] = False,
    **options: Unpack[MMCLArguments],
) -> Loss: ...
@overload
def mmcl_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    kernel: Literal["rbf", "linear", "poly", "tanh", "min"] = "rbf",
    sigma: float | Tensor = 50.0,
    C: float = 100.0,
    return_stats: Literal[True],
    **options: Unpack[MMCLArguments],
) -> tuple[Loss, MMCLStats]: ...
@overload
def mmcl_loss(
    z0: Tensor,
    z1: Tensor,
    *,
    kernel: Literal["rbf", "linear", "poly", "tanh", "min"] = "rbf",
    sigma: float | Tensor = 50.0,
    C: float = 100.0,
    return_stats: bool,
    **options: Unpack[MMCLArguments],
) -> Loss | tuple[Loss, MMCLStats]: ...
@over_ranks
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
    group: Group | None = None,
) -> Tensor | tuple[Tensor, MMCLStats]:
    r"""Return MMCL, the decision value of a support vector machine of each anchor against its negatives.

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
        sigma: of ``"rbf"`` and ``"tanh"`` alone; float or 0-dim tensor (differentiable).
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
        group: process group, one-dimensional mesh or ``"world"``: the rows of all its ranks are one batch. None: this
            process alone.

    Returns:
        0-dim, or ``(N,)`` for ``"none"``; float32 (float64 for float64 inputs). With ``return_stats`` the pair
        (loss, stats). 0 for an anchor without negatives.

    Raises:
        ValueError: shapes that do not fit, an empty batch, an unknown option, one out of its range or without effect
            (those of pgd with ``"inverse"``, ``eta`` with ``use_norm``, ``a0`` without ``nesterov``, ``sigma`` of a
            kernel that has none or with ``gamma``), or N x N matrices larger than the memory that is available.
        TypeError: dtypes that differ or are not floating.
        RuntimeError: tensors on different devices.

    Warns:
        RuntimeWarning: pgd did not converge; with the residual.

    Source: Shah, Sra, Chellappa, Cherian, AAAI 2022 (MMCL).

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.mmcl_loss(torch.randn(16, 8), torch.randn(16, 8), sigma=5.0, solver="pgd").shape
        torch.Size([])
    """
    one_process_only("mmcl_loss", group)
    checks.paired("z0", z0, "z1", z1)
    check_reduction(z0, reduction, weight)
    if gamma is not None:
        checks.choice("gamma", gamma, ("auto",))
        checks.no_effect("gamma='auto'", sigma=(sigma, 50.0))
        if kernel not in WITH_SIGMA:
            checks.no_effect(f"kernel={kernel!r}", gamma=(gamma, None))
        sigma = 1.0 / max(z0.shape[-1], 1)
    options = Solver(
        kernel=kernel,
        sigma=checks.scalar("sigma", sigma, z0),
        C=checks.number("C", C),
        reg=checks.number("reg", reg),
        kxx=kxx,
        solver=solver,
        use_norm=use_norm,
        eta=checks.number("eta", eta),
        nesterov=nesterov,
        a0=checks.number("a0", a0),
        stop=stop,
        tolerance=checks.number("tolerance", tolerance),
        max_iterations=checks.count("max_iterations", max_iterations),
    )
    block = check_blocks(z0, options, alpha0, block_size)
    x, z = (unit_rows(view, normalize) for view in (z0, z1))
    x, z = x.to(compute_dtype(x)), z.to(compute_dtype(z))
    # The kernel of unit rows is then above exp(-1). The value of a tensor is not read.
    less_one = not isinstance(options.sigma, Tensor) and options.sigma >= 4
    losses, measures, stats = [], [], []
    # The features have the dtype that autocast wants; the algebra keeps float32.
    with torch.autocast(z0.device.type, enabled=False):
        # one block is not split, so that a graph for every batch size can be made
        blocks = ((x, z),) if block_size is None else zip(x.split(block), z.split(block), strict=True)
        for first, second in blocks:
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
    _warn_unless_converged(measures, options)
    loss = reduce(torch.cat(losses), weight, reduction)
    return (loss, join_stats(stats)) if return_stats else loss


class MMCLLoss(LossModule):
    """`mmcl_loss` as a module. The official schedule divides ``sigma`` by 10 at epochs 75 and 125: assign to it.

    Args:
        kernel: ``"rbf"``, ``"linear"``, ``"poly"``, ``"tanh"`` or ``"min"``.
        sigma: of the kernels rbf and tanh; an ``nn.Parameter`` is trained.
        C: upper bound of the coefficients, -1 for none.
        options: further keyword arguments of `mmcl_loss`.

    Source: Shah, Sra, Chellappa, Cherian, AAAI 2022.

    Example:
        >>> import torch
        >>> import contrastive_kernels as ck
        >>> ck.MMCLLoss(sigma=5.0, solver="pgd")(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(mmcl_loss)

    def __init__(
        self,
        kernel: Literal["rbf", "linear", "poly", "tanh", "min"] = "rbf",
        sigma: float | Tensor = 50.0,
        C: float = 100.0,
        *,
        return_stats: bool = False,
        **options: Unpack[MMCLArguments],
    ) -> None:
        super().__init__(kernel=kernel, sigma=sigma, C=C, return_stats=return_stats, **options)

    def forward(self, z0: Tensor, z1: Tensor, **inputs: Any) -> Tensor | tuple[Tensor, MMCLStats]:
        """Return the loss; `inputs` are per-batch keyword arguments: weight, alpha0."""
        return self.function(z0, z1, **self.options(**inputs))


def check_blocks(x: Tensor, options: Solver, alpha0: Tensor | None, block_size: int | None) -> int:
    """Return the size of a block; raise for a start of another shape and for what does not fit into memory."""
    n = x.shape[0]
    block_size = checks.plain(block_size)
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


def _check_memory(n: int, block: int, solver: str, x: Tensor) -> None:
    """Raise if the matrices would exhaust the machine. The solutions of the blocks stay until the backward."""
    if torch.compiler.is_compiling():
        return
    needed = (MATRICES[solver] * block**2 + 2 * n * block) * compute_dtype(x).itemsize
    if needed < UNCHECKED_BYTES:
        return
    available = available_bytes(x)
    if available is not None and needed > available:
        raise ValueError(
            f"mmcl_loss stores N x N matrices: N = {n} in blocks of {block} needs about {needed} bytes and {available} "
            f"are available on {x.device}; pass a smaller batch or a smaller block_size"
        )


def _warn_unless_converged(measures: list[Tensor], options: Solver) -> None:
    """Warn once for all blocks. Reading the result back is the only wait for the device, after the solve."""
    if options.solver != "pgd" or not reading_is_possible(measures[0]):
        return
    worst = float(torch.stack(measures).amax())
    if worst > options.tolerance:
        # To one digit: Python shows a repeated text once.
        what = "KKT residual" if options.stop == "kkt" else "relative change"
        warn(
            f"mmcl_loss: solver='pgd' did not converge in {options.max_iterations} iterations: the {what} is "
            f"{worst:.0e}, tolerance {options.tolerance:.0e}; the loss is that of the last iterate",
            RuntimeWarning,
        )
