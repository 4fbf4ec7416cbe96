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
                # Dynamo takes a number of NumPy for an array.
                setattr(self, name, checks.plain(value))
        self._options = {name: parameters[name].default for name in options}

    def options(self, **of_the_call: Any) -> dict[str, Any]:
        """Return the held keyword arguments as they are now, and those of a call.

        Raises:
            TypeError: the call has one that the module holds.
        """
        held = {name: getattr(self, name) for name in self._options}
        for name in of_the_call:
            value = held.get(name)
            if isinstance(value, Tensor) or value != self._options.get(name):
                shown = "" if isinstance(value, Tensor) else f"={value!r}"
                raise TypeError(
                    f"{type(self).__name__} holds {name}{shown}, and the call gives {name} again; "
                    "give it to the constructor or to the call"
                )
        return held | of_the_call

    def extra_repr(self) -> str:
        """Return the options that are not the function's defaults, for the module's repr."""
        held = {name: getattr(self, name) for name in self._options}
        return ", ".join(f"{name}={value}" for name, value in held.items() if value is not self._options[name])


class KeyQueue(LossModule):
    """A loss against a first-in-first-out queue of past keys, which are stored as they enter the similarities.

    The queue begins with random unit rows. On several ranks each has its own, of its own keys, and they differ; with
    ``group=`` all ranks store the keys of all, and the queues are one if they began as one: the same seed before the
    module is made, a checkpoint, or the module inside `DistributedDataParallel`, which copies the buffers of rank 0.

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

    def options(self, **of_the_call: Any) -> dict[str, Any]:
        """Return the keyword arguments; rows are normalised before they are stored, not again for every batch."""
        if "normalize" in of_the_call:
            raise TypeError(f"{type(self).__name__} stores its keys as they are; give normalize to the constructor")
        return super().options(**of_the_call) | {"normalize": False}

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
