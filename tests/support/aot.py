"""Compile a Triton kernel for a GPU that is not there, and read from the binary what it became."""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# Shared memory of a block, in bytes.
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10}
MATRIX_INSTRUCTION = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\bUTC[A-Z]*MMA", "gfx942": r"\bv_mfma_"}


@dataclass(frozen=True)
class Binary:
    """What the assembler says of a kernel."""

    registers: int
    spilled: int  # bytes of local memory, or vector registers on AMD
    shared: int
    tensor_memory: int
    matrix_instructions: int
    exponentials: int  # instructions for 2^x: as written, whatever loop they are in
    warps: int
    warnings: tuple[str, ...]  # ptxas C75xx: serialized matrix instructions
    assembly: str = field(repr=False)


def argument_type(name: str, dtype: torch.dtype) -> str:
    """Return the type of a kernel's argument or of a bundle's entry, by the names that the package's kernels use."""
    if name in ("x", "y", "dx", "g", "views"):
        return f"*{TYPES[dtype]}"
    if name in ("x_ids", "y_ids", "pairs"):
        return "*i64"
    if name == "matrix":
        return "*fp32" if dtype == torch.float32 else "*i16"
    if name in ("shift_failed", "square", "x_square", "y_square"):
        return "*i32"
    if name.startswith(("exponent_", "constant_")) or name == "terms":
        return "fp32"
    counts = ("N", "M", "V", "slots", "splits", "dx_size")
    if name in counts or name.startswith(("first", "last")) or "stride" in name:
        return "i32"
    return "*fp32"


def divisible_by_16(name: str, type_: str) -> bool:
    """Return whether a launch of usual sizes finds the argument divisible by 16."""
    return type_.startswith("*") or name in ("N", "M", "dx_size") or name.startswith("first") or "stride" in name


def bundle_of(kernel, name: str) -> type | None:
    """Return the named tuple that the kernel takes under a name; None: it is no bundle."""
    hint = get_type_hints(kernel.fn).get(name)
    return hint if hasattr(hint, "_fields") else None


def compile_kernel(kernel, arch: int | str, dtype: torch.dtype, constants: dict, options: dict) -> Binary:
    """Compile as `compiled` does, and read the binary."""
    read = _read_amd if isinstance(arch, str) else _read_nvidia
    return read(compiled(kernel, arch, dtype, constants, options), arch)


def compiled(kernel, arch: int | str, dtype: torch.dtype, constants: dict, options: dict):
    """Return what Triton compiles with `constants`, sizes multiples of 16.

    Constants are compile-time arguments, and None for absent pointers; "bundle.entry" is the name of a bundle's entry.
    """
    signature, values, attributes = {}, {}, {}

    def leaf(name: str, full_name: str, path: tuple[int, ...], type_: str) -> str:
        if full_name in constants:
            values[path] = constants[full_name]
            return "constexpr"
        if divisible_by_16(name, type_):
            attributes[path] = [["tt.divisibility", 16]]
        return type_

    for i, parameter in enumerate(kernel.params):
        name, bundle = parameter.name, bundle_of(kernel, parameter.name)
        if bundle is not None and name not in constants:
            signature[name] = bundle(
                *(
                    leaf(entry, f"{name}.{entry}", (i, j), argument_type(entry, dtype))
                    for j, entry in enumerate(bundle._fields)
                )
            )
            continue
        # partial results are float32
        type_ = argument_type(name, torch.float32 if name == "dx" and constants.get("SPLIT") else dtype)
        if name in ("x_tiles", "y_tiles"):
            side = constants["BN" if name == "x_tiles" else "BM"]
            type_ = f"tensordesc<{TYPES[dtype]}[{side},{constants['BD']}]>"
        signature[name] = leaf(name, name, (i,), type_)
    source = ASTSource(kernel, signature, values, attributes)
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    binary = triton.compile(source, target=target, options=options)
    if target.backend == "cuda" and _log(binary) is None:  # from the cache, without a log
        with _recompiling, triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True
            binary = triton.compile(source, target=target, options=options)
    return binary


_assembler, _recompiling = threading.local(), threading.Lock()


def _assemble(command, *, stderr, **options):
    """Run an assembler for Triton and keep what it says, which alone tells of spills and of serialised products."""
    done = subprocess.run(command, stderr=stderr, **options)
    _assembler.log = Path(stderr.name).read_text()
    return done


nvidia.subprocess = SimpleNamespace(**{**vars(subprocess), "run": _assemble})


def _log(compiled) -> str | None:
    """Return what the assembler that Triton took said of a kernel, kept beside its binary; None if it was not heard."""
    cache, name = get_cache_manager(compiled.hash), "assembler.log"
    said = vars(_assembler).pop("log", None)
    if said is not None:
        cache.put(said, name, binary=False)
    file = cache.get_file(name)
    return None if file is None else Path(file).read_text()


def _read_nvidia(compiled, arch: int) -> Binary:
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        assembly = _run(BIN / "cuobjdump", "-sass", cubin)
    log = _log(compiled)
    return Binary(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", log)[1]) + len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        matrix_instructions=len(re.findall(MATRIX_INSTRUCTION[arch], assembly)),
        exponentials=len(re.findall(r"\bMUFU\.EX2\b", assembly)),
        warps=compiled.metadata.num_warps,
        warnings=tuple(sorted(set(re.findall(r"C75\d+", log)))),
        assembly=assembly,
    )


def _read_amd(compiled, arch: str) -> Binary:
    assembly = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly)[1])

    return Binary(
        registers=number("vgpr_count"),
        spilled=number("vgpr_spill_count") + number("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        tensor_memory=0,
        matrix_instructions=len(re.findall(MATRIX_INSTRUCTION[arch], assembly)),
        exponentials=len(re.findall(r"\bv_exp_f32", assembly)),
        warps=compiled.metadata.num_warps,
        warnings=(),
        assembly=assembly,
    )


def _run(*command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
