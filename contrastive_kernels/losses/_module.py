"""What the modules share: a loss function with its options held, and a queue of past keys."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from contrastive_kernels.losses._options import REDUCTIONS
from contrastive_kernels.losses._polarization import check_polarization
from contrastive_kernels.primitives import Group, checks, shards_for, unit_rows


class LossModule(nn.Module):
    """Hold the keyword arguments of a loss function as attributes, which may be set anew, and call it with them.

    Tensors given to the constructor become buffers and parameters: they are moved, saved and trained with the module.
    """

    function: ClassVar[Callable[..., Any]]
    __signature__: ClassVar[inspect.Signature]
    reductions = REDUCTIONS  # what the function takes

    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an option; PyTorch's annotation allows tensors and modules alone."""

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
        parameters = inspect.signature(self.function).parameters.values()
        self._defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        self._check(options)
        for name, value in (self._defaults | options).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                # Dynamo takes a number of NumPy for an array.
                setattr(self, name, checks.plain(value))

    def _check(self, options: dict[str, Any]) -> None:
        """Raise for an option that is none, or whose value no batch could make right."""
        choices = _choices(self.function)
        for name, value in options.items():
            if name not in self._defaults:
                of_the_call = name in inspect.signature(self.forward).parameters
                hint = ": give it to the call" if of_the_call else f"; it takes {', '.join(self._defaults)}"
                raise TypeError(f"{type(self).__name__} has no option {name!r}{hint}")
            if name in choices:
                checks.choice(name, value, choices[name])
            elif name == "reduction":
                checks.choice(name, value, self.reductions)
            elif name == "label_smoothing":
                checks.label_smoothing(value)
            elif name == "polarization":
                check_polarization(value)

    def options(self, **of_the_call: Any) -> dict[str, Any]:
        """Return the held keyword arguments as they are now, and those of a call.

        Raises:
            TypeError: the call has one that the module holds.
        """
        held = {name: getattr(self, name) for name in self._defaults}
        for name in of_the_call:
            value = held.get(name)
            if _differs(value, self._defaults.get(name)):
                shown = "" if isinstance(value, Tensor) else f"={value!r}"
                raise TypeError(
                    f"{type(self).__name__} holds {name}{shown}, and the call gives {name} again; "
                    "give it to the constructor or to the call"
                )
        return held | of_the_call

    def extra_repr(self) -> str:
        """Return the options that are not the function's defaults, for the module's repr."""
        held = {name: getattr(self, name) for name in self._defaults}
        return ", ".join(f"{name}={value}" for name, value in held.items() if _differs(value, self._defaults[name]))


@functools.cache
def _choices(function: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """Return the strings that arguments of a function may be, by name; its annotations take long to read."""
    kinds = get_type_hints(function)
    return {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) is Literal}


def _differs(value: object, default: object) -> bool:
    return isinstance(value, Tensor) or value != default


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
    normalize: bool
    group: Group | None

    def __init__(self, dim: int, queue_size: int, **options: Any) -> None:
        super().__init__(**options)
        dim, queue_size = checks.count("dim", dim), checks.count("queue_size", queue_size)
        self.register_buffer("queue", torch.nn.functional.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def options(self, **of_the_call: Any) -> dict[str, Any]:
        """Return the keyword arguments; rows are normalised before they are stored, not again for every batch."""
        if "normalize" in of_the_call:
            raise TypeError(f"{type(self).__name__} stores its keys as they are; give normalize to the constructor")
        return super().options(**of_the_call) | {"normalize": False}

    def unit_rows(self, name: str, x: Tensor) -> Tensor:
        """Return x as it enters the similarities; raise unless its rows have the dimension of the queue's."""
        checks.tensor(name, x)
        dim = self.queue.shape[1]
        if x.dim() > 1 and x.shape[-1] != dim:
            raise ValueError(
                f"{name} {checks.shape(x)} has rows of dimension {x.shape[-1]}, and this {type(self).__name__} was "
                f"made with dim={dim}; make it with dim={x.shape[-1]}"
            )
        return unit_rows(x, self.normalize)

    def extra_repr(self) -> str:
        """Return the dimensions of the queue, and the options as other modules show them."""
        queue_size, dim = self.queue.shape
        return ", ".join(filter(None, [f"dim={dim}, queue_size={queue_size}", super().extra_repr()]))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys; of more than queue_size keys the last ones stay."""
        keys = self._of_all_ranks(keys.to(self.queue.dtype))[-self.queue.shape[0] :]
        places = (self.position + torch.arange(keys.shape[0], device=keys.device)) % self.queue.shape[0]
        self.queue[places] = keys
        self.position.copy_((self.position + keys.shape[0]) % self.queue.shape[0])

    def _of_all_ranks(self, keys: Tensor) -> Tensor:
        """Return the keys of all ranks of the group, in rank order: the queue stays the same everywhere."""
        return shards_for(self.group, type(self).__name__, keys).gather(keys)
