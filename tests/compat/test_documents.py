"""The pages of the adapters: their code runs where the libraries are."""

import importlib.metadata

import pytest

from benchmarks import libraries
from tests.support import adapters
from tests.support.documents import blocks
from tests.support.testing import ROOT

adapters.require_peers()
pytestmark = pytest.mark.peers

PAGES = sorted((ROOT / "docs" / "compat").glob("*.md"))


def installed(distribution):
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_code_runs(path):
    given = [block for block in blocks(path.read_text()) if block.language == "python" and block.marker != "not run"]
    assert given
    names = {}
    with libraries.importable(path.stem):
        for block in given:
            if block.marker is None or installed(block.reason):
                exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), names)


def test_what_a_page_needs_is_pinned():
    """But for what no index has: else a misspelt name would leave the code out."""
    pins = {line.partition("==")[0] for line in (ROOT / "requirements-peers.txt").read_text().splitlines()}
    needed = {block.reason for path in PAGES for block in blocks(path.read_text()) if block.marker == "needs"}
    assert needed - pins == {"supcontrast"}
