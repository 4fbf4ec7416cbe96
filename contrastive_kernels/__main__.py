"""`python -m contrastive_kernels`: what this installation can run, and why it cannot run the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from contrastive_kernels import __version__
from contrastive_kernels.engine.backends import BACKENDS, ENVIRONMENT_VARIABLE, choose, cpp


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    """Return how the C++ extension was built and what it uses here, as text."""
    if not cpp.build_info:
        return "not available"
    info = cpp.build_info
    matrix_unit = "bfloat16 matrix unit" if info["bfloat16_matrix_unit"] else "no bfloat16 matrix unit"
    return (
        f"built for torch {info['torch']} as {info['standard']} with {info['compiler']}; "
        f"runs on {info['instruction_set']}, {matrix_unit}, {info['threads']} OpenMP threads"
    )


def report() -> str:
    """Return the report as text."""
    devices = [
        ("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"sm_{properties.major}{properties.minor}"
            devices.append((f"cuda:{index}", f"{properties.name}, {capability}, {properties.total_memory >> 30} GiB"))
    lines = [
        f"contrastive_kernels {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}",
        f"C++ extension: {_extension()}",
        f"{ENVIRONMENT_VARIABLE} = {os.environ.get(ENVIRONMENT_VARIABLE) or '(not set: by device)'}",
    ]
    for device, description in devices:
        x = torch.empty((1, 1), device=device)
        lines += ["", f"{device}: {description}", f"  default backend for float32: {choose(x).name}"]
        for name, backend in BACKENDS.items():
            lines.append(f"  {name:<7} {'; '.join(backend.not_supported_reasons(x)) or 'available'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
