"""The fenced blocks of a document."""

import re
from dataclasses import dataclass

# A comment above a block says that it does not run, and why, or which distribution it needs:
# <!-- not run: needs two GPUs -->, <!-- needs: open-clip-torch -->
FENCE = re.compile(
    r"^(?:<!-- (?P<marker>not run|needs): (?P<reason>[^\n]+?) -->\n)?"
    r"^(?P<fence>`{3,})(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    marker: str | None
    reason: str | None


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a document in their order."""
    return [
        Block(
            found["language"].split(" ")[0],
            re.sub(r"\A(?::[\w-]+:.*\n)+", "", found["code"]),
            text.count("\n", 0, found.start("code")) + 1,
            found["marker"],
            found["reason"],
        )
        for found in FENCE.finditer(text)
    ]
