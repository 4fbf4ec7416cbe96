"""The sweep in C++ (``csrc/``): tiles that stay in the cache, on every core of the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.engine.spec import compute_dtype

name = "cpp"
# Reading a few saved scores takes less time than a fourth product.
saved_scores_bytes = 4 << 20

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

BUILD_COMMAND = "python setup.py build_ext --inplace"


def load(extension: str) -> tuple[dict[str, Any], str | None]:
    """Import the extension; return its ``build_info()`` and None, or an empty dict and why it cannot be used."""
    spec = importlib.util.find_spec(extension)
    if spec is None:
        return {}, f"the extension is not built; build it with `{BUILD_COMMAND}`"
    problem: str | None = None
    try:
        info = importlib.import_module(extension).build_info()
    except (ImportError, AttributeError) as error:  # AttributeError: built from sources without build_info
        version, problem = _built_for(Path(str(spec.origin))), f"the extension does not load ({error})"
    else:
        version = info["torch"]
    if version and version.split(".")[:2] != torch.__version__.split(".")[:2]:
        problem = f"the extension was built for torch {version}, this is torch {torch.__version__}"
    return ({}, f"{problem}; build it again: `{BUILD_COMMAND} --force`") if problem else (info, None)


def _built_for(extension: Path) -> str | None:
    """Return the version of torch that csrc/build_info.cpp wrote into the file, or None."""
    found = re.search(rb"contrastive_kernels: built for torch ([\w.+]+)", extension.read_bytes())
    return found[1].decode() if found else None


build_info, missing = load("contrastive_kernels._C")


# The extension registers the operators itself.
operators: Mapping[str, None] = (
    {} if missing else dict.fromkeys(("forward", "backward", "unit_rows", "unit_rows_backward", "views", "select"))
)


def not_supported_reasons(x: Tensor) -> list[str]:
    """Return why this backend cannot run on x; nothing if it can."""
    reasons = [missing] if missing else []
    if x.device.type != "cpu":
        reasons.append(f"x is on {x.device}, not on the CPU")
    if x.dtype not in DTYPES:
        reasons.append(f"x is {x.dtype}, not one of {', '.join(map(str, DTYPES))}")
    return reasons


def statistic_dtype(x: Tensor) -> torch.dtype:
    """Return float64: it carries sums of exponentials, and the backward subtracts them from logits of magnitude 100."""
    return torch.float64


def score_dtype(x: Tensor, y: Tensor | None) -> torch.dtype | None:
    """Return the compute dtype; None for x with itself, where the visited half depends on the threads."""
    return None if y is None else compute_dtype(x)
