"""Questions about devices: how much memory there is, and whether a tensor's value may be read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["available_bytes", "reading_is_free", "reading_is_possible"]


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
    """Return whether a value of x can be read without a wait: on a CPU, and not under torch.compile."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def reading_is_possible(x: Tensor) -> bool:
    """Return whether a value of x can be read at all: not under torch.compile, nor while a CUDA graph is captured."""
    return not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
