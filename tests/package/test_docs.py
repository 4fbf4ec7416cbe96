"""The documents: their code runs, their commands exist, and the site has a page for everything public."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.distributed as dist

import contrastive_kernels as ck
from contrastive_kernels import diagnostics, distributed
from tests.support.documents import FENCE, blocks
from tests.support.testing import ROOT

DOCS = ROOT / "docs"


def module_of(name: str) -> types.ModuleType:
    """Return a module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The pages that are not written by hand.
PAGES = module_of("pages")
GENERATED = PAGES.generated()
WRITTEN = {
    str(path.relative_to(DOCS)): path
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts and str(path.relative_to(DOCS)) not in GENERATED
}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN.values()]


def relative(path):
    return str(path.relative_to(ROOT))


# Blocks of code

PYTHON, SHELL = ("python", "{code-cell}"), ("bash",)
# Formulas, drawings and tables of text; directives of the site.
OTHERS = ("", "text", "diff", "{toctree}", "{include}")
# How a line begins that somebody would paste.
CODE = re.compile(r"^(import |from \w+ import|>>> |ck\.|pip |make \w|python3? |torchrun )", re.MULTILINE)

# Sizes of a notebook that the test makes smaller: each is assigned in a line of its own.
SMALLER = {"docs/tutorial.md": {"ROWS": 64, "STEPS": 2}}


def python_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the code of a document that runs, with its line."""
    smaller = dict(SMALLER.get(relative(path), {}))
    for block in blocks(path.read_text()):
        if block.language in PYTHON and block.marker is None:
            code = block.code
            for name, size in list(smaller.items()):
                code, found = re.subn(rf"^{name} = \d+$", f"{name} = {size}", code, flags=re.MULTILINE)
                if found:
                    del smaller[name]
            yield code, block.line
    assert not smaller, f"{relative(path)} does not assign {', '.join(smaller)}"


def features(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).requires_grad_()


def readers() -> dict[str, object]:
    """Return the names that the README leaves to its reader; a page of docs/ runs by itself."""
    names = {name: features(12, 8) for name in ("z0", "z1", "image", "text", "image_features", "text_features")}
    names |= {name: features(12, 8) for name in ("q", "k", "a", "b", "out0", "out1", "query", "positive", "negatives")}
    scale = torch.tensor(2.0, requires_grad=True)
    return names | {
        "torch": torch,
        "ck": ck,
        "log_scale": scale,
        "logit_scale": scale.exp(),
        "features": features(12, 2, 8),
        "labels": torch.arange(12) % 4,
        "T": 0.1,
        "dim": 8,
        "queue_size": 48,
    }


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone, as `group="world"` needs one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_code() -> list[Path]:
    """Return the documents with code that runs; what needs a library runs in tests/compat/test_documents.py."""
    return [path for path in DOCUMENTS if list(python_of(path))]


@pytest.mark.parametrize("path", with_code(), ids=relative)
@pytest.mark.usefixtures("alone")
def test_code_runs(path):
    matplotlib.use("Agg")
    names = readers() if path == ROOT / "README.md" else {}
    for code, line in python_of(path):
        exec(compile("\n" * (line - 1) + code, relative(path), "exec"), names)
    if "plt" in names:
        names["plt"].close("all")


def test_readme_migration_table():
    """The right column runs."""
    table = re.search(r"^## Migrating\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL).group(1)
    calls = re.findall(r"\| `(ck\.[^`]*)`[^|]* \|$", table, re.MULTILINE)
    assert len(calls) >= 5
    for call in calls:
        assert eval(call, readers()).isfinite().all(), call


IMPORTS = re.findall(r"from contrastive_kernels\.compat\.(\w+) import (\w+)", (ROOT / "README.md").read_text())


def test_readme_names_adapters():
    assert len({module for module, _ in IMPORTS}) >= 5


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_readme_adapter_is_there(module, name):
    """Those that need their library are there in its absence too, as text."""
    source = ast.parse((ROOT / "contrastive_kernels" / "compat" / f"{module}.py").read_text())
    assert name in {node.name for node in source.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def unmarked(text: str) -> list[int]:
    """Return the lines of the blocks of which nobody could say whether they are code."""
    return [
        block.line
        for block in blocks(text)
        if block.language not in (*PYTHON, *SHELL, *OTHERS)
        or (block.language in ("", "text") and CODE.search(block.code))
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_code_is_marked_as_code(path):
    assert unmarked(path.read_text()) == []


def test_blocks_are_found():
    text = "a\n<!-- not run: two GPUs -->\n```python\nf()\n```\n"
    text += "```{code-cell} ipython3\n:tags: [x]\ng()\n```\n```\nL = 1\n```\n"
    assert [(b.language, b.code, b.line, b.marker) for b in blocks(text)] == [
        ("python", "f()\n", 4, "not run"),
        ("{code-cell}", "g()\n", 7, None),
        ("", "L = 1\n", 11, None),
    ]
    assert unmarked(text) == []
    assert unmarked("```\nimport torch\n```\n```rust\nx\n```\n") == [2, 5]
    (needing,) = blocks("<!-- needs: some-library -->\n```python\nf()\n```\n")
    assert (needing.marker, needing.reason) == ("needs", "some-library")


# Commands

INLINE = re.compile(r"`((?:make|python|torchrun|[A-Z_]+=\S+ python) [^`\n]+)`")
TARGETS, PATTERNS = (
    tuple(re.findall(rf"^([\w-]+){end}:(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)) for end in ("", "%")
)
KNOWN = ("pip", "source", "pre-commit")


def commands(text: str) -> list[str]:
    """Return the shell commands of a document: those of its blocks, and those in its sentences."""
    found = INLINE.findall(FENCE.sub("", text))
    for block in blocks(text):
        if block.language in SHELL:
            found += re.sub(r"\\\n", " ", block.code).splitlines()
    return [part.strip() for line in found for part in re.sub(r"(^|\s)#.*", "", line).split("&&") if part.strip()]


def missing(command: str) -> list[str]:
    """Return what a command names that is not there: targets, modules and files."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    program, arguments = Path(words[0]).name, words[1:]
    if program == "make":
        named = [word for word in arguments if not word.startswith("-")]
        return [
            word for word in named if not any(word == target or word.startswith(f"{target}-") for target in TARGETS)
        ]
    if program in ("python", "python3", "torchrun"):
        modules = [after for word, after in pairwise(arguments) if word == "-m"]
        files = [word for word in arguments if word.endswith(".py")]
        return [name for name in modules if not importlib.util.find_spec(name)] + [
            name for name in files if not (ROOT / name).exists()
        ]
    files = [after for word, after in pairwise(arguments) if word == "-r"]
    return [name for name in files if not (ROOT / name).exists()] + ([] if program in KNOWN else [program])


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_commands_exist(path):
    assert {command: missing(command) for command in commands(path.read_text()) if missing(command)} == {}


def test_a_missing_command_is_found():
    text = "`make nothing` `make aot-3.7.1`\n"
    text += "```bash\nX=1 python -m benchmarks.nothing  # a\npip install -r no.txt && rm x\n```\n"
    assert [missing(command) for command in commands(text)] == [
        ["nothing"], [], ["benchmarks.nothing"], ["no.txt"], ["rm"],
    ]  # fmt: skip


# The site


def documented(text: str) -> list[str]:
    """Return the names that a generated page lets autodoc describe."""
    return re.findall(r"^\.\. auto(?:function|class):: contrastive_kernels\.(\w+)$", text, re.MULTILINE)


def test_everything_public_has_one_entry():
    entries = [name for text in GENERATED.values() for name in documented(text)]
    assert sorted(entries) == sorted(ck.__all__)
    modules = re.findall(r"^\.\. automodule:: ([\w.]+)$", GENERATED["reference.md"], re.MULTILINE)
    assert {diagnostics.__name__, distributed.__name__} <= set(modules)


@pytest.mark.parametrize("loss", PAGES.losses())
def test_the_page_of_a_loss_is_complete(loss):
    page = GENERATED[f"losses/{loss}.md"]
    assert documented(page)
    for part in ("**When**", "**Elsewhere**", "## How it is computed", "**Source**", f"python_ref/{loss}.py"):
        assert part in page, part
    assert (ROOT / "python_ref" / f"{loss}.py").exists()


def test_a_page_has_what_was_measured():
    """A row of the committed results, and one of another library."""
    rows = [row for row in PAGES.measured("cpu") if row["loss"] == "clip" and row["n"] == "8192" and row["d"] == "128"]
    times = {row["provider"]: float(row["ms_50"]) for row in rows}
    assert f"({times['eager'] / times['ours']:.1f}×)" in GENERATED["losses/clip.md"]
    assert "open_clip" in GENERATED["losses/clip.md"]


def test_losses_have_the_names_of_their_files():
    files = {path.stem for path in (ROOT / "contrastive_kernels" / "losses").glob("*.py") if path.stem[0] != "_"}
    assert set(PAGES.losses()) == files


TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sources() -> dict[str, str]:
    """Return the text of every page as the site has it, by its path in docs/."""
    texts = {name: path.read_text() for name, path in WRITTEN.items()}
    return texts | GENERATED | {"losses.md": PAGES.general_part()}


def test_every_page_is_in_one_toctree():
    pages = sources()
    listed = []
    for name, text in pages.items():
        for tree in TOCTREE.findall(text):
            for entry in re.findall(r"^(?!:)(\S+)$", tree, re.MULTILINE):
                pattern = re.compile(re.escape(str(Path(name).parent / entry)).replace(r"\*", "[^/]*") + r"\.md")
                found = [page for page in pages if pattern.fullmatch(page)]
                assert found or "*" in entry, f"{name} lists {entry}"
                listed += found
    assert sorted([*listed, "index.md"]) == sorted(pages)


LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_links_of_generated_pages_lead_to_pages_and_files():
    pages = sources()
    for name in [*GENERATED, "losses.md"]:
        for link in LINK.findall(FENCE.sub("", pages[name])):
            target = link.partition("#")[0]
            if target and not re.match(r"[a-z]+:", link):
                path = (DOCS / name).parent.joinpath(target).resolve()
                page = str(path.relative_to(DOCS)) if path.is_relative_to(DOCS) else ""
                assert page in pages or path.exists(), f"{name}: {link}"


def test_a_broken_link_of_the_site_is_found(tmp_path):
    """`make docs` ends with this check of what Sphinx has written."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "page.html").write_text('<p id="here"><a href="../index.html#no">a</a></p>')
    (tmp_path / "index.html").write_text(
        '<a href="folder/page.html#here"></a><a href="#top" id="top"></a><a href="https://pytorch.org/no"></a>'
        '<img src="no.png"><a href="folder/page.html#gone"></a>'
    )
    assert sorted(module_of("links").broken(tmp_path)) == [
        "folder/page.html: ../index.html#no", "index.html: folder/page.html#gone", "index.html: no.png",
    ]  # fmt: skip


def test_what_pages_include_is_there():
    """The texts at which an included part begins and ends, one after the other."""
    found = 0
    for name, path in WRITTEN.items():
        for block in FENCE.finditer(path.read_text()):
            if block["language"].startswith("{include}"):
                file = path.parent / block["language"].split()[1]
                ends = [re.search(rf":{option}: \"(.*)\"", block["code"]) for option in ("start-after", "end-before")]
                places = [file.read_text().index(end[1]) for end in ends if end]
                assert places == sorted(places), name
                found += 1
    assert found > 5


def test_the_gallery_names_every_diagnostic():
    gallery = (DOCS / "diagnostics.md").read_text()
    functions = [name for name in diagnostics.__all__ if name.islower()]
    assert [name for name in functions if f"`{name}`" not in gallery] == []
    plots = [name for name in functions if name.startswith("plot_")]
    assert [name for name in plots if f"diagnostics.{name}(" not in gallery] == []


def test_every_environment_variable_is_described():
    used = {
        name
        for path in [ROOT / "setup.py", *(ROOT / "contrastive_kernels").rglob("*.py")]
        for name in re.findall(r"CONTRASTIVE_KERNELS_[A-Z_]*[A-Z]", path.read_text())
    }
    assert len(used) > 5
    text = (DOCS / "install.md").read_text()
    assert [name for name in sorted(used) if f"`{name}`" not in text] == []
