"""Environment variables that have a few values. setup.py loads this file by its path, without the package."""

from __future__ import annotations

import os
from collections.abc import Collection

__all__ = ["SWITCH", "choice"]

SWITCH = ("0", "1")


def choice(variable: str, allowed: Collection[str]) -> str | None:
    """Return the value of an environment variable, None if it is not set or empty.

    Raises:
        ValueError: the value is not one of those allowed.
    """
    value = os.environ.get(variable) or None
    if value is not None and value not in allowed:
        raise ValueError(f"{variable}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
    return value
