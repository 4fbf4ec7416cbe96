"""Replacing attributes of other libraries, and putting back exactly what was there."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, ClassVar

__all__ = ["Patch"]

_ABSENT = object()


class Patch:
    """Attributes that are replaced until `undo`, or to the end of a ``with`` block.

    Args:
        replacements: triples (object, name, new value). What the object itself has is remembered, not what it inherits.

    Patches of one attribute are undone in reverse order; one that is undone early leaves the later one in place, and
    the attribute becomes what it was before both once that is undone too. An object that is patched lives no longer
    than it would without.
    """

    # Of every attribute that is replaced: the patches in force, oldest first, each with what it found.
    _in_force: ClassVar[weakref.WeakKeyDictionary[Any, dict[str, list[tuple[Patch, Any]]]]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self, *replacements: tuple[Any, str, Any]) -> None:
        self._targets: list[tuple[weakref.ref[Any], str]] = []
        try:
            for target, name, value in replacements:
                found = vars(target).get(name, _ABSENT)
                setattr(target, name, value)
                self._in_force.setdefault(target, {}).setdefault(name, []).append((self, found))
                self._targets.append((weakref.ref(target), name))
        except BaseException:  # all or nothing
            self.undo()
            raise

    def undo(self) -> None:
        """Put back what was there; any number of times."""
        while self._targets:
            reference, name = self._targets.pop()
            target = reference()
            if target is None:
                continue
            stacks = self._in_force[target]
            stack = stacks[name]
            place = max(i for i, (patch, _) in enumerate(stack) if patch is self)
            _, found = stack.pop(place)
            if place < len(stack):  # a later patch is in force: it inherits what this one found
                stack[place] = (stack[place][0], found)
            elif found is not _ABSENT:
                setattr(target, name, found)
            elif name in vars(target):
                delattr(target, name)
            if not stack:
                del stacks[name]
            if not stacks:
                del self._in_force[target]

    def __enter__(self) -> Patch:
        """Return the patch, which is in force since it was made."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undo it."""
        self.undo()
