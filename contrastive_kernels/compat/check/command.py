"""``python -m contrastive_kernels.compat``: the adapters; ``check``: whether they agree with their peers."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from contrastive_kernels.compat import ADAPTERS, _small
from contrastive_kernels.compat.check.case import TOLERANCE, Case, Draw, difference, outcome

__all__ = ["SIZES", "Library", "main"]

# One row, an odd number, more than a tile. Each by the plain formula of small batches and by the sweep.
SIZES = (1, 7, 70)
DESCRIPTION = "List the adapters and their peers with the versions installed, or compare them."
CHECK_DESCRIPTION = (
    "Compare value, gradients and state of every public name of the adapters with the libraries that are installed, in "
    "float64; of a library that is not installed it says so. The exit status is 1 if anything differs, else 0."
)


@dataclass(frozen=True)
class Library:
    """A library that an adapter stands in for.

    Args:
        name: that of the adapter.
    """

    name: str

    @property
    def cases(self) -> ModuleType:
        """The module of its cases: ``DISTRIBUTION``, ``CASES`` and ``peer()``, which imports the library."""
        return importlib.import_module(f"contrastive_kernels.compat.check.{self.name}")

    @property
    def version(self) -> str | None:
        """The version that is installed."""
        try:
            return importlib.metadata.version(self.cases.DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:
            return None

    def modules(self) -> tuple[Any, Any]:
        """Return the adapter and its peer.

        Raises:
            ImportError: the peer cannot be imported.
        """
        peer = self.cases.peer()
        return importlib.import_module(f"contrastive_kernels.compat.{self.name}"), peer


def listing() -> str:
    """Return the adapters, their peers and the versions that are installed, as text."""
    lines = []
    for library in map(Library, ADAPTERS):
        version = library.version or "not installed"
        lines.append(f"contrastive_kernels.compat.{library.name:<24}{library.cases.DISTRIBUTION:<28}{version}")
    return "\n".join(lines)


def compare(case: Case, adapter: Any, peer: Any) -> str:
    """Return ``"ok"``, or how a case differs."""
    worst = 0.0
    for n in SIZES:
        try:
            theirs = outcome(case, peer, Draw(n))
        except Exception as error:  # what the peer refuses, the adapter has to refuse by the same type
            theirs, refusal = None, error
        for largest in (_small._largest, 0):
            with _small.largest(largest):
                try:
                    ours = outcome(case, adapter, Draw(n))
                except Exception as error:
                    if theirs is None and isinstance(error, type(refusal)):
                        continue
                    return f"differs: {type(error).__name__} at {n} rows ({error})"
                if theirs is None:
                    return f"differs: the peer raises {type(refusal).__name__} at {n} rows"
                worst = max(worst, difference(ours, theirs))
    return "ok" if worst <= TOLERANCE else f"differs by {worst:.1e}"


def check(names: Sequence[str]) -> int:
    """Compare adapters with their peers, print a line for each public name; return 1 if something differs, else 0."""
    differs = False
    for library in map(Library, names):
        if library.version is None:
            print(f"{library.name:<24}not installed")
            continue
        try:
            adapter, peer = library.modules()
        except Exception as error:  # of a torchvision for another torch it is a RuntimeError
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"{library.name:<24}{library.version:<10}cannot be imported: {reason}")
            continue
        by_name: dict[str, list[Case]] = {}
        for case in library.cases.CASES:
            by_name.setdefault(case.name, []).append(case)
        for name, cases in by_name.items():
            wrong = [f"{case.what}: {text}" for case in cases if (text := compare(case, adapter, peer)) != "ok"]
            differs |= bool(wrong)
            print(f"{library.name:<24}{name:<44}{library.version:<10}{'; '.join(wrong) or 'ok'}", flush=True)
    return int(differs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m contrastive_kernels.compat", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="check")
    comparing = commands.add_parser(
        "check", help="compare adapters with their installed peers in float64", description=CHECK_DESCRIPTION
    )
    comparing.add_argument("names", nargs="*", metavar="LIBRARY", help=f"some of {', '.join(ADAPTERS)} (default: all)")
    options = parser.parse_args(arguments)
    if options.command != "check":
        print(listing())
        return 0
    if unknown := set(options.names) - set(ADAPTERS):
        comparing.error(f"no adapter for {', '.join(sorted(unknown))}; there are {', '.join(ADAPTERS)}")
    return check(options.names or ADAPTERS)
