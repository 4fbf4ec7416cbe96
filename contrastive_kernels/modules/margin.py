"""`mmcl_loss` as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from contrastive_kernels.functional.margin import MMCLStats, mmcl_loss
from contrastive_kernels.modules.common import FunctionLoss

__all__ = ["MMCLLoss"]


class MMCLLoss(FunctionLoss):
    """`mmcl_loss` as a module. The official schedule divides ``sigma`` by 10 at epochs 75 and 125: assign to it.

    Args:
        kernel: ``"rbf"``, ``"linear"``, ``"poly"``, ``"tanh"`` or ``"min"``.
        sigma: of the kernels rbf and tanh; an ``nn.Parameter`` is trained.
        C: upper bound of the coefficients, -1 for none.
        options: further keyword arguments of `mmcl_loss`.

    Source: Shah, Sra, Chellappa, Cherian, AAAI 2022.

    Example:
        >>> MMCLLoss(sigma=5.0, solver="pgd")(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """

    function = staticmethod(mmcl_loss)

    def __init__(self, kernel: str = "rbf", sigma: float | Tensor = 50.0, C: float = 100.0, **options: Any) -> None:
        super().__init__(kernel=kernel, sigma=sigma, C=C, **options)

    def forward(self, z0: Tensor, z1: Tensor, **inputs: Tensor) -> Tensor | tuple[Tensor, MMCLStats]:
        """The loss; `inputs` are per-batch keyword arguments: weight, alpha0."""
        return self.function(z0, z1, **self.options(), **inputs)
