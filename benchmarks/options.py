"""Types of command-line options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def at_least(least: float, kind: type) -> Callable[[str], float]:
    """Return the type of an option that is a finite number of this kind, at least so large."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number of {least:g} or more")
        return value

    return number
