"""The versions that are stated: in the metadata, the pins, the pairs that are tested and the page of results."""

import re
import sys
from dataclasses import replace

import pytest

from tests.install import environments, paths, versions
from tests.support.testing import ROOT

METADATA = (ROOT / "pyproject.toml").read_text()
ORDERED = [tuple(map(int, pair.python.split("."))) for pair in versions.PAIRS]


def numbers(version):
    return tuple(map(int, version.split(".")))


def test_the_oldest_pair_is_what_the_metadata_ask_for():
    assert f'requires-python = ">={versions.PAIRS[0].python}"' in METADATA
    oldest = min(numbers(pair.torch)[:2] for pair in versions.PAIRS)
    assert f'"torch>={".".join(map(str, oldest))}"' in METADATA
    assert sorted(ORDERED) == ORDERED and len(set(ORDERED)) == len(ORDERED)


def test_the_pins_are_a_pair():
    pinned = next(pin for pin in environments.pins() if pin.startswith("torch=="))
    assert pinned.partition("==")[2] in [pair.torch for pair in versions.PAIRS]


def test_the_page_has_the_results():
    results = versions.stored()
    for result in results:
        assert any(versions.result_of(pair, [result]) for pair in versions.PAIRS), f"{result} is of no pair"
        assert result.passed > 10_000 and result.failed == 0
    page = versions.PAGE.read_text()
    assert versions.page_with(page, results) == page
    other = [replace(results[0], numpy="2.99.0"), *results[1:]]
    assert versions.page_with(page, other).count("2.99.0") == 1
    assert versions.page_with(page, []).count("not run yet") == len(versions.PAIRS)


@pytest.mark.parametrize("pair", versions.PAIRS, ids=lambda pair: pair.python)
def test_every_package_is_pinned_once_for_every_python(pair):
    """The markers of requirements-dev.txt leave one version of each."""
    found = {}
    for pin in environments.pins("torch"):
        requirement, _, marker = (part.strip() for part in pin.partition(";"))
        if marker:
            name, comparison, version = re.fullmatch(r'(\w+) (<|>=) "([\d.]+)"', marker).groups()
            assert name == "python_version"
            older = numbers(pair.python) < numbers(version)
            if older != (comparison == "<"):
                continue
        package, _, pinned = requirement.partition("==")
        assert package not in found
        found[package] = pinned
    assert {"hypothesis", "numpy", "pytest", "matplotlib", "scikit-learn", "rich"} <= set(found)


def test_an_interpreter_is_found():
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert str(environments.python_of(running)) == sys.executable
    assert environments.python_of("2.1") is None


def test_the_ways_of_installing():
    ways = {way.name: way for way in paths.ways("1.0", "2.0")}
    assert len(ways) >= 12
    inside, outside = (ways[f"the README's lines, {where}"] for where in ("in the checkout", "outside"))
    assert any(line.startswith("pip install . ") for line in inside.lines)
    assert any(line.startswith("pip install {checkout} ") for line in outside.lines)
    for way in (inside, outside):
        assert any(line.startswith("python -m contrastive_kernels build") for line in way.lines)


def test_a_sentence_names_its_command():
    from contrastive_kernels.engine.backends import cpp

    _, problem = cpp.load("contrastive_kernels._not_built", ROOT / "nowhere")
    assert paths.COMMAND.search(problem)[1] == "contrastive_kernels build"
