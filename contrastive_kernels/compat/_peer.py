"""What an adapter has of its peer, the library that it stands in for: other names, and what only the peer computes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from contrastive_kernels.engine.warn import called_while_traced, warn

__all__ = ["forwarding", "import_peer", "warn_dense"]


def import_peer(module: str, distribution: str) -> ModuleType:
    """Return a module of the peer.

    Raises:
        ImportError: it is not installed, or cannot be imported; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"contrastive_kernels.compat needs {module}, which cannot be imported ({error}); "
            f"run: pip install {distribution}"
        ) from error


def forwarding(adapter: str, distribution: str, *modules: str) -> Callable[[str], Any]:
    """Return a module's ``__getattr__``: public names that the adapter lacks are the peer's, imported at that moment.

    Args:
        adapter: ``__name__`` of the adapter.
        distribution: what to install.
        modules: modules of the peer, searched in this order.
    """

    def __getattr__(name: str) -> Any:
        if not name.startswith("_"):
            for module in modules:
                peer = import_peer(module, distribution)
                if hasattr(peer, name):
                    return getattr(peer, name)
        raise AttributeError(f"module {adapter!r} has no attribute {name!r}")

    return __getattr__


_warned: set[tuple[str, str]] = set()


@called_while_traced
def warn_dense(name: str, option: str) -> None:
    """Warn, once for each name and option, that this call stores the matrix of all similarities."""
    if (name, option) not in _warned:
        _warned.add((name, option))
        warn(f"{name} with {option} stores the N x N matrix of similarities: no fused loss has this option")
