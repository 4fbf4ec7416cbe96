"""Replacing attributes of other libraries, and putting back exactly what was there."""

from __future__ import annotations

from types import TracebackType
from typing import Any

__all__ = ["Patch"]

_ABSENT = object()


class Patch:
    """Attributes that are replaced until `undo`, or to the end of a ``with`` block.

    Args:
        replacements: triples (object, name, new value). What the object itself has is remembered, not what it inherits.

    Patches of one attribute are undone in reverse order; one that is undone early leaves the later one in place, and
    the attribute becomes what it was before both once that is undone too.
    """

    # Of every attribute that is replaced: the patches in force, oldest first, each with what it found.
    _in_force: dict[tuple[int, str], list[tuple[Patch, Any]]] = {}  # noqa: RUF012, shared on purpose

    def __init__(self, *replacements: tuple[Any, str, Any]) -> None:
        self._targets: list[tuple[Any, str]] = []
        for target, name, value in replacements:
            found = vars(target).get(name, _ABSENT)
            self._in_force.setdefault((id(target), name), []).append((self, found))
            self._targets.append((target, name))
            setattr(target, name, value)

    def undo(self) -> None:
        """Put back what was there; any number of times."""
        while self._targets:
            target, name = self._targets.pop()
            stack = self._in_force[id(target), name]
            place = next(i for i, (patch, _) in enumerate(stack) if patch is self)
            _, found = stack.pop(place)
            if place < len(stack):  # a later patch is in force: it inherits what this one found
                stack[place] = (stack[place][0], found)
            elif found is _ABSENT:
                delattr(target, name)
            else:
                setattr(target, name, found)
            if not stack:
                del self._in_force[id(target), name]

    def __enter__(self) -> Patch:
        """Return the patch, which is in force since it was made."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo it."""
        self.undo()
