"""Losses of other libraries under their own names: one changed import, the training loop stays.

``from contrastive_kernels.compat.lightly import NTXentLoss`` in place of ``from lightly.loss import NTXentLoss``: the
same signature, value, gradients, state and errors, without the N x N matrix. Importing this package imports no other
library; ``python -m contrastive_kernels.compat check`` compares every adapter with what is installed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from contrastive_kernels.compat._patch import Patch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ADAPTERS", "Patch", "patch_open_clip", "patch_transformers"]

# The modules of this package, by the name of the library that each stands in for.
ADAPTERS = (
    "info_nce",
    "lightly",
    "open_clip",
    "pytorch_metric_learning",
    "sentence_transformers",
    "solo",
    "stable_pretraining",
    "supcontrast",
    "torchmultimodal",
    "transformers",
)


def patch_open_clip() -> Patch:
    """Replace the losses in every loaded module of open_clip and of its trainer; see `compat.open_clip`.

    Returns:
        What puts them back: `Patch.undo`, or the end of a ``with`` block.

    Raises:
        ImportError: open_clip is not installed.

    Example:
        >>> with contrastive_kernels.compat.patch_open_clip():  # doctest: +SKIP
        ...     open_clip_train.main.main(arguments)
    """
    patch: Patch = _module("open_clip").patch_open_clip()
    return patch


def patch_transformers(model: nn.Module | None = None) -> Patch:
    """Compute the losses of CLIP and SigLIP models of transformers without their logits; see `compat.transformers`.

    Args:
        model: this model alone. None: all models of these classes, made before and after.

    Returns:
        What puts the original back: `Patch.undo`, or the end of a ``with`` block.

    Raises:
        ImportError: transformers is not installed.
        TypeError: the model is of another class.

    Example:
        >>> patch = contrastive_kernels.compat.patch_transformers(model)  # doctest: +SKIP
        >>> model(**inputs, return_loss=True).loss.backward()  # doctest: +SKIP
        >>> patch.undo()  # doctest: +SKIP
    """
    patch: Patch = _module("transformers").patch_transformers(model)
    return patch


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def __getattr__(name: str) -> Any:
    if name in ADAPTERS:
        return _module(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *ADAPTERS})
