"""The backends in order of preference, and the choice between them.

A backend is a module with ``name``, ``SAVED_SCORES_BYTES``, ``not_supported_reasons(x) -> list[str]``,
``statistic_dtype(x)``, ``score_dtype(x, y)`` and the functions ``forward``, ``backward``, ``unit_rows``,
``unit_rows_backward`` and ``view_minimum``, whose schemas and meaning `contrastive_kernels.sweep` gives.
"""

from __future__ import annotations

import os

from torch import Tensor

from contrastive_kernels.backends import cpp, torch, triton

__all__ = ["BACKENDS", "choose_backend"]

BACKENDS = {backend.name: backend for backend in (triton, cpp, torch)}
ENVIRONMENT_VARIABLE = "CONTRASTIVE_KERNELS_BACKEND"


def choose_backend(x: Tensor, requested: str | None = None) -> str:
    """The requested backend, that of the environment variable, or the first that takes x.

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: the requested backend does not take x; the message lists every backend with its reasons.
    """
    requested = requested or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if requested is None:
        return next(name for name, backend in BACKENDS.items() if not backend.not_supported_reasons(x))
    if requested not in BACKENDS:
        raise ValueError(f"backend {requested!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))} or None")
    if BACKENDS[requested].not_supported_reasons(x):
        lines = [
            f"  {name}: {'; '.join(backend.not_supported_reasons(x)) or 'supported'}"
            for name, backend in BACKENDS.items()
        ]
        raise NotImplementedError(f"backend {requested!r} does not support this input:\n" + "\n".join(lines))
    return requested
