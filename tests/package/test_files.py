"""The rules of the house: one name for a loss in every folder, no long files, invariants and links that exist."""

import re

import pytest

import contrastive_kernels as ck
from tests.conftest import LONG, SLOW
from tests.support.testing import ROOT

LOSSES = sorted(
    path.stem for path in (ROOT / "contrastive_kernels" / "losses").glob("*.py") if not path.stem.startswith("_")
)
SOURCES = sorted(
    path
    for folder in ("contrastive_kernels", "python_ref", "benchmarks", "examples", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".inc", ".sh")
)
TESTS = [path for path in SOURCES if path.is_relative_to(ROOT / "tests")]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
DOCUMENTS += sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "compat").glob("*.md")])
LONGEST = 500


def relative(path):
    return str(path.relative_to(ROOT))


# A loss has one name.


def test_there_are_as_many_losses_as_functions():
    """Every public loss function has a file, and every file a function of its name."""
    functions = {name for name in ck.__all__ if name.endswith("_loss")} | {"distance_polarization"}
    modules = {"lmcl"}  # LMCLLoss: five of the functions with a polarization
    named = {name if name == "distance_polarization" else f"{name}_loss" for name in set(LOSSES) - modules}
    assert named == functions


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_its_reference_tests_and_benchmark(name):
    assert (ROOT / "python_ref" / f"{name}.py").exists()
    assert (ROOT / "tests" / "losses" / f"test_{name}.py").exists()
    cases = (ROOT / "benchmarks" / "cases.py").read_text()
    assert re.search(rf'^    "{name}": ', cases, re.MULTILINE), f"LOSSES has no {name}"


# Files are short.


def too_long(text):
    """Return whether a file is longer than a reader likes and its first lines do not give the reason."""
    lines = text.splitlines()
    return len(lines) > LONGEST and not any(f"Longer than {LONGEST} lines because" in line for line in lines[:15])


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_long_file_gives_its_reason(path):
    assert not too_long(path.read_text()), f"{len(path.read_text().splitlines())} lines"


def test_the_length_is_checked():
    assert len(SOURCES) > 150
    assert not too_long("x\n" * LONGEST)
    assert too_long("x\n" * (LONGEST + 1))
    assert not too_long(f"// Longer than {LONGEST} lines because of its table.\n" + "x\n" * LONGEST)


# The tiers of tests.


@pytest.mark.parametrize("name", sorted({*LONG, *SLOW}))
def test_a_listed_test_exists(name):
    file, _, function = name.partition("::")
    path = ROOT / "tests" / file
    assert path.exists()
    assert not function or f"def {function}(" in path.read_text()


# Invariants.

ROW = re.compile(r"^\| I(\d+) \| ([^|]+?) \| (?:.*) \| ([^|]*) \|$", re.MULTILINE)
CITATION = re.compile(r"\bI(\d+) (.*)")


def invariants():
    """Return name and tests of every invariant by number, from the table in docs/losses.md."""
    found = ROW.findall((ROOT / "docs" / "losses.md").read_text())
    table = {int(number): (name, tests) for number, name, tests in found}
    assert len(table) == len(found) > 10
    return table


def wrong_citations(text, table):
    """Yield the citations of a text, as ``I17 permutation``, whose number and name the table lacks."""
    for number, words in CITATION.findall(text):
        if int(number) not in table or not words.startswith(table[int(number)][0]):
            yield f"I{number} {words}"


@pytest.mark.parametrize("path", [path for path in TESTS if path.name != "test_files.py"], ids=relative)
def test_cited_invariants_exist(path):
    assert list(wrong_citations(path.read_text(), invariants())) == []


def test_every_invariant_is_cited():
    cited = {int(number) for path in TESTS for number, _ in CITATION.findall(path.read_text())}
    assert set(invariants()) <= cited


def test_a_wrong_citation_is_found():
    table = {17: ("permutation", "")}
    assert list(wrong_citations('"""I17 permutation: of the samples."""', table)) == []
    for wrong in ("I17 band", "I18 permutation"):
        assert list(wrong_citations(wrong, table)) == [wrong]


def test_tests_of_invariants_exist():
    names = [f"/{relative(path)}" for path in SOURCES]
    for number, (_, where) in invariants().items():
        files, folders = re.findall(r"`([a-z_0-9/]+\.py)`", where), re.findall(r"`([a-z_/]+/)`", where)
        assert files or folders, f"I{number}"
        for file in files:
            assert any(name.endswith(f"/{file}") for name in names), f"I{number}: {file}"
        for folder in folders:
            assert (ROOT / folder).is_dir(), f"I{number}: {folder}"


# Links.

LINK = re.compile(r"\]\(([^)\s]+)\)")


def slugs(text):
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(text, folder):
    """Yield the relative links of a document that lead nowhere."""
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = folder / target
        if not path.exists() or (anchor and anchor not in slugs(path.read_text() if target else text)):
            yield link


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_relative_links_exist(path):
    assert list(broken(path.read_text(), path.parent)) == []


def test_a_broken_link_is_found():
    text = (
        "# A heading, `code`\n[a](README.md) [b](nowhere.md) [c](#a-heading-code) [d](#other) [e](https://pytorch.org)"
    )
    assert list(broken(text, ROOT)) == ["nowhere.md", "#other"]
    assert list(broken("[a](README.md#no-such-heading)", ROOT)) == ["README.md#no-such-heading"]
