"""What a backend is: the contract that `torch`, `cpp` and `triton` fulfil as modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Backend(Protocol):
    """One implementation of the sweep and of the small operators around it."""

    @property
    def name(self) -> str:
        """The name in ``backend=`` and in the names of its operators, ``<name>_forward`` and so on."""

    @property
    def saved_scores_bytes(self) -> int:
        """How many bytes of similarities a sweep saves for its backward unless a limit is set."""

    @property
    def operators(self) -> Mapping[str, Callable[..., Any] | None]:
        """The operators of `engine.spec.SCHEMAS` that it has; None for one that the C++ extension registers.

        Every backend has ``forward``, ``backward``, ``unit_rows``, ``unit_rows_backward`` and ``views``. The first two
        take grouped arguments:

        - ``forward(inputs: Inputs, what: Description, *, maximum: bool, save_scores: bool) -> Statistics``;
        - ``backward(upstream: Upstream, inputs: Inputs, what: Description, wanted: Wanted, scores: Tensor | None, *,
          float32_gradients: bool) -> Gradients``.

        So does ``softmax_total(weight: Tensor, own: Tensor, inputs: Inputs, what: Description, wanted) ->
        SoftmaxTotal``. The torch backend alone has ``guided_forward`` and ``guided_backward``, which are the first two
        with ``guide: Guide``, and ``softmax_mean`` with its backward.
        """

    def not_supported_reasons(self, x: Tensor) -> list[str]:
        """Return why the backend cannot run on x; nothing if it can."""

    def statistic_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of the statistics of features like x, at least as wide as the compute dtype."""

    def score_dtype(self, x: Tensor, y: Tensor | None) -> torch.dtype | None:
        """Return the dtype of saved similarities; None if they are not saved for these features."""
