"""The pages of the site that are made from other files: one for each loss, the reference, and the tables of results.

What a person has to write about a loss is its section in losses.md. Its page adds what the code and the committed
benchmarks say. Nothing here needs Sphinx, so that the tests see the same pages.
"""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import contrastive_kernels as ck

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"

HEADING = re.compile(r"^(#{2,3}) (.+)$")
LINK = re.compile(r"(\]\()([^)\s]+)(\))")

# The parts of the reference, by the module that defines a name; the first that fits takes it.
PARTS = {
    "Primitives": "contrastive_kernels.primitives",
    "Terms": "contrastive_kernels.engine.terms",
    "Large batches": "contrastive_kernels.chunked_encoder",
    "Limits of memory": "contrastive_kernels.engine.limits",
    "Options and results of losses": "contrastive_kernels.losses",
    "Others": "contrastive_kernels",
}
MODULES = {"Several processes": "contrastive_kernels.distributed", "Diagnostics": "contrastive_kernels.diagnostics"}
# The size at which every loss was measured: dtype, D, N.
USUAL = "float32", 128, 8192


class Section(NamedTuple):
    """A heading of losses.md and the text below it; ``loss`` is the loss's name, or None for a general part."""

    level: int
    heading: str
    text: str
    loss: str | None


@cache
def sections() -> tuple[Section, ...]:
    """Return losses.md by its headings; the first section is what stands above them."""
    parts: list[tuple[int, str, list[str]]] = [(1, "", [])]
    fenced = False
    for line in (DOCS / "losses.md").read_text().splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else HEADING.match(line)
        if heading:
            parts.append((len(heading[1]), heading[2], []))
        else:
            parts[-1][2].append(line)
    found = []
    for level, heading, lines in parts:
        name = re.fullmatch(r"`(\w+)`", heading)
        found.append(Section(level, heading, "\n".join(lines).strip() + "\n", name[1] if name else None))
    return tuple(found)


def losses() -> dict[str, Section]:
    """Return the sections of the losses by name, in their order."""
    return {section.loss: section for section in sections() if section.loss}


def public_names(loss: str) -> list[str]:
    """Return the public names of a loss's module: functions first, then classes."""
    names = importlib.import_module(f"contrastive_kernels.losses.{loss}").__all__
    return sorted((name for name in names if name in ck.__all__), key=lambda name: (not name.islower(), name))


def general_part() -> str:
    """Return losses.md as the site shows it: each loss's section gives way to a link to its page."""
    lines: list[str] = []
    listed: list[str] = []

    def close_list() -> None:
        if listed:
            lines.extend([f"| loss | when | {USUAL[2]:,} rows |", "|---|---|---|"])
            for name in listed:
                text = _relinked(when(name), _from_losses)
                lines.append(f"| [`{name}`](losses/{name}.md) | {text} | {usual_cost(name)} |")
            lines.extend(["", "```{toctree}", ":hidden:", "", *(f"losses/{name}" for name in listed), "```", ""])
            listed.clear()

    for section in sections():
        if section.loss:
            listed.append(section.loss)
            continue
        close_list()
        if section.heading:
            lines.extend([f"{'#' * section.level} {section.heading}", ""])
        lines.append(_relinked(section.text, _from_losses))
    close_list()
    return "\n".join(lines)


def _relinked(text: str, target_of: Callable[[str], str]) -> str:
    """Return a text with other targets of its links."""
    return LINK.sub(lambda link: f"{link[1]}{target_of(link[2])}{link[3]}", text)


def _from_losses(target: str) -> str:
    """Return a link of losses.md as the page of the same name has it."""
    return f"losses/{target[1:]}.md" if target[1:] in losses() else target


def _from_loss(target: str) -> str:
    """Return a link of losses.md as the page of a loss has it, one folder below."""
    if re.match(r"[a-z]+:", target):
        return target
    if target.startswith("#"):
        return f"{target[1:]}.md" if target[1:] in losses() else f"../losses.md{target}"
    return f"../{target}"


def loss_page(loss: str) -> str:
    """Return the page of a loss: what it is for, function and module, mathematics, cost, the dense reference."""
    introduction, mathematics = (_relinked(part, _from_loss) for part in _parts(loss))
    if "**Elsewhere**" not in introduction:
        introduction = f"{introduction.rstrip()}\n- **Elsewhere**: in no package that `make test-peers` compares.\n"
    return "\n".join(
        [
            f"# {loss}",
            "",
            introduction.rstrip(),
            "",
            *_documented(public_names(loss)),
            "## How it is computed",
            "",
            "[Notation](../losses.md#notation) and [safe forms](../losses.md#safe-forms) are those of all losses.",
            "",
            mathematics,
            *_cost(loss),
            "## Dense reference",
            "",
            f"`python_ref/{loss}.py`, the plain formula, which the tests compare with:",
            "",
            f"```{{literalinclude}} ../../python_ref/{loss}.py",
            ":language: python",
            "```",
            "",
        ]
    )


def _parts(loss: str) -> tuple[str, str]:
    """Return the section of a loss in two: down to the bullets When and Elsewhere, and the rest."""
    parts = re.fullmatch(r"(.*?^- \*\*When\*\*: .*?\n\n)(.*)", losses()[loss].text, re.MULTILINE | re.DOTALL)
    if parts is None:
        raise ValueError(f"docs/losses.md does not say when to use {loss}: its section begins with a bullet **When**")
    return parts[1], parts[2]


def when(loss: str) -> str:
    """Return what its section says a loss is for, in one line."""
    return " ".join(re.search(r"\*\*When\*\*: (.*(?:\n  .*)*)", _parts(loss)[0])[1].split())


def _documented(names: list[str]) -> Iterator[str]:
    """Yield the entries of public names, written by autodoc."""
    yield "```{eval-rst}"
    for name in names:
        if isinstance(getattr(ck, name), type):
            # `function` of a module is the function above
            yield from (f".. autoclass:: contrastive_kernels.{name}", "   :members:")
            yield from ("   :exclude-members: function", "")
        else:
            yield from (f".. autofunction:: contrastive_kernels.{name}", "")
    yield from ("```", "")


def _defining_module(name: str) -> str:
    return getattr(getattr(ck, name), "__module__", ck.__name__)


def reference() -> str:
    """Return the page of everything public that has no page of a loss."""
    left = [name for name in ck.__all__ if name not in {name for loss in losses() for name in public_names(loss)}]
    lines = ["# Reference", "", "Everything public beside the [losses](losses.md).", ""]
    for title, module in PARTS.items():
        names = [name for name in left if f"{_defining_module(name)}.".startswith(f"{module}.")]
        left = [name for name in left if name not in names]
        if names:
            lines += [f"## {title}", "", *_documented(names)]
    for title, module in MODULES.items():
        lines += [f"## {title}", "", "```{eval-rst}"]
        lines += [f".. automodule:: {module}", "   :members:", "   :imported-members:", "```", ""]
    return "\n".join(lines)


# Results


@cache
def measured(kind: str) -> list[dict[str, str]]:
    """Return the committed rows of forward + backward that have a time."""
    with open(RESULTS / kind / "results.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["mode"] == "both" and row["ms_50"]]


def _significant(value: str) -> str:
    """Return a number with three significant digits, or what stands for none."""
    return f"{float(f'{float(value):.3g}'):,.10g}" if value else "–"


def _measure(value: str, unit: str) -> str:
    return f"{_significant(value)}\N{NO-BREAK SPACE}{unit}"


def _case(row: dict[str, str]) -> tuple[str, int, int]:
    return row["dtype"], int(row["d"]), int(row["n"])


def usual_cost(loss: str) -> str:
    """Return time and memory at the size at which every loss was measured."""
    for row in measured("cpu"):
        if row["loss"] == loss and row["provider"] == "ours" and _case(row) == USUAL:
            return f"{_measure(row['ms_50'], 'ms')}, {_measure(row['peak_mib'], 'MiB')}"
    return "–"


def _machine(loss: str) -> str:
    """Return where a loss was measured: the processor and the version of PyTorch."""
    row = next(row for kind in ("cpu", "peers") for row in measured(kind) if row["loss"] == loss)
    return f"{row['device']}, torch {row['torch']}"


def _cost(loss: str) -> Iterator[str]:
    """Yield what forward and backward take, in the committed results, beside dense PyTorch and beside libraries."""
    lines = []
    for kind in ("cpu", "peers"):
        rows = sorted((row for row in measured(kind) if row["loss"] == loss), key=_case)
        ours = {(row["m"], *_case(row)): row for row in rows if row["provider"] == "ours"}
        for row in rows:
            own = ours.get((row["m"], *_case(row)))
            # dense PyTorch was measured in both
            if own is None or own is row or (kind == "peers" and row["provider"] == "eager"):
                continue
            lines.append(
                f"| {int(row['n']):,} × {int(row['m']):,} | {row['d']} | {row['dtype']} "
                f"| {_measure(own['ms_50'], 'ms')} | {row['provider']} {row['version']} "
                f"| {_measure(row['ms_50'], 'ms')} ({float(row['ms_50']) / float(own['ms_50']):.1f}×) "
                f"| {_significant(own['peak_mib'])} / {_measure(row['peak_mib'], 'MiB')} |"
            )
    if lines:
        yield from (
            "## Cost",
            "",
            f"Forward + backward, medians of the [committed results](../benchmarks.md), {_machine(loss)}. In "
            "brackets: how many times as long as ours. Memory is beyond inputs and gradients, ours / theirs.",
            "",
            "| N × M | D | dtype | ours | beside | theirs | peak memory |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
        )


def generated() -> dict[str, str]:
    """Return the text of every page that is written at a build, by its path in docs/."""
    return {"reference.md": reference(), **{f"losses/{loss}.md": loss_page(loss) for loss in losses()}}


def write() -> None:
    """Write the generated pages; those that are the same stay as they are and need no new build."""
    texts = {DOCS / name: text for name, text in generated().items()}
    for path in (DOCS / "losses").glob("*.md"):
        if path not in texts:
            path.unlink()
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
