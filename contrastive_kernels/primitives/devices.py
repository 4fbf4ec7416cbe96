"""What may be asked while a loss runs: how much memory there is, and whether a value or a size is known."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

__all__ = ["available_bytes", "known", "reading_is_free", "reading_is_possible"]


def available_bytes(x: Tensor) -> int | None:
    """Return the memory that can still be had on the device of x; None if unknown."""
    device = x.device
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    found = []
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.exists():
        found += [1024 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line]
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        found.append(int(text))
    return min(found, default=None)


def reading_is_free(x: Tensor) -> bool:
    """Return whether a value of x can be read without a wait: on a CPU, not under torch.compile nor a transform."""
    return x.device.type == "cpu" and reading_is_possible(x)


def reading_is_possible(x: Tensor) -> bool:
    """Return whether a value of x can be read at all.

    Not under torch.compile or a `torch.func` transform, of a tensor without data, or while a CUDA graph is captured.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if x.is_meta or isinstance(x, FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def known(condition: bool) -> bool:
    """Return whether a condition on sizes holds; under torch.compile, whether it holds for every size of the graph.

    There a condition that is not known becomes no guard, with which a graph would serve some sizes only.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # a second to import

    return statically_known_true(condition)
