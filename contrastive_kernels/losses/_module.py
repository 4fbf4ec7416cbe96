"""What the modules share: a loss function with its options held, and a queue of past keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from contrastive_kernels.primitives import checks, shards_for, unit_rows


class LossModule(nn.Module):
    """Hold keyword arguments of a loss function and call it with them.

    Tensors among them become buffers and parameters, so that they are moved, saved and trained with the module.
    """

    function: ClassVar[Callable[..., Any]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        """Give the constructor the signature that `help` shows: its own arguments, then the function's options."""
        super().__init_subclass__()
        if not isinstance(vars(cls).get("function"), staticmethod):
            return
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        listed = [p for p in own if p.kind is not p.VAR_KEYWORD]
        known = {p.name for p in listed}
        options = [p for p in inspect.signature(cls.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        cls.__signature__ = inspect.Signature([*listed, *(p for p in options if p.name not in known)])

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
        """Return the held keyword arguments as they are now."""
        return {name: getattr(self, name) for name in self._options}

    def extra_repr(self) -> str:
        """Return the options that are not the function's defaults, for the module's repr."""
        defaults = {p.name: p.default for p in inspect.signature(self.function).parameters.values()}
        held = {name: value for name, value in self.options().items() if value is not defaults[name]}
        return ", ".join(f"{name}={value}" for name, value in held.items())


class KeyQueue(LossModule):
    """A loss against a first-in-first-out queue of past keys, which are stored as they enter the similarities.

    Args:
        dim: D, the dimension of the keys.
        queue_size: K, the number of keys kept.
        options: keyword arguments of the loss function.
    """

    queue: Tensor
    position: Tensor

    def __init__(self, dim: int, queue_size: int, **options: Any) -> None:
        super().__init__(**options)
        if dim < 1 or queue_size < 1:
            raise ValueError(f"dim {dim} and queue_size {queue_size} must be positive")
        self.register_buffer("queue", torch.nn.functional.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def options(self) -> dict[str, Any]:
        """Return the held keyword arguments; rows are normalised before they are stored, not again for every batch."""
        return super().options() | {"normalize": False}

    def unit_rows(self, name: str, x: Tensor) -> Tensor:
        """Return x as it enters the similarities."""
        checks.tensor(name, x)
        return unit_rows(x, getattr(self, "normalize", True))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys; of more than queue_size keys the last ones stay."""
        keys = self._of_all_ranks(keys.to(self.queue.dtype))[-self.queue.shape[0] :]
        places = (self.position + torch.arange(keys.shape[0], device=keys.device)) % self.queue.shape[0]
        self.queue[places] = keys
        self.position.copy_((self.position + keys.shape[0]) % self.queue.shape[0])

    def _of_all_ranks(self, keys: Tensor) -> Tensor:
        """Return the keys of all ranks of the group, in rank order: the queue stays the same everywhere."""
        return shards_for(getattr(self, "group", None), type(self).__name__, keys).gather(keys)
