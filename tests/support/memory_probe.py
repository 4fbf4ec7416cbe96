"""A program that measures the peak memory of forward and backward beyond inputs and gradients, one JSON line a case.

Usage: python -m tests.support.memory_probe BACKEND [ROWS LOSS ...]
"""

import ctypes
import gc
import json
import pathlib
import sys

import torch

import contrastive_kernels as ck
from tests.support.testing import CASES, FAMILY, Case, two, views

# MMCL keeps N x N matrices; the others only look at the rows of one sample or label.
WITHOUT_SWEEP = ("mmcl", "simsiam", "byol", "alignment", "augmentation_robust", "label_pull")
# Left out: negatives per anchor (N, M, D), which are as large as the N x M matrix.
MEASURED = {
    **{name: CASES[name] for name in ("info_nce", "nt_xent", "clip", "moco")},
    "arcl": Case("arcl_loss", views(2)),
    "moco_arcl": CASES["moco_arcl"],
    "nt_xent-polarized": CASES["nt_xent-polarized"],
    "info_nce-smoothed": Case("info_nce_loss", two("query", "positive_key"), {"label_smoothing": 0.1}),
    "info_nce-statistics": Case("info_nce_loss", two("query", "positive_key"), {"return_stats": True}),
    "nt_xent-cutoff": Case("nt_xent_loss", two("z0", "z1"), {"cutoff_margin": 0.0}),
    **{name: case for name, case in FAMILY.items() if name not in WITHOUT_SWEEP},
}
# Losses of two views compare two rows a sample.
SELF_SIMILARITY = {
    f"{name}_loss"
    for name in ("nt_xent", "sup_con", "debiased", "hard_negative", "decoupled", "false_negative", "t_simclr")
}
# Rows for a backend. PyTorch's chunks do not grow with N, so that fewer rows show a matrix.
ROWS = {"cpp": 16384, "torch": 3072}


def status(field: str) -> int:
    """Return the bytes of a line of /proc/self/status."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def peak_beyond(function) -> int:
    """Return by how much the resident set grows at its highest while `function` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def measure(case: Case, rows: int, dim: int, backend: str) -> int:
    """Return the peak bytes beyond inputs and gradients."""
    samples = rows // 2 if case.loss in SELF_SIMILARITY else rows
    features = case.features((samples, rows, dim), torch.float32)
    leaves = {k: v.requires_grad_(v.is_floating_point() and k not in case.detached) for k, v in features.items()}

    def both():
        loss = case(ck, leaves, backend=backend)
        (loss[0] if isinstance(loss, tuple) else loss).backward()

    peak = peak_beyond(both)
    return peak - sum(x.grad.nbytes for x in leaves.values() if x.grad is not None)


def main(backend: str, rows: str | None = None, *losses: str) -> None:
    for name in losses or MEASURED:
        size = int(rows) if rows else ROWS[backend]
        measure(MEASURED[name], 512, 64, backend)  # thread pools, workspaces and code
        print(json.dumps({"case": name, "bytes": measure(MEASURED[name], size, 64, backend)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
