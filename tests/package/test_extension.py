"""Loading the C++ extension: what it says of itself, and why it cannot be used."""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from contrastive_kernels.__main__ import report
from contrastive_kernels.engine.backends import cpp

MAJOR, MINOR, *_ = torch.__version__.split(".")
MARKER = "contrastive_kernels: built for torch "
OTHER_TORCH = f"built for torch 1.2.3, this is torch {torch.__version__}; build it again: `python setup.py build_ext"


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """A function that writes a module's file and returns its name; bytes become a shared object that does not load."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(content: bytes | str) -> str:
        name = f"extension_{abs(hash(content))}"
        if isinstance(content, bytes):
            (tmp_path / (name + EXTENSION_SUFFIXES[0])).write_bytes(content)
        else:
            (tmp_path / f"{name}.py").write_text(content)
        importlib.invalidate_caches()
        return name

    return write


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("1.2.3", OTHER_TORCH),
        (f"{MAJOR}.{MINOR}.0", "does not load ("),
        (None, "does not load ("),
    ],
    ids=["other-torch", "same-torch", "no-marker"],
)
def test_extension_that_does_not_load(version, reason, extension):
    marker = b"" if version is None else f"\0{MARKER}{version}\0".encode()
    info, problem = cpp.load(extension(b"\x7fELF no library" + marker + b"\xff"))
    assert info == {}
    assert reason in problem


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def build_info(): return {'torch': '1.2.3'}", OTHER_TORCH),
        (
            f"def build_info(): return {{'torch': '{MAJOR}.{int(MINOR) + 1}.0'}}",
            f"for torch {MAJOR}.{int(MINOR) + 1}.0",
        ),
        (f"def build_info(): return {{'torch': '{MAJOR}.{MINOR}.99'}}", None),
        ("", "has no attribute 'build_info'"),
    ],
    ids=["other-torch", "next-torch", "other-patch", "no-build-info"],
)
def test_extension_that_loads(source, reason, extension):
    info, problem = cpp.load(extension(source))
    if reason is None:
        assert problem is None
        assert info == {"torch": f"{MAJOR}.{MINOR}.99"}
    else:
        assert info == {}
        assert reason in problem


def test_extension_that_is_not_built():
    info, problem = cpp.load("contrastive_kernels._not_built")
    assert info == {}
    assert problem == "the extension is not built; build it with `python setup.py build_ext --inplace`"


@pytest.mark.skipif(cpp.missing is not None, reason=str(cpp.missing))
def test_extension_that_is_built():
    module = importlib.import_module("contrastive_kernels._C")
    info = module.build_info()
    assert torch.__version__.startswith(info["torch"])
    assert info["standard"] in ("C++17", "C++20")
    assert info["instruction_set"] in ("x86-64-v4", "x86-64-v3", "baseline")
    assert info["threads"] == torch.get_num_threads()
    assert set(info) == {"torch", "standard", "compiler", "instruction_set", "bfloat16_matrix_unit", "threads"}
    # the text that is searched for where the file does not load
    assert f"{MARKER}{info['torch']}\0".encode() in Path(module.__file__).read_bytes()
    line = next(line for line in report().splitlines() if line.startswith("C++ extension:"))
    assert all(str(info[field]) in line for field in ("torch", "standard", "compiler", "instruction_set", "threads"))


def test_report_without_the_extension(monkeypatch):
    monkeypatch.setattr(cpp, "build_info", {})
    assert "C++ extension: not available" in report().splitlines()
