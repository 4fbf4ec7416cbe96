"""The pages of the adapters: their code runs where the libraries are."""

import re

import pytest

from benchmarks import libraries
from tests.support import adapters
from tests.support.testing import ROOT

adapters.require_peers()
pytestmark = pytest.mark.peers

PAGES = sorted((ROOT / "docs" / "compat").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_code_runs(path):
    names = {}
    blocks = BLOCK.findall(path.read_text())
    assert blocks
    for block in blocks:
        with libraries.stand_ins():
            exec(compile(block, str(path), "exec"), names)
