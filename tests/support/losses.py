"""What the tests of the losses share: modules beside their functions, refusals, the size of what operations return."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# float64 by default, for closed forms
double = pytest.mark.usefixtures("double")


def assert_exact(actual: Tensor, expected: Tensor | float | list[float]) -> None:
    """Raise unless numbers in float64 agree to twelve digits."""
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-13)


def assert_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    """Raise unless the call raises exactly that type of error, with the message in its text."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {caught.value}"
    assert message in str(caught.value), f"{message!r} is not in {str(caught.value)!r}"


def assert_module_is_function(
    module: type[nn.Module],
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    options: dict,
    backend: str | None = None,
    **of_the_batch: Tensor,
) -> None:
    """Raise unless the module returns what its function returns, also after a copy, and shows and checks its options.

    Args:
        module: the class; its instances hold `options` and the backend, if one is given.
        function: the loss function.
        inputs: its features.
        options: keyword arguments that the module holds.
        of_the_batch: keyword arguments that come with every call.
    """
    held = options if backend is None else {**options, "backend": backend}
    loss = module(**held)
    expected = function(*inputs, **held, **of_the_batch)
    again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(loss(*inputs, **of_the_batch), expected), "the module is not its function"
    assert torch.equal(again(*inputs, **of_the_batch), expected), "a copy of the module is not its function"
    for option, value in options.items():
        assert f"{option}={value}" in repr(loss), f"{option} is not in {loss!r}"
    with pytest.raises(TypeError, match="tau"):
        module(**held, tau=0.1)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out
