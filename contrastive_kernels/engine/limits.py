"""How much memory a call may take beside its inputs, outputs and a few vectors: while it runs, and for its backward."""

from __future__ import annotations

import os

__all__ = ["saved_scores_limit", "set_saved_scores_limit", "set_workspace_limit", "workspace_limit"]


class _Limit:
    """A number of bytes: what was set, or else the environment variable in MiB, or else the default."""

    def __init__(self, environment_variable: str, default: int | None, least: int) -> None:
        self.environment_variable, self.default, self.least = environment_variable, default, least
        self.size: int | None = None

    def set(self, size: int | None) -> None:
        if size is not None:
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"size must be an integer number of bytes or None, not {type(size).__name__}")
            if size < self.least:
                raise ValueError(f"size {size} must be at least {self.least}; None is the default")
        self.size = size

    def get(self) -> int | None:
        if self.size is not None:
            return self.size
        text = os.environ.get(self.environment_variable)
        if not text:
            return self.default
        try:
            size = int(float(text) * 2**20)
        except (ValueError, OverflowError):
            size = -1
        if size < self.least:
            raise ValueError(
                f"{self.environment_variable}={text!r} must be a number of MiB, {self.least} bytes or more"
            )
        return size


_workspace = _Limit("CONTRASTIVE_KERNELS_WORKSPACE_MB", 512 << 20, 1)
_saved_scores = _Limit("CONTRASTIVE_KERNELS_SAVED_SCORES_MB", None, 0)


def set_workspace_limit(size: int | None) -> None:
    """Limit the scratch memory of one call, forward or backward, of every loss in this process.

    A GPU uses it for partial sums and, where the gradient does not fit in registers, for a chunk of dL/dS. The PyTorch
    backend takes 32 MiB for its chunks or what the limit allows. Not counted are the C++ backend's tiles, about 1 MiB a
    thread, and gradients that are summed in float32 before they are rounded. Over a group of processes a weighted sum
    over all pairs keeps gradients for its backward, up to half of the limit. The default is 512 MiB, or what the
    environment variable ``CONTRASTIVE_KERNELS_WORKSPACE_MB`` says.

    Args:
        size: bytes, positive; None for the default again. What one tile needs is always taken.

    Raises:
        ValueError: size is not positive.
        TypeError: size is not an integer.

    Example:
        >>> import contrastive_kernels as ck
        >>> ck.set_workspace_limit(128 << 20)
        >>> ck.workspace_limit() >> 20
        128
        >>> ck.set_workspace_limit(None)
    """
    _workspace.set(size)


def workspace_limit() -> int:
    """The limit in bytes that `set_workspace_limit`, the environment or the default gives.

    Raises:
        ValueError: the environment variable is not a positive number.
    """
    size = _workspace.get()
    assert size is not None  # it has a default
    return size


def set_saved_scores_limit(size: int | None) -> None:
    """Let every sweep whose N x M similarities take at most `size` bytes save them for its backward.

    One of four matrix products less, for memory that grows with N x M: for those with memory to spare. A GPU takes 2
    bytes for a pair of float16 or bfloat16 features, whose similarities are saved as 16-bit fractions of the product of
    the two norms (only above 256 dimensions, where chunks of dL/dS are made; not with a cutoff), and 4 bytes for one of
    float32 features; so does the C++ backend (8 for float64; not of x with itself). The PyTorch backend saves none.
    On a CPU a CLIP step of 4,096 rows became 1.2 times as fast at 512 dimensions, 1.3 times at 1,024, and slower at
    128; on a GPU it has not been measured. The default is what the environment variable
    ``CONTRASTIVE_KERNELS_SAVED_SCORES_MB`` says, or else 4 MiB on a CPU and nothing on a GPU.

    Args:
        size: bytes, 0 for never; None for the default again.

    Raises:
        ValueError: size is negative.
        TypeError: size is not an integer.

    Example:
        >>> import contrastive_kernels as ck
        >>> ck.set_saved_scores_limit(8 << 30)  # 65,536 x 65,536 pairs of 2 bytes
        >>> ck.saved_scores_limit() >> 30
        8
        >>> ck.set_saved_scores_limit(None)
    """
    _saved_scores.set(size)


def saved_scores_limit() -> int | None:
    """The limit in bytes that `set_saved_scores_limit` or the environment gives; None: each backend's own.

    Raises:
        ValueError: the environment variable is not a number that is at least 0.
    """
    return _saved_scores.get()
