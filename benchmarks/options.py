"""Command-line options of several benchmarks: their types, and the one for a machine without the C++ backend."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from contrastive_kernels.engine.backends import cpp


def at_least(least: float, kind: type) -> Callable[[str], float]:
    """Return the type of an option that is a finite number of this kind, at least so large."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number of {least:g} or more")
        return value

    return number


def add_without_cpp(parser: argparse.ArgumentParser) -> None:
    """Add the option that `refuse_without_cpp` reads."""
    parser.add_argument(
        "--without-cpp", action="store_true", help="where the C++ backend is missing, time ours on the PyTorch backend"
    )


def refuse_without_cpp(parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device) -> None:
    """End the program if ours on this device would be the PyTorch backend and nobody has asked for that."""
    if device.type == "cpu" and cpp.missing and not options.without_cpp:
        parser.error(f"ours would be the PyTorch backend: {cpp.missing}; or ask for it with --without-cpp")
