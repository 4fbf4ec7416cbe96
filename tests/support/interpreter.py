"""Triton's interpreter made stricter: it computes as a GPU does where numpy differs, and can check every address."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

# Below these, 2^-126, numbers of float32 are denormal.
LEAST_NORMAL = np.finfo(np.float32).tiny
# Operations that are compiled as `.ftz`; products, sums and logarithms keep denormals.
FLUSHING = ("create_exp2", "create_sqrt", "create_rsqrt")
# What several programs of a launch may write, all of them the same value.
RAISED = ("shift_failed",)


def compute_as_hardware(patch: pytest.MonkeyPatch) -> None:
    """Let maxima and minima pass over NaN, and exponentials and roots flush denormals, as NVIDIA's do.

    numpy does neither; `test_aot.py` checks that the compiler does.
    """
    for name, operation in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        patch.setattr(InterpreterBuilder, name, _binary(operation))
    for name in FLUSHING:
        patch.setattr(InterpreterBuilder, name, _flushed(getattr(InterpreterBuilder, name)))


def _binary(operation: np.ufunc) -> Callable:
    return lambda builder, left, right: builder.binary_op(left, right, operation)


def _flushed(compute: Callable) -> Callable:
    def flush(handle):
        if handle.data.dtype == np.float32:
            handle = handle.clone()
            handle.data[np.abs(handle.data) < LEAST_NORMAL] = 0
        return handle

    return lambda builder, argument: flush(compute(builder, flush(argument)))


def patch_language_once(patch: pytest.MonkeyPatch) -> None:
    """Let a launch replace the language's functions once, not in every call of a device function: it saves time."""
    replace, run = interpreter._patch_builtin, GridExecutor.__call__
    replaced = set()

    def replace_once(package, *rest):
        if package not in replaced:
            replaced.add(package)
            replace(package, *rest)

    def run_afresh(executor, *arguments, **named):
        replaced.clear()
        run(executor, *arguments, **named)

    patch.setattr(interpreter, "_patch_builtin", replace_once)
    patch.setattr(GridExecutor, "__call__", run_afresh)


class MemoryCheck:
    """Check that a launch touches its arguments alone, and that no program touches what another one writes.

    Every address has to lie between the first and the last element of a tensor among the arguments. A violation is an
    error of the launch. `launches` and `accesses` count what was checked, `kernels` the launches by name.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launches = self.accesses = 0
        self.kernels: Counter[str] = Counter()
        self._extents: list[tuple[int, int]] = []
        self._raised: list[int] = []
        self._touched: dict[str, dict[tuple, list[np.ndarray]]] = {}
        load, store, atomic = (
            getattr(InterpreterBuilder, name)
            for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
        )
        run = GridExecutor.__call__

        def checked_load(builder, pointers, mask, *rest, **more):
            self._touch("read", builder, pointers, mask)
            return load(builder, pointers, mask, *rest, **more)

        def checked_store(builder, pointers, value, mask, *rest, **more):
            self._touch("written", builder, pointers, mask)
            return store(builder, pointers, value, mask, *rest, **more)

        def checked_atomic(builder, operation, pointers, value, mask, *rest, **more):
            self._touch("changed", builder, pointers, mask)
            return atomic(builder, operation, pointers, value, mask, *rest, **more)

        def checked_run(executor, *arguments, **named):
            self._begin([*arguments, *named.values()], [named[name] for name in RAISED if named.get(name) is not None])
            run(executor, *arguments, **named)
            self._end(executor.fn.__name__)

        patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", checked_atomic)
        patch.setattr(GridExecutor, "__call__", checked_run)

    def _begin(self, arguments: list, raised: list[torch.Tensor]) -> None:
        self._extents = sorted(_extents(arguments))
        self._raised = [tensor.data_ptr() for tensor in raised]
        self._touched = {kind: defaultdict(list) for kind in ("read", "written", "changed")}

    def _touch(self, kind: str, builder, pointers, mask) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, end in self._extents:
            inside |= (addresses >= first) & (addresses + size <= end)
        outside = int((~inside).sum())
        assert not outside, f"{outside} of {addresses.size} addresses {kind} lie outside the arguments"
        self.accesses += addresses.size
        self._touched[kind][builder.grid_idx].append(addresses)

    def _end(self, name: str) -> None:
        self.launches += 1
        self.kernels[name] += 1
        written = {
            program: np.setdiff1d(np.concatenate(parts), self._raised)
            for program, parts in self._touched["written"].items()
        }
        places = np.concatenate([np.empty(0, np.int64), *written.values()])
        owners = np.repeat(np.arange(len(written)), [len(addresses) for addresses in written.values()])
        order = np.argsort(places, kind="stable")
        places, owners = places[order], owners[order]
        assert (places[1:] != places[:-1]).all(), f"two programs of {name} write one address"
        if not places.size:
            return
        numbers = {program: number for number, program in enumerate(written)}
        for kind in ("read", "changed"):
            for program, parts in self._touched[kind].items():
                used = np.concatenate(parts)
                found = np.searchsorted(places, used).clip(max=len(places) - 1)
                theirs = (places[found] == used) & (owners[found] != numbers.get(program, -1))
                assert not theirs.any(), f"a program of {name} writes an address that is {kind} by another one"


def _extents(arguments: list) -> Iterator[tuple[int, int]]:
    """Yield where each tensor among the arguments begins and ends, in bytes."""
    for leaf in tree_leaves(arguments):
        tensor = leaf.base if isinstance(leaf, TensorDescriptor) else leaf
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            yield tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
