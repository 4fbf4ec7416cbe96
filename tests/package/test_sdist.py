"""The source distribution: complete where torch is absent, and enough to build and install the package from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.engine.backends import cpp
from contrastive_kernels.engine.backends.cpp import build
from tests.support.testing import ROOT

BUILD_SDIST = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_sdist(sys.argv[1]))"
RUN_A_LOSS = """
import importlib, json, torch, contrastive_kernels as ck
torch.manual_seed(0)
z = torch.randn(2, 9, 5, requires_grad=True)
loss = ck.nt_xent_loss(z[0], z[1], backend="cpp")
loss.backward()
files = [ck.__file__, importlib.import_module("contrastive_kernels._C").__file__]
print(json.dumps({"loss": loss.item(), "gradient": z.grad.norm().item(), "files": files}))
"""


def run(*command: object, **options) -> str:
    """Run a command and return its output, which an error contains too."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment(**variables: str) -> dict[str, str]:
    """Return the environment with ninja on the path and without the variables that change a build or an import."""
    changed = {name: value for name, value in os.environ.items() if not name.startswith("CONTRASTIVE_KERNELS_")}
    changed.pop("PYTHONPATH", None)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return changed | {"PATH": path} | variables


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = run("git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in names.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tracked, tmp_path_factory) -> Path:
    """An sdist, built where importing torch fails, from files without a trace of an earlier build."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    (folder / "hidden").mkdir()
    (folder / "hidden" / "torch.py").write_text("raise ImportError('hidden')")
    output = run(
        *(sys.executable, "-c", BUILD_SDIST, folder),
        cwd=folder / "source",
        env=environment(PYTHONPATH=str(folder / "hidden")),
    )
    assert "without the C++ backend, torch cannot be imported: hidden" in output
    return next(folder.glob("*.tar.gz"))


def test_sdist_holds_the_repository(tracked, sdist):
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert not set(tracked) - held
    generated = {name for name in held - set(tracked) if not name.startswith("contrastive_kernels.egg-info/")}
    assert generated == {"PKG-INFO", "setup.cfg"}


@pytest.mark.skipif(cpp.missing is not None, reason=str(cpp.missing))
def test_build_after_an_isolated_installation(sdist, tmp_path):
    """A wheel built without torch serves every machine; one command then compiles for the torch that is there.

    Compiled without optimisation: one minute of a core's time instead of two.
    """
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # torch, setuptools and pip are those of this environment
    (packages / "these.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    pip = (python, "-m", "pip", "--disable-pip-version-check")
    alone = environment(PYTHONPATH=str(sdist.parent / "hidden"))
    output = run(
        *pip, "wheel", "-v", "--no-index", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist, env=alone
    )
    assert f"`{build.COMMAND}` builds it later" in output
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "contrastive_kernels",
        f"contrastive_kernels-{ck.__version__}.dist-info",
    }
    assert "contrastive_kernels/py.typed" in names
    sources = {path.relative_to(ROOT).as_posix() for path in (*build.sources(), *build.headers())}
    assert sources <= set(names)

    run(*pip, "install", "--no-index", "--no-deps", "--ignore-installed", wheel, env=environment())
    flags = environment(CONTRASTIVE_KERNELS_CXXFLAGS="-O0", CONTRASTIVE_KERNELS_CACHE=str(tmp_path / "cache"))
    assert "the extension is not built" in run(python, "-m", "contrastive_kernels", cwd=tmp_path, env=flags)
    output = run(python, "-m", "contrastive_kernels", "build", cwd=tmp_path, env=flags)
    assert f"[{len(build.sources())}/{len(build.sources())}]" in output
    found = json.loads(run(python, "-c", RUN_A_LOSS, cwd=tmp_path, env=flags).splitlines()[-1])
    package, extension = map(Path, found["files"])
    assert package.is_relative_to(packages)
    assert extension.is_relative_to(tmp_path / "cache")
    torch.manual_seed(0)
    z = torch.randn(2, 9, 5, requires_grad=True)
    loss = ck.nt_xent_loss(z[0], z[1], backend="torch")
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert found["gradient"] == pytest.approx(z.grad.norm().item(), rel=1e-5)
