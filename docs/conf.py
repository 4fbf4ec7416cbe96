"""The documentation site: `make docs` builds it in docs/_build/html, without warnings."""

import re
import sys
from pathlib import Path

import tomllib
from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

import pages  # noqa: E402

METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = {name.lower(): url for name, url in METADATA.get("urls", {}).items()}.get("repository")

project = METADATA["name"]
version = release = METADATA["version"]
author = METADATA["authors"][0]["name"]
project_copyright = author

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "contrastive_kernels"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
if REPOSITORY:
    html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
highlight_language = "text"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# Notebooks run at every build that finds them changed; an error in a cell is one of the build.
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# A docstring names its types in words, and single backticks are names of this package or code.
default_role = "py:obj"
autodoc_typehints = "none"
autodoc_member_order = "groupwise"
napoleon_custom_sections = ["Source"]
napoleon_use_rtype = False

# What is a page here and stands outside docs/ in the repository.
ELSEWHERE = {
    "README.md": "index",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "benchmarks/results/gpu/report.md": "gpu_results",
    "contrastive_kernels/primitives": "reference#primitives",
    "contrastive_kernels/diagnostics": "reference#diagnostics",
}


# Pages whose text depends on more than their own file: they are read at every build.
DEPENDENT = ["index", "losses", "migrating"]


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Show losses.md without the sections that have pages of their own, and list no pages that are not there yet."""
    text = pages.general_part() if docname == "losses" else source[0]
    source[0] = re.sub(r"^[\w/]+\*$", lambda name: name[0] if any(DOCS.glob(f"{name[0]}.md")) else "", text, flags=re.M)


def follow_links(app: Sphinx, document: nodes.document) -> None:
    """Lead links that are right in the repository to where their targets are on the site."""
    folder = (DOCS / app.env.docname).parent
    for link in [*document.findall(pending_xref), *document.findall(download_reference)]:
        if link.get("reftype") != "myst":
            continue
        target, _, anchor = link["reftarget"].partition("#")
        anchor = link.get("reftargetid") or anchor
        # MyST has found a page of the site. The links of an included file count from the root, where those files are.
        found = link.get("refdomain") == "doc"
        places = [DOCS / f"{target}.md"] if found else [folder / target, ROOT / target]
        path = next((place.resolve() for place in places if place.exists()), None)
        if path is not None and path.is_relative_to(ROOT):
            link.replace_self(_link(app, str(path.relative_to(ROOT)), anchor, link))


def _link(app: Sphinx, name: str, anchor: str, link: nodes.Element) -> nodes.Element | list[nodes.Node]:
    """Return the link to a file or folder of the repository."""
    docname, _, heading = ELSEWHERE.get(name, name.removeprefix("docs/").removesuffix(".md")).partition("#")
    anchor = anchor or heading
    if docname == "losses" and anchor in pages.losses():
        docname, anchor = f"losses/{anchor}", ""
    attributes = {"refdoc": app.env.docname, "reftype": "myst", "refexplicit": True}
    if docname in app.env.found_docs:
        attributes |= {"refdomain": "doc", "reftarget": docname, "reftargetid": anchor or None}
        return pending_xref("", *link.children, **attributes)
    if REPOSITORY:
        return nodes.reference("", "", *link.children, refuri=f"{REPOSITORY}/tree/main/{name}")
    # Without a public repository a file can be downloaded, and a folder is a name.
    if (ROOT / name).is_dir():
        return link.children
    return download_reference("", *link.children, refdomain=None, reftarget=f"/../{name}", **attributes)


def setup(app: Sphinx) -> None:
    """Write the generated pages before Sphinx looks for pages."""
    app.connect("builder-inited", lambda app: pages.write())
    app.connect("env-get-outdated", lambda *_: DEPENDENT)
    app.connect("source-read", prepare)
    app.connect("doctree-read", follow_links, priority=400)  # before downloads are collected
