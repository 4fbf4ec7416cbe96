"""Compile a Triton kernel for a GPU that is not there, and read from the binary what it became."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# Shared memory of a block, in bytes.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10}
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
    warps: int  # of a program, those added by specialization among them
    warnings: tuple[str, ...]  # ptxas C75xx: serialized matrix instructions


def argument_type(name: str, dtype: torch.dtype) -> str:
    """The type of a kernel's argument, by the names that the kernels of this package use."""
    if name in ("x", "y", "dx", "g", "views"):
        return f"*{TYPES[dtype]}"
    if name in ("x_ids", "y_ids", "pairs"):
        return "*i64"
    if name == "scores":
        # those of half precision
        return "*i16"
    if name == "flag" or name.startswith("largest_"):
        return "*i32"
    if name.startswith(("exponent_", "constant_")) or name == "terms":
        return "fp32"
    if name in ("N", "M", "V", "slots", "splits") or name.startswith(("first", "last")) or "stride" in name:
        return "i32"
    return "*fp32"


def compile_kernel(kernel, arch: int | str, dtype: torch.dtype, constants: dict, options: dict) -> Binary:
    """Compile with `constants` (compile-time arguments, and None for absent pointers), sizes multiples of 16."""
    types = {p.name: "constexpr" if p.name in constants else argument_type(p.name, dtype) for p in kernel.params}
    for name, side in (("x_tiles", "BN"), ("y_tiles", "BM")):
        if types.get(name, "constexpr") != "constexpr":
            types[name] = f"tensordesc<{TYPES[dtype]}[{constants[side]},{constants['BD']}]>"
    if "dx" in types and types.get("x_tiles", "constexpr") != "constexpr":
        # a specialized loop of gradients: blocks of vectors are descriptors too
        for name in ("x_ids", "y_ids", "row_stats", "col_stats"):
            if types[name] != "constexpr":
                types[name] = f"tensordesc<{types[name].removeprefix('*')}[{constants['BM']}]>"
    sizes = {name for name in types if name in ("N", "M") or name.startswith("first") or "stride" in name}
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, type_) in enumerate(types.items())
        if type_.startswith("*") or (name in sizes and type_ != "constexpr")
    }
    source = ASTSource(kernel, types, constants, attributes)
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=options)
    return (_read_amd if isinstance(arch, str) else _read_nvidia)(compiled, arch)


def _read_nvidia(compiled, arch: int) -> Binary:
    with tempfile.TemporaryDirectory() as directory:
        cubin, ptx = Path(directory, "kernel.cubin"), Path(directory, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run(BIN / "cuobjdump", "-res-usage", cubin)
        assembly = _run(BIN / "cuobjdump", "-sass", cubin)
        suffix = "a" if arch >= 90 else ""
        assembler = BIN / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        log = _run(assembler, "-v", f"--gpu-name=sm_{arch}{suffix}", ptx, "-o", Path(directory, "out.cubin"))
    return Binary(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", log)[1]) + len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        matrix_instructions=len(re.findall(MATRIX_INSTRUCTION[arch], assembly)),
        exponentials=len(re.findall(r"\bMUFU\.EX2\b", assembly)),
        warps=compiled.metadata.num_warps,
        warnings=tuple(sorted(set(re.findall(r"C75\d+", log)))),
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
    )


def _run(*command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
