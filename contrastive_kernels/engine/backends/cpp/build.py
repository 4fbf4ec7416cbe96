"""Building the C++ extension for the torch that is installed: `python -m contrastive_kernels build`.

setup.py loads this file by its path, so that there is one list of sources and flags; the package is not imported there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "contrastive_kernels._C"
COMMAND = "python -m contrastive_kernels build"
CACHE_VARIABLE = "CONTRASTIVE_KERNELS_CACHE"
COMPILER_FLAGS = "CONTRASTIVE_KERNELS_CXXFLAGS"
LINKER_FLAGS = "CONTRASTIVE_KERNELS_LDFLAGS"
PACKAGE = Path(__file__).parents[3]
FOLDER = PACKAGE / "csrc"
FILE = "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
# -O2 with the vectoriser of -O3: the rest of -O3 makes the loops a fifth slower. A comparison with NaN must not trap,
# or the compiler could not vectorise it. Debug information, which CFLAGS often ask for, is fifteen times the code.
FLAGS = [
    *("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"),
    *("-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-g0"),
]
# one line of ninja's output for each file that it has compiled
_NINJA = re.compile(r"\[(\d+)/(\d+)\].* -o \S*?([^/\s]+)\.o\b")


class BuildError(Exception):
    """Raised when the extension cannot be built; the message says why and what to do."""


def sources() -> list[Path]:
    """Return the files that are compiled."""
    return sorted(FOLDER.rglob("*.cpp"))


def headers() -> list[Path]:
    """Return the files that they include."""
    return sorted([*FOLDER.rglob("*.h"), *FOLDER.rglob("*.inc")])


def compiler_flags() -> list[str]:
    """Return the flags of the compiler, without those of the user."""
    import torch

    # The headers of torch 2.10 and later are C++20. For an earlier torch C++17 has to do, which has no designated
    # initialisers, but GCC and Clang accept them there.
    standard = "c++20" if torch.__version__ >= torch.torch_version.TorchVersion("2.10") else "c++17"
    return [f"-std={standard}", *FLAGS]


def extension_module(root: Path | None = None) -> Any:
    """Return the extension for setuptools, its files relative to ``root`` if that is given."""
    from torch.utils.cpp_extension import CppExtension

    def name(path: Path) -> str:
        return str(path.relative_to(root) if root else path)

    return CppExtension(
        NAME,
        [name(path) for path in sources()],
        depends=[name(path) for path in headers()],
        include_dirs=_pybind11_folders(),
        extra_compile_args=[*compiler_flags(), *os.environ.get(COMPILER_FLAGS, "").split()],
        extra_link_args=["-fopenmp", *os.environ.get(LINKER_FLAGS, "").split()],
    )


def _pybind11_folders() -> list[str]:
    """Return the folder of pybind11's headers, or no folder if only torch's copy of them is there."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def key() -> str:
    """Return what a build belongs to, as the name of a folder: torch, the ABI of Python, the sources and flags.

    The flags of the user are no part of it: whoever imports the package need not set them again.
    """
    import torch

    digest = hashlib.sha256()
    for path in [*sources(), *headers()]:
        digest.update(path.relative_to(FOLDER).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(" ".join(compiler_flags()).encode())
    return f"torch-{torch.__version__}-{sysconfig.get_config_var('SOABI')}-{digest.hexdigest()[:12]}"


def cached() -> Path:
    """Return the file in the cache of the user for `key`, whether it is there or not.

    The cache is the folder that the environment variable ``CONTRASTIVE_KERNELS_CACHE`` names, by default
    ``contrastive_kernels`` in ``XDG_CACHE_HOME`` or in ``~/.cache``.

    Raises:
        ValueError: the variable names a file.
    """
    folder = os.environ.get(CACHE_VARIABLE)
    if folder and Path(folder).is_file():
        raise ValueError(f"{CACHE_VARIABLE}={folder!r} is a file; name a folder, there already or not")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(folder) if folder else caches / "contrastive_kernels") / key() / FILE


def in_place() -> Path | None:
    """Return the file beside the package in a checkout that can be written, None elsewhere."""
    is_checkout = (PACKAGE.parent / "setup.py").exists() and os.access(PACKAGE, os.W_OK)
    return PACKAGE / FILE if is_checkout else None


def build(say: Callable[[str], None], *, verbose: bool = False) -> Path:
    """Compile the extension for the installed torch and return its file: beside the package in a checkout, or cached.

    That of a checkout is cached too if it can be, for a copy of the same sources that is installed elsewhere.

    Args:
        say: called with a line for each file that has been compiled.
        verbose: pass every line of the compiler on.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    _check_tools()
    target = in_place() or cached()
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that the finished file takes its place at once, also beside another build.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        command = [sys.executable, str(Path(__file__).resolve()), folder]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment()
        ) as run:
            lines = []
            for line in run.stdout or ():
                lines.append(line.rstrip())
                if verbose:
                    say(lines[-1])
                elif step := _NINJA.match(line):
                    say(f"[{step[1]}/{step[2]}] {step[3]}")
        if run.returncode:
            errors = [line for line in lines if "error" in line.lower()] or lines
            raise BuildError("the extension does not compile:\n" + "\n".join(errors[:20]))
        os.replace(next(Path(folder).rglob(FILE)), target)
    if target == in_place():
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # no home, or no folder that can be written
            copy = cached()
            copy.parent.mkdir(parents=True, exist_ok=True)
            part = copy.with_suffix(f".{os.getpid()}")
            shutil.copy(target, part)
            os.replace(part, copy)
    return target


def _check_tools() -> None:
    if not sources():
        raise BuildError(f"the sources are missing: {FOLDER}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise BuildError(
            f"there is no C++ compiler ({compiler} is not found); install one, "
            "as with `apt install g++`, `dnf install gcc-c++` or `conda install gxx`"
        )
    if importlib.util.find_spec("setuptools") is None:
        raise BuildError("setuptools is missing; `pip install setuptools ninja`")


def _environment() -> dict[str, str]:
    """Return the environment with the programs of this Python on the path: ninja is one of them."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return os.environ | {"PATH": os.pathsep.join(folders)}


def _compile_into(folder: Path) -> None:
    """Compile the extension into a folder by setuptools, with ninja if it is there."""
    from setuptools import Distribution  # type: ignore[import-untyped]
    from torch.utils.cpp_extension import BuildExtension

    distribution = Distribution({"name": "contrastive_kernels", "ext_modules": [extension_module()]})
    command = BuildExtension(distribution)
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    _compile_into(Path(sys.argv[1]))
