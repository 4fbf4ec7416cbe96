"""How much scratch memory one call may take beside its inputs, outputs and a few vectors."""

from __future__ import annotations

import os

__all__ = ["set_workspace_limit", "workspace_limit"]

DEFAULT_MB = 512
ENVIRONMENT_VARIABLE = "CONTRASTIVE_KERNELS_WORKSPACE_MB"

_limit: int | None = None


def set_workspace_limit(size: int | None) -> None:
    """Limit the scratch memory of one call, forward or backward, of every loss in this process.

    A GPU uses it for partial sums and, where the gradient does not fit in registers, for a chunk of dL/dS. The PyTorch
    backend takes 32 MiB for its chunks or what the limit allows, the C++ backend keeps up to 4 MiB of similarities; its
    tiles, about 1 MiB a thread, are not counted. The default is 512 MiB, or what the environment variable
    ``CONTRASTIVE_KERNELS_WORKSPACE_MB`` says.

    Args:
        size: bytes, positive; None for the default again. What one tile needs is always taken.

    Raises:
        ValueError: size is not positive.
        TypeError: size is not an integer.

    Example:
        >>> set_workspace_limit(128 << 20)
        >>> workspace_limit() >> 20
        128
        >>> set_workspace_limit(None)
    """
    global _limit
    if size is not None:
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"size must be an integer number of bytes or None, not {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"size {size} must be positive; None is the default")
    _limit = size


def workspace_limit() -> int:
    """The limit in bytes that `set_workspace_limit`, the environment or the default gives.

    Raises:
        ValueError: the environment variable is not a positive number.
    """
    if _limit is not None:
        return _limit
    text = os.environ.get(ENVIRONMENT_VARIABLE) or str(DEFAULT_MB)
    try:
        size = int(float(text) * 2**20)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={text!r} must be a positive number of MiB")
    return size
