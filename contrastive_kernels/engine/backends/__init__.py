"""The backends in order of preference, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from contrastive_kernels.engine import environment
from contrastive_kernels.engine.backends import cpp, torch, triton
from contrastive_kernels.engine.backends.base import Backend
from contrastive_kernels.engine.backends.triton import tiles

__all__ = ["BACKENDS", "ENVIRONMENT_VARIABLE", "Backend", "choose"]

BACKENDS: Mapping[str, Backend] = {backend.name: backend for backend in (triton, cpp, torch)}
ENVIRONMENT_VARIABLE = "CONTRASTIVE_KERNELS_BACKEND"


def choose(x: Tensor, requested: str | None = None, operator: str = "forward", pairs: int | None = None) -> Backend:
    """Return the backend for `operator` on x: the requested one, that of the environment variable, or the first.

    The first is the first that takes x, but for a sweep over few `pairs` on a GPU where PyTorch is faster. The PyTorch
    backend stands in for one that lacks the operator.

    Raises:
        ValueError: the requested backend does not exist, or that of the environment variable.
        NotImplementedError: the requested backend does not take x; the message lists every backend with its reasons.
    """
    of_environment = None if requested else environment.choice(ENVIRONMENT_VARIABLE, BACKENDS)
    requested = requested or of_environment
    if requested is None:
        chosen = next(backend for backend in BACKENDS.values() if not backend.not_supported_reasons(x))
        if chosen is torch and x.device.type == "cpu" and x.dtype in cpp.DTYPES:
            cpp.warn_once()
        if pairs is not None and chosen is triton and tiles.is_small(x, pairs):
            chosen = torch
    else:
        if requested not in BACKENDS:
            raise ValueError(
                f"backend {requested!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))} or None"
            )
        chosen = BACKENDS[requested]
        if chosen.not_supported_reasons(x):
            lines = [
                f"  {name}: {'; '.join(backend.not_supported_reasons(x)) or 'supported'}"
                for name, backend in BACKENDS.items()
            ]
            asked = f"{ENVIRONMENT_VARIABLE}={requested!r}" if of_environment else f"backend {requested!r}"
            raise NotImplementedError(f"{asked} does not support this input:\n" + "\n".join(lines))
    return chosen if operator in chosen.operators else torch
