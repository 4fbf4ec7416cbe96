"""The sweep in C++ (``contrastive_kernels/csrc/``): tiles that stay in the cache, on every core of the CPU."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contrastive_kernels.engine.backends.cpp import build
from contrastive_kernels.engine.spec import SCHEMAS, compute_dtype
from contrastive_kernels.engine.warn import called_while_traced, warn

name = "cpp"
# Reading a few saved scores takes less time than a fourth product.
saved_scores_bytes = 4 << 20

OPERATORS = ("forward", "backward", "softmax_total", "unit_rows", "unit_rows_backward", "views", "select")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def load(extension: str, cached: Path | None = None) -> tuple[dict[str, Any], str | None]:
    """Import the extension; return its ``build_info()`` and None, or an empty dict and why it cannot be used.

    The module of that name comes first, then the file ``cached``, by default the one that `build.build` puts into the
    cache for this torch.
    """
    package = extension.rpartition(".")[0]
    # in the folder of the package alone: what an editable installation adds finds that of another checkout
    spec = PathFinder.find_spec(extension, sys.modules[package].__path__ if package else None)
    problem = "the extension is not built"
    if spec is not None:
        info, problem = _load(spec)
        if info:
            return info, None
    try:
        cached = cached or build.cached()
    except (OSError, RuntimeError, ValueError):  # no sources, no home, no folder
        cached = None
    if cached is not None and cached.exists():
        info, cached_problem = _load(importlib.util.spec_from_file_location(extension, cached))
        if info:
            return info, None
        problem = cached_problem if spec is None else problem
    return {}, f"{problem}; build it {'again ' if 'not built' not in problem else ''}with `{build.COMMAND}`"


def _load(spec: ModuleSpec | None) -> tuple[dict[str, Any], str]:
    """Import a module from its specification; return its ``build_info()`` and "", or an empty dict and the problem.

    A library that was built for another torch or from other sources is not imported: what it registers stays.
    """
    assert spec
    content = Path(str(spec.origin)).read_bytes()
    if built := re.search(rb"contrastive_kernels: built for torch ([\w.+]+)", content):  # in csrc/build_info.cpp
        if not _serves(built[1].decode()):
            return {}, _for_other_torch(built[1].decode())
        # as in csrc/extension.cpp
        if not all(f"cpp_{operator}{SCHEMAS[operator]}".encode() in content for operator in OPERATORS):
            return {}, "the extension was built from other sources than these"
    try:
        info: dict[str, Any] = _import(spec).build_info()
    except (ImportError, AttributeError) as error:  # AttributeError: built from sources without build_info
        return {}, f"the extension does not load ({error})"
    return (info, "") if _serves(info["torch"]) else ({}, _for_other_torch(info["torch"]))


def _serves(version: str) -> bool:
    """Return whether an extension that was built for this version of torch serves the installed one."""
    return version.split(".")[:2] == torch.__version__.split(".")[:2]


def _for_other_torch(version: str) -> str:
    return f"the extension was built for torch {version}, this is torch {torch.__version__}"


def _import(spec: ModuleSpec) -> ModuleType:
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


build_info, missing = load(build.NAME)
_warned = False


@called_while_traced
def warn_once() -> None:
    """Say, at the first call on a CPU that has to do without, why this backend is missing and how to get it."""
    global _warned
    if missing and not _warned:
        _warned = True
        warn(
            f"contrastive_kernels computes with plain PyTorch on this CPU, several times slower: {missing}. "
            "CONTRASTIVE_KERNELS_BACKEND=torch asks for that without this warning."
        )


# The extension registers the operators itself.
operators: Mapping[str, None] = {} if missing else dict.fromkeys(OPERATORS)


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
