"""Triton's front end with a driver that is not there: launches specialise and compile as on a GPU, and run nothing."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import triton
from torch.utils._pytree import tree_leaves
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from contrastive_kernels.engine.backends.triton import launch, tiles

LARGEST_GRID = (2**31 - 1, 65535, 65535)


class FrontEnd:
    """Send all launches through the front end for a GPU, as far as Triton's own intermediate code.

    A kernel that does not compile raises from its launch. `launches` counts them, `compiled` has the distinct kernels,
    `grids` the grids by the kernel's name.
    """

    def __init__(self, patch: pytest.MonkeyPatch, architecture: int | str) -> None:
        self.launches, self.compiled, self.grids = 0, set(), defaultdict(list)
        self._target = (
            GPUTarget("hip", architecture, 64) if isinstance(architecture, str) else GPUTarget("cuda", architecture, 32)
        )
        # kernels are kept by device: the name keeps them from those of a GPU that is there
        there = SimpleNamespace(
            get_current_target=lambda: self._target,
            get_current_device=lambda: f"front end for {architecture}",
            get_current_stream=lambda device: 0,
        )
        patch.setattr(driver, "_active", there)
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", self._compile)
        patch.setattr(tiles, "_architecture", lambda device: architecture)
        patch.setattr(launch, "processors", lambda x: 132)
        full = "ieee" if isinstance(architecture, str) else launch.float32_precision()
        precision = property(lambda operands: full if operands.x.dtype == torch.float32 else "ieee")
        patch.setattr(launch.Operands, "precision", precision)
        run = JITFunction.run

        def checked_run(kernel, *arguments, grid, **named):
            self.launches += 1
            self.grids[kernel.__name__].append(grid)
            assert all(1 <= size <= most for size, most in zip(grid, LARGEST_GRID, strict=False)), (kernel, grid)
            for leaf in tree_leaves([*arguments, *named.values()]):
                if isinstance(leaf, TensorDescriptor):
                    check_descriptor(leaf)
            return run(kernel, *arguments, grid=grid, **named)

        patch.setattr(JITFunction, "run", checked_run)

    def _compile(self, *, key, fn, compile, **_) -> bool:
        """Compile a kernel that is new; return that it is not to be compiled any further, nor launched."""
        if (fn.name, key) not in self.compiled:
            backend = make_backend(self._target)
            options = backend.parse_options({name: compile[name] for name in ("num_warps", "num_stages")})
            source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            implementation, modules = backend.get_codegen_implementation(options), backend.get_module_map()
            source.make_ir(self._target, options, implementation, modules, context)
            self.compiled.add((fn.name, key))
        return True


def check_descriptor(tiles: TensorDescriptor) -> None:
    """Assert what the hardware asks of a descriptor: alignment to 16 bytes, and boxes of at most 256 rows."""
    size = tiles.base.element_size()
    assert tiles.base.data_ptr() % 16 == 0
    assert tiles.strides[-1] == 1
    assert all(stride > 0 and stride * size % 16 == 0 for stride in tiles.strides[:-1]), tiles.strides
    assert all(0 < extent < 2**32 for extent in tiles.shape), tiles.shape
    assert all(side <= 256 for side in tiles.block_shape), tiles.block_shape
    assert tiles.block_shape[-1] * size % 16 == 0, tiles.block_shape
