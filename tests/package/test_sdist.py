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
def test_wheel_from_the_sdist_runs(sdist, tmp_path):
    """Compiled without optimisation: one minute of a core's time instead of two."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # torch, setuptools and pip are those of this environment
    (packages / "these.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")

    pip = (python, "-m", "pip", "--disable-pip-version-check")
    flags = environment(CONTRASTIVE_KERNELS_BUILD="1", CONTRASTIVE_KERNELS_CXXFLAGS="-O0 -g0")
    run(*pip, "wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist, env=flags)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist()}
        assert "contrastive_kernels/py.typed" in archive.namelist()
    assert folders == {"contrastive_kernels", f"contrastive_kernels-{ck.__version__}.dist-info"}

    run(*pip, "install", "--no-index", "--no-deps", "--ignore-installed", wheel, env=environment())
    found = json.loads(run(python, "-c", RUN_A_LOSS, cwd=tmp_path, env=environment()).splitlines()[-1])
    assert all(Path(file).is_relative_to(packages) for file in found["files"]), found["files"]
    torch.manual_seed(0)
    z = torch.randn(2, 9, 5, requires_grad=True)
    loss = ck.nt_xent_loss(z[0], z[1], backend="torch")
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert found["gradient"] == pytest.approx(z.grad.norm().item(), rel=1e-5)
