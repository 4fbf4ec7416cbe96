"""Loading the C++ extension: what it says of itself, and why it cannot be used."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.__main__ import main, report
from contrastive_kernels.engine import spec
from contrastive_kernels.engine.backends import ENVIRONMENT_VARIABLE, choose, cpp
from contrastive_kernels.engine.backends.cpp import build

MAJOR, MINOR, *_ = torch.__version__.split(".")
SCHEMAS = "\0".join(f"cpp_{name}{spec.SCHEMAS[name]}" for name in cpp.OPERATORS)
MARKER = "contrastive_kernels: built for torch "
OTHER_TORCH = f"built for torch 1.2.3, this is torch {torch.__version__}; build it again with `{build.COMMAND}`"


THIS_TORCH = f"def build_info(): return {{'torch': '{MAJOR}.{MINOR}.0'}}"
NOT_BUILT = "contrastive_kernels._not_built"
WARNING = "computes with plain PyTorch on this CPU"


@pytest.fixture(autouse=True)
def nothing_built(tmp_path, monkeypatch):
    """No build of the user's own, nor what another test has loaded."""
    monkeypatch.delitem(sys.modules, NOT_BUILT, raising=False)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))


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
        (f"{MAJOR}.{MINOR}.0", "was built from other sources"),
        (f"{MAJOR}.{MINOR}.0\0{SCHEMAS}", "does not load ("),
        (None, "does not load ("),
    ],
    ids=["other-torch", "other-sources", "same-sources", "no-marker"],
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
    info, problem = cpp.load(NOT_BUILT)
    assert info == {}
    assert problem == "the extension is not built; build it with `python -m contrastive_kernels build`"


def test_extension_that_is_built():
    """This fails where the C++ backend is missing: elsewhere its tests skip themselves."""
    assert cpp.missing is None
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


def test_cached_build_is_found(extension, tmp_path):
    """After a module that cannot be used, or without any."""
    cached = tmp_path / "cached.py"
    cached.write_text(THIS_TORCH)
    for name in (NOT_BUILT, extension("def build_info(): return {'torch': '1.2.3'}")):
        assert cpp.load(name, cached) == ({"torch": f"{MAJOR}.{MINOR}.0"}, None)


def test_module_comes_before_the_cache(extension, tmp_path):
    cached = tmp_path / "cached.py"
    cached.write_text("raise AssertionError")
    assert cpp.load(extension(THIS_TORCH), cached)[1] is None


def test_cached_build_that_does_not_load(tmp_path):
    cached = tmp_path / ("cached" + EXTENSION_SUFFIXES[0])
    cached.write_bytes(b"\x7fELF no library")
    info, problem = cpp.load(NOT_BUILT, cached)
    assert info == {}
    assert "does not load" in problem
    assert problem.endswith(f"build it again with `{build.COMMAND}`")


@pytest.fixture
def missing(monkeypatch):
    """The C++ backend is missing, and nothing has been said."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(cpp, "missing", f"the extension is not built; build it with `{build.COMMAND}`")
    monkeypatch.setattr(cpp, "_warned", False)


def test_first_loss_without_the_extension_warns_once(missing):
    x = torch.randn(4, 3)
    with pytest.warns(UserWarning, match=WARNING) as record:
        ck.info_nce_loss(x, x)
    (warning,) = record
    assert warning.filename == __file__
    assert f"not built; build it with `{build.COMMAND}`" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.info_nce_loss(x, x)


class InfoNCE(torch.nn.Module):
    def forward(self, query, key):
        return ck.info_nce_loss(query, key)


@pytest.mark.parametrize("how", ["compiled", "exported", "exported strictly"])
def test_traced_loss_without_the_extension_warns_once(how, missing):
    x = torch.randn(4, 3)
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        if how == "compiled":
            loss = torch.compile(InfoNCE(), backend="aot_eager", fullgraph=True)
            loss(x, x), loss(x[:3], x[:3])
        else:
            torch.export.export(InfoNCE(), (x, x), strict=how == "exported strictly")
    (warning,) = [warning for warning in record if WARNING in str(warning.message)]
    assert warning.filename == __file__


@pytest.mark.parametrize("silenced", ["variable", "argument", "not for the CPU"])
def test_asking_for_pytorch_is_no_reason_to_warn(silenced, missing, monkeypatch):
    if silenced == "variable":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    x = torch.randn(4, 3, device="meta" if silenced == "not for the CPU" else "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(x, "torch" if silenced == "argument" else None).name == "torch"


def test_variable_is_named():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, "ccp")
        with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE}='ccp' is unknown"):
            choose(torch.zeros(2, 2))


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A module like `cpp.build` in a package of its own, whose only source compiles at once."""
    package = tmp_path / "installed" / "contrastive_kernels"
    file = package / "engine" / "backends" / "cpp" / "build.py"
    file.parent.mkdir(parents=True)
    (package / "csrc").mkdir()
    (package / "csrc" / "module.cpp").write_text('extern "C" void* PyInit__C() { return nullptr; }')
    shutil.copy(build.__file__, file)
    of_module = importlib.util.spec_from_file_location("build_of_a_test", file)
    module = importlib.util.module_from_spec(of_module)
    of_module.loader.exec_module(module)
    return module


def test_build_goes_into_the_cache(tree, tmp_path, monkeypatch):
    """Whatever the flags are, which a program that imports it need not have; a build with others takes its place."""
    monkeypatch.setenv(tree.COMPILER_FLAGS, "-DPyInit__C=with_a_flag")
    file = tree.build(lambda line: None)
    monkeypatch.delenv(tree.COMPILER_FLAGS)
    assert file == tree.cached()
    assert b"with_a_flag" in file.read_bytes()
    said = []
    file = tree.build(said.append)
    assert file == tree.cached()
    assert file.is_relative_to(tmp_path / "cache")
    assert b"PyInit__C" in file.read_bytes()
    assert said == ["[1/1] module"]
    assert list(file.parent.iterdir()) == [file]


def test_build_in_a_checkout_goes_beside_the_package_too(tree):
    """What is installed of the same sources finds the one in the cache."""
    (tree.PACKAGE.parent / "setup.py").touch()
    file = tree.build(lambda line: None)
    assert file == tree.in_place() == tree.PACKAGE / tree.FILE
    assert file.read_bytes() == tree.cached().read_bytes()
    assert [path.name for path in tree.PACKAGE.glob("_C*")] == [tree.FILE]


def test_build_belongs_to_its_sources_and_flags(tree, monkeypatch):
    keys = {tree.key()}
    monkeypatch.setattr(tree, "FLAGS", ["-O1"])
    keys.add(tree.key())
    (tree.FOLDER / "more.h").touch()
    keys.add(tree.key())
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("9.9.9"))
    keys.add(tree.key())
    assert len(keys) == 4


def test_build_that_does_not_compile(tree):
    (tree.FOLDER / "module.cpp").write_text("#error of this test")
    with pytest.raises(tree.BuildError, match=r"does not compile:(?s:.*)of this test"):
        tree.build(print)
    assert not tree.cached().exists()


def test_build_without_a_compiler(tree, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler-of-this-name -m64")
    with pytest.raises(tree.BuildError, match="no-compiler-of-this-name is not found"):
        tree.build(print)


def test_build_command(monkeypatch, capsys, tmp_path):
    def built(say, verbose):
        say("[1/1] module")
        if verbose:
            raise build.BuildError("a reason")
        return tmp_path

    monkeypatch.setattr(build, "build", built)
    assert main(["build"]) == 0
    assert f"Built {tmp_path}" in capsys.readouterr().out
    assert main(["build", "--verbose"]) == 1
    assert "No C++ backend: a reason" in capsys.readouterr().err
