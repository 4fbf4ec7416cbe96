"""A loss function with its hyper-parameters held by a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn


class FunctionLoss(nn.Module):
    """Holds keyword arguments of a loss function and calls it with them.

    Tensors among them become buffers and parameters, so that they are moved, saved and trained with the module.
    """

    function: ClassVar[Callable[..., Any]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        parameters = inspect.signature(self.function).parameters
        for name, value in options.items():
            if name not in parameters:
                known = ", ".join(p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY)
                raise TypeError(f"{type(self).__name__} has no option {name!r}; it takes {known}")
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._options = tuple(options)

    def options(self) -> dict[str, Any]:
        """The held keyword arguments as they are now."""
        return {name: getattr(self, name) for name in self._options}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options().items() if value is not None)
