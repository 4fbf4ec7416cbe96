"""`python -m contrastive_kernels`: what this installation can run, and why it cannot run the rest.

`python -m contrastive_kernels check` compares what it runs with float64; `build` compiles the C++ backend for the
installed torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Sequence

import torch

from contrastive_kernels import __version__, saved_scores_limit, workspace_limit
from contrastive_kernels.check import command
from contrastive_kernels.engine import environment
from contrastive_kernels.engine.backends import BACKENDS, ENVIRONMENT_VARIABLE, choose, cpp, triton
from contrastive_kernels.engine.backends.cpp import build
from contrastive_kernels.engine.backends.triton import first_use, tune
from contrastive_kernels.primitives import shards

BUILD_DESCRIPTION = f"""
Compile the C++ backend, the fast one on a CPU, from the sources of this package for the torch that is installed. A
C++ compiler and setuptools are needed; ninja, if it is there, compiles several files at once. It takes about a minute.
In a checkout the extension goes beside the package, elsewhere into ~/.cache/contrastive_kernels; `import
contrastive_kernels` finds it in both. Another torch or other sources need another build.
{build.CACHE_VARIABLE} names another folder than the one in ~/.cache, {build.COMPILER_FLAGS} and {build.LINKER_FLAGS}
are further flags, CXX is the compiler.
"""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    """Return how the C++ extension was built and what it uses here, as text."""
    if not cpp.build_info:
        return "not available"
    info = cpp.build_info
    matrix_unit = "bfloat16 matrix unit" if info["bfloat16_matrix_unit"] else "no bfloat16 matrix unit"
    return (
        f"built for torch {info['torch']} as {info['standard']} with {info['compiler']}; "
        f"runs on {info['instruction_set']}, {matrix_unit}, {info['threads']} OpenMP threads"
    )


def _default_backend(x: torch.Tensor) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says what is missing
            return choose(x).name
    except NotImplementedError:
        return f"none, {ENVIRONMENT_VARIABLE} asks for one that does not run here"


def report() -> str:
    """Return the report as text."""
    devices = [
        ("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"sm_{properties.major}{properties.minor}"
            devices.append((f"cuda:{index}", f"{properties.name}, {capability}, {properties.total_memory >> 30} GiB"))
    lines = [
        f"contrastive_kernels {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}",
        f"C++ extension: {_extension()}",
        f"{ENVIRONMENT_VARIABLE} = {os.environ.get(ENVIRONMENT_VARIABLE) or '(not set: by device)'}",
    ]
    for device, description in devices:
        x = torch.empty((1, 1), device=device)
        lines += ["", f"{device}: {description}", f"  default backend for float32: {_default_backend(x)}"]
        for name, backend in BACKENDS.items():
            lines.append(f"  {name:<7} {'; '.join(backend.not_supported_reasons(x)) or 'available'}")
        if x.is_cuda and triton.installed:
            lines.append(f"  {first_use.outlook(x.device)}")
    if used := first_use.report():
        lines += ["", "Triton kernels that this process has used:", *(f"  {line}" for line in used)]
    return "\n".join(lines)


def check_environment() -> None:
    """Raise ValueError for an environment variable that means nothing."""
    environment.choice(ENVIRONMENT_VARIABLE, BACKENDS)
    environment.choice(shards.ENVIRONMENT_VARIABLE, shards.MODES)
    for switch in (first_use.ENVIRONMENT_VARIABLE, tune.ENVIRONMENT_VARIABLE, "CONTRASTIVE_KERNELS_BUILD"):
        environment.choice(switch, environment.SWITCH)
    workspace_limit()
    saved_scores_limit()
    with contextlib.suppress(OSError, RuntimeError):  # no sources, no home
        build.cached()


def compile_extension(verbose: bool) -> int:
    """Build the C++ extension and say what was done; return the exit status."""
    print(
        f"Compiling {len(build.sources())} files for torch {torch.__version__}; this takes about a minute.", flush=True
    )
    try:
        file = build.build(lambda line: print(line, flush=True), verbose=verbose)
    except build.BuildError as error:
        print(f"No C++ backend: {error}", file=sys.stderr)
        return 1
    print(f"Built {file}; `import contrastive_kernels` finds it there.")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m contrastive_kernels", description="Print what this installation can run, and why not the rest."
    )
    commands = parser.add_subparsers(dest="command", metavar="check|build")
    check = commands.add_parser(
        "check", help="compare every loss on every backend with float64", description=command.DESCRIPTION
    )
    command.add_arguments(check)
    compile_ = commands.add_parser(
        "build", help="compile the C++ backend for the installed torch", description=BUILD_DESCRIPTION
    )
    compile_.add_argument("--verbose", action="store_true", help="show what the compiler is called with and says")
    options = parser.parse_args(arguments)
    try:
        check_environment()
    except ValueError as error:
        parser.error(str(error))
    if options.command == "check":
        return command.run(options, check)
    if options.command == "build":
        return compile_extension(options.verbose)
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
