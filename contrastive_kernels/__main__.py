"""`python -m contrastive_kernels`: what this installation can run, and why it cannot run the rest.

`python -m contrastive_kernels check` compares what it runs with float64; `build` compiles the C++ backend for the
installed torch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Sequence

import torch

from contrastive_kernels import __version__, saved_scores_limit, workspace_limit
from contrastive_kernels.check import command
from contrastive_kernels.engine.backends import BACKENDS, ENVIRONMENT_VARIABLE, choose, cpp, triton
from contrastive_kernels.engine.backends.cpp import build
from contrastive_kernels.engine.backends.triton import first_use


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
    backend = os.environ.get(ENVIRONMENT_VARIABLE)
    if backend and backend not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    first_use.switched_off()
    workspace_limit()
    saved_scores_limit()


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
        "build", help="compile the C++ backend for the installed torch", description=build.__doc__
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
