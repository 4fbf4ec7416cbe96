"""Types that hold: mypy and pyright check users' programs strictly, and every annotation can be evaluated.

The package's own annotations are checked by `make lint`.
"""

import importlib
import inspect
import json
import os
import pathlib
import subprocess
import sys
import typing

import pytest

import contrastive_kernels as ck
from contrastive_kernels import diagnostics
from tests.support import typed
from tests.support.testing import ROOT

FOLDER = ROOT / "tests" / "support" / "typed"
PROGRAMS = {path.stem: path for path in sorted(FOLDER.glob("[!_]*.py"))}
# As a user's: the package is installed and not itself under test.
CONFIGURATION = """
[mypy]
strict = true
[mypy-contrastive_kernels.*]
follow_imports = silent
"""


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Return a function from programs to mypy's report."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("mypy")
    (folder / "mypy.ini").write_text(CONFIGURATION)

    def check(*paths):
        options = ["--config-file", folder / "mypy.ini", "--cache-dir", folder / "cache", "--no-error-summary"]
        command = [sys.executable, "-m", "mypy", *options, *paths]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)

    return check


def test_mypy(mypy, tmp_path):
    """mypy finds the mistakes and no other: a `type: ignore` without an error is an error itself."""
    done = mypy(*PROGRAMS.values())
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    # the check can fail
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import contrastive_kernels as ck\nck.workspace_limit().backward()\nprint()  # type: ignore[misc]\n"
    )
    done = mypy(wrong)
    assert '"int" has no attribute "backward"' in done.stdout
    assert 'Unused "type: ignore" comment' in done.stdout


def test_pyright(tmp_path):
    """pyright finds the same mistakes and no other."""
    pytest.importorskip("pyright")
    folder = os.path.relpath(FOLDER, tmp_path)
    options = {"include": [folder], "extraPaths": [os.path.relpath(ROOT, tmp_path)], "pythonVersion": "3.10"}
    options |= {"typeCheckingMode": "strict", "enableTypeIgnoreComments": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(options))
    command = [sys.executable, "-m", "pyright", "-p", str(tmp_path), "--outputjson", "--pythonpath", sys.executable]
    report = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert report["summary"]["filesAnalyzed"] == len(PROGRAMS) + 1
    found = {(pathlib.Path(e["file"]).stem, e["range"]["start"]["line"] + 1) for e in report["generalDiagnostics"]}
    expected = {
        (name, number)
        for name, path in PROGRAMS.items()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "# type: ignore" in line
    }
    assert len(expected) > 10
    assert found == expected


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "mistakes"])
def test_programs_run(name):
    importlib.import_module(f"{typed.__name__}.{name}")


def test_programs_call_everything():
    text = "\n".join(path.read_text() for path in PROGRAMS.values())
    names = {name for name in ck.__all__ if callable(getattr(ck, name)) and not name.endswith("Stats")}
    assert [name for name in sorted(names) if f"ck.{name}(" not in text] == []


def callables():
    """Yield every public function, class and public method of the package, with its name."""
    for module in (ck, diagnostics):
        for name in module.__all__:
            thing = getattr(module, name)
            yield name, thing
            if inspect.isclass(thing):
                for method, function in inspect.getmembers(thing, inspect.isfunction):
                    ours = function.__module__.startswith("contrastive_kernels")
                    if ours and (method == "__init__" or not method.startswith("_")):
                        yield f"{name}.{method}", function


@pytest.mark.parametrize("thing", [pytest.param(thing, id=name) for name, thing in callables()])
def test_annotations_can_be_evaluated(thing):
    names = {}
    if thing.__module__.endswith(".plots"):
        # imported by whoever draws, not by the package
        names = {"Axes": pytest.importorskip("matplotlib.axes").Axes}
    hints = typing.get_type_hints(thing, localns=names)
    if inspect.isfunction(thing):
        missing = {*inspect.signature(inspect.unwrap(thing)).parameters, "return"} - {*hints, "self"}
        assert not missing, f"without a type: {', '.join(sorted(missing))}"
