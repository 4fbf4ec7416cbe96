"""Triton with a driver that is not there: launches specialise and compile as on a GPU, and run nothing."""

from __future__ import annotations

import pkgutil
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch.utils._pytree import tree_leaves
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from contrastive_kernels.engine.backends import triton as backend
from contrastive_kernels.engine.backends.triton import launch, tiles

LARGEST_GRID = (2**31 - 1, 65535, 65535)


def install_driver(patch: pytest.MonkeyPatch, architecture: int | str, device: object) -> GPUTarget:
    """Let Triton and the package's host code see a GPU of this architecture; kernels are kept by the device."""
    named = isinstance(architecture, str)
    target = GPUTarget("hip", architecture, 64) if named else GPUTarget("cuda", architecture, 32)
    there = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
    )
    patch.setattr(driver, "_active", there)
    patch.setattr(tiles, "_architecture", lambda device: architecture)
    patch.setattr(launch, "processors", lambda x: 132)
    full = "ieee" if named else launch.float32_precision()
    precision = property(lambda operands: full if operands.x.dtype == torch.float32 else "ieee")
    patch.setattr(launch.Operands, "precision", precision)
    return target


class FrontEnd:
    """Send all launches through the front end for a GPU, as far as Triton's own intermediate code.

    A kernel that does not compile raises from its launch. `launches` counts them, `compiled` has the distinct kernels,
    `grids` the grids by the kernel's name.
    """

    def __init__(self, patch: pytest.MonkeyPatch, architecture: int | str) -> None:
        self.launches, self.compiled, self.grids = 0, set(), defaultdict(list)
        # the name keeps kernels from those of a GPU that is there
        self._target = install_driver(patch, architecture, f"front end for {architecture}")
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", self._compile)
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


class Started(NamedTuple):
    """A launch as it reaches the driver."""

    kernel: CompiledKernel
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


class Host:
    """Let Triton's launch code run as on a GPU of sm_90, with kernels that are compiled at once and start nothing.

    `started` has the launches that reached the driver, `bound` counts those that Triton bound and looked up.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.started: list[Started] = []
        self.bound = self.compiled = 0
        self.device: object = object()  # another one than that of any kernel so far
        install_driver(patch, 90, self.device)
        patch.setattr(driver.active, "get_current_device", lambda: self.device)
        patch.setattr(launch, "_remembered", {})
        patch.setattr(JITFunction, "_do_compile", self._compile_in_place())
        run = JITFunction.run

        def counted_run(kernel, *arguments, **named):
            self.bound += 1
            return run(kernel, *arguments, **named)

        patch.setattr(JITFunction, "run", counted_run)

    def _compile_in_place(self):
        def compile_(kernel, key, signature, device, *_):
            self.compiled += 1
            binary = CompiledKernel.__new__(CompiledKernel)
            binary.name, binary.function, binary.packed_metadata, binary.src = kernel.fn.__name__, None, None, None
            binary.module, binary._module_pid = "loaded", None

            def start(*arguments):
                grid, hooks, rest = arguments[:3], arguments[7:9], arguments[9:]
                if hooks[0] is not None:
                    hooks[0](arguments[6])
                self.started.append(Started(binary, grid, rest))

            binary._run = start
            kernel.device_caches[device][0][key] = binary
            return binary

        return compile_


def replace_launches(patch: pytest.MonkeyPatch, function: Any) -> None:
    """Let every module of the backend launch by the function."""
    for module in pkgutil.iter_modules(backend.__path__, backend.__name__ + "."):
        if hasattr(sys.modules.get(module.name), "launch_kernel"):
            patch.setattr(sys.modules[module.name], "launch_kernel", function)
